"""A measurement in a separate process, so that its peak memory can be measured.

The peak is Linux's VmHWM, the largest resident memory of the process. It includes the mapped pages of
the weights' files that were read. `ru_maxrss` is used only where there is no VmHWM: a child starts with
the peak of the parent that it was forked from.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """The result of a child process."""

    value: Any
    peak_bytes: int  # peak of its resident memory
    others_cores: float  # cores that all other processes kept busy meanwhile; 0 if unknown


class _Clock:
    """The processor time of the whole machine since this was created."""

    def __init__(self) -> None:
        self._began_s, self._busy_s = time.perf_counter(), _busy_s()

    def others_cores(self, ours_s: float) -> float:
        """Cores busy since, apart from `ours_s` of processor time."""
        busy_s, took_s = _busy_s() - self._busy_s, time.perf_counter() - self._began_s
        return max(0.0, busy_s - ours_s) / took_s


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
    clock = _Clock()
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
    found = re.search(r"VmHWM:\s+(\d+) kB", _read("/proc/self/status"))
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Return unused memory to the system, and let `peak_bytes` begin with what is still held (on Linux)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def available_bytes() -> int | None:
    """Memory available without swapping; None where the system does not report it."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def total_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def mapped_bytes() -> int:
    """Resident memory of this process that is mapped from files, such as weights."""
    found = re.search(r"RssFile:\s+(\d+) kB", _read("/proc/self/status"))
    return int(found[1]) * 1024 if found else 0


def _serve(
    pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    try:
        value, error = function(*args, **kwargs), None
    except Exception as raised:
        value, error = None, f"{type(raised).__name__}: {raised}"
    pipe.send((value, error, peak_bytes(), time.process_time()))


def _busy_s() -> float:
    """Processor time of the machine since its start: user, nice, system, interrupts."""
    fields = _read("/proc/stat").split("\n", 1)[0].split()
    ticks = [int(field) for field in fields[1:]]
    return sum(ticks[:3] + ticks[5:7]) / os.sysconf("SC_CLK_TCK") if ticks else 0.0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
