"""A measurement in a separate process, so that its peak memory can be measured.

The peak is Linux's VmHWM, the largest resident memory of the process. It includes the mapped pages of
the weights' files that were read. `ru_maxrss` is used only where there is no VmHWM: a child starts with
the peak of the parent that it was forked from.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine


@dataclass(frozen=True)
class Outcome:
    """The result of a child process."""

    value: Any
    peak_bytes: int  # peak of its resident memory
    others_cores: float  # cores that were busy with other work meanwhile; 0 if unknown


class ChildDied(Exception):
    """The child ended without a result; the message says how."""


def in_child(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """Call a module's function in a fresh process. Arguments and result are pickled.

    Raises:
        ChildDied: it raised something, or was killed (by the system, if memory ran out).
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, function, args, kwargs))
    clock = machine.Clock()
    process.start()
    theirs.close()
    try:
        value, error, peak, cpu_s = ours.recv()
        others = clock.others_cores(cpu_s)
    except EOFError:
        process.join()
        raise ChildDied(
            f"{function.__name__} was ended by signal {-(process.exitcode or 0)}"
            + (", as the system does when memory runs out" if process.exitcode == -9 else "")
        ) from None
    process.join()
    if error is not None:
        raise ChildDied(f"{function.__name__}: {error}")
    return Outcome(value, peak, others)


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", machine.read("/proc/self/status"))
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Return unused memory to the system, and let `peak_bytes` begin with what is still held (on Linux)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def mapped_bytes() -> int:
    """Resident memory of this process that is mapped from files, such as weights."""
    found = re.search(r"RssFile:\s+(\d+) kB", machine.read("/proc/self/status"))
    return int(found[1]) * 1024 if found else 0


def _serve(
    pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    try:
        value, error = function(*args, **kwargs), None
    except Exception as raised:
        value, error = None, f"{type(raised).__name__}: {raised}"
    pipe.send((value, error, peak_bytes(), time.process_time()))
