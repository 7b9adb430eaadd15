"""Tasks in a worker process on this machine.

The process is started by the first task. A task is pulled like a generator: the worker makes the next result
when the owner asks for it, so an engine that saves its work until a result is taken does so here as well.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines.base import ProgressFn, StopFn
from pipeline.engines.loading import EngineChoices
from pipeline.executors.base import Task, WorkerLost, is_of_a_lost_gpu
from pipeline.fs.bucket import without_credentials

# What the owner sends, and what the worker sends.
ENGINES, RUN, NEXT, CLOSE, STOP = "engines", "run", "next", "close", "stop"
YIELDED, PROGRESS, LOADED, LOG, RAISED, DONE = "yielded", "progress", "loaded", "log", "raised", "done"
POLL_S = 0.1  # between two questions whether to stop
END_S = 2.0  # given to the process to end by itself
# Variables by which libraries of linear algebra and numba take their number of threads.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
# The worker's program. It finds modules where the owner does, and not in the folder where it is started. It
# ignores the signals that stop the owner, which tells it to stop.
START = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.path[:] = {path}
from pipeline.executors.worker import main
main({fd})
"""

log = logging.getLogger("pipeline")


def _reduce_map(array: Any) -> Any:
    """A file that is mapped whole, as normalized audio is, is mapped there too; other arrays are sent."""
    if isinstance(array.base, mmap.mmap) and array.filename and array.flags.c_contiguous:
        return np.memmap, (array.filename, array.dtype, "r", array.offset, array.shape)
    return np.array(array, subok=False).__reduce__()


ForkingPickler.register(np.memmap, _reduce_map)

_STARTED = weakref.WeakSet[subprocess.Popen[bytes]]()


def kill_workers() -> None:
    """End all workers by force, where the owner ends without waiting for them."""
    for process in list(_STARTED):
        process.kill()


@dataclass
class ProcessExecutor:
    """Runs tasks in one worker process, which the next task starts again after its death or `close`."""

    engines: EngineChoices
    idle_s: float  # without a task, after which the worker is ended to free its memory
    environment: Mapping[str, str] = field(default_factory=dict)  # variables of the worker alone
    clock: Callable[[], float] = time.monotonic
    _worker: _Worker | None = field(default=None, init=False)
    _used_at: float = field(default=0.0, init=False)

    @property
    def where(self) -> str:
        """See `pipeline.executors.base.Executor`."""
        worker = self._worker
        return f"process {worker.process.pid}" if worker else "a process to be started"

    @property
    def loaded(self) -> list[str]:
        """See `pipeline.executors.base.Executor`."""
        worker = self._worker
        return list(worker.loaded) if worker else []

    @property
    def shares_disk(self) -> bool:
        """See `pipeline.executors.base.Executor`."""
        return True

    def run(self, task: Task, *args: Any, progress: ProgressFn, should_stop: StopFn) -> Iterator[Any]:
        """See `pipeline.executors.base.Executor`."""
        if self._worker is None:
            self._worker = _Worker.started(self.environment)
            self._worker.send(ENGINES, self.engines)
        worker = self._worker
        try:
            yield from worker.run(task, args, progress, should_stop)
        except WorkerLost:
            if self._worker is worker:
                self._worker = None
            raise
        except Exception as e:
            if is_of_a_lost_gpu(e) and self._worker is worker:
                self.close()
            raise
        finally:
            self._used_at = self.clock()

    def use(self, engines: EngineChoices, idle_s: float) -> None:
        """Change the settings. For other engines the next task starts another process.

        The old one would keep what its libraries were told once, such as torch's number of threads.
        """
        if engines != self.engines:
            self.close()
        self.engines, self.idle_s = engines, idle_s

    def release_if_idle(self) -> None:
        """See `pipeline.executors.base.Executor`."""
        if self._worker and self.clock() - self._used_at > self.idle_s:
            log.info("the engines are idle and give their memory back")
            self.close()

    def close(self) -> None:
        """See `pipeline.executors.base.Executor`."""
        if self._worker:
            self._worker.end()
            self._worker = None


@dataclass(frozen=True)
class _Worker:
    """The owner's end of a worker process."""

    process: subprocess.Popen[bytes]
    connection: Connection
    loaded: list[str] = field(default_factory=list)  # see `Executor.loaded`

    @classmethod
    def started(cls, environment: Mapping[str, str]) -> _Worker:
        ours, its = socket.socketpair()
        with its:
            process = subprocess.Popen(
                [sys.executable, "-c", START.format(path=sys.path, fd=its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                env={**without_credentials(os.environ), **environment},
                start_new_session=True,  # so that Ctrl-C reaches the owner alone, which tells the worker
            )
        _STARTED.add(process)
        return cls(process, Connection(ours.detach()))

    def run(
        self, task: Task, args: tuple[Any, ...], progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Any]:
        self.send(RUN, (task, args))
        kind = YIELDED
        try:
            while kind == YIELDED:
                self.send(NEXT)
                kind, content = self._answer(progress, should_stop)
                if kind == RAISED:
                    raise content
                if kind == YIELDED:
                    yield content
        except WorkerLost:
            kind = DONE
            raise
        finally:
            if kind == YIELDED:  # the caller wants no more
                self.send(CLOSE)
                while self._answer(lambda *_: None, should_stop)[0] == YIELDED:
                    pass

    def send(self, kind: str, content: Any = None) -> None:
        try:
            self.connection.send((kind, content))
        except OSError as e:
            raise self._lost() from e

    def end(self) -> None:
        """End the process: by closing its socket, or by force if it takes longer than END_S."""
        self.connection.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self, progress: ProgressFn, should_stop: StopFn) -> tuple[str, Any]:
        """The next message that answers an order."""
        was_told = False
        while True:
            if not was_told and should_stop():
                self.send(STOP)
                was_told = True
            try:
                if not self.connection.poll(POLL_S):
                    continue
                kind, content = self.connection.recv()
            except (EOFError, OSError) as e:
                raise self._lost() from e
            if kind == PROGRESS:
                progress(*content)
            elif kind == LOADED:
                self.loaded[:] = content
            elif kind == LOG:
                log.log(*content)
            else:
                return kind, content

    def _lost(self) -> WorkerLost:
        self.end()
        status = self.process.returncode
        how = f"ended with status {status}"
        if status < 0:
            with suppress(ValueError):
                how = f"was ended by {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                how += ", as happens where memory is short"
        return WorkerLost(f"the process of the engines {how}")


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shares_of_machine(n_workers: int, numba_folder: Path, *, divides_cores: bool) -> list[dict[str, str]]:
    """The variables of each of several workers.

    With `divides_cores`, each takes its share of them; models need it off, since torch's results depend on
    the number of threads. numba's cache has no lock, and two processes that filled an empty one at the same
    time have crashed: so each has its own.
    """
    if n_workers == 1:
        return [{}]
    n_threads = str(max(1, n_cores() // n_workers))
    threads = {name: os.environ.get(name, n_threads) for name in THREADS} if divides_cores else {}
    caches = ({"NUMBA_CACHE_DIR": str(numba_folder / str(k))} if k else {} for k in range(n_workers))
    return [threads | cache for cache in caches]
