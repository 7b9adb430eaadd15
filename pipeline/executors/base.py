"""The interface of executors, and what a task can use."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.engines.base import ProgressFn, StopFn
from pipeline.engines.loading import Engines
from pipeline.errors import EngineFailure, EngineUnusable, Stopped
from pipeline.executors.judge import Judge

# A module's function; it is called with the tools and with its arguments, and yields its results.
Task = Callable[..., Iterator[Any]]


@dataclass(frozen=True)
class Tools:
    """What a task can use."""

    engines: Engines
    judge: Judge
    progress: ProgressFn
    should_stop: StopFn
    kept: dict[str, Any] = field(default_factory=dict)  # what tasks keep for the ones after them


class WorkerLost(EngineFailure):
    """The process in which a task ran has died; what it yielded before stays valid."""


class WorkerAway(EngineUnusable):
    """No worker can be had where this one ran: the node is lost or full. It is no track's fault."""


class Executor(Protocol):
    """Runs tasks, one at a time: while it waits to be asked for its next result, another one can be run."""

    @property
    def where(self) -> str:
        """Where the tasks run, in a few words."""
        ...

    @property
    def loaded(self) -> Sequence[str]:
        """See `Engines.loaded`, of those in the process in which the tasks run."""
        ...

    @property
    def shares_disk(self) -> bool:
        """Whether tasks can write where this process reads."""
        ...

    def run(self, task: Task, *args: Any, progress: ProgressFn, should_stop: StopFn) -> Iterator[Any]:
        """Yield what the task yields.

        Raises:
            Stopped: soon after `should_stop` returned true.
            WorkerLost: the task has ended its process.
            Exception: what the task raised.
        """
        ...

    def release_if_idle(self) -> None:
        """Free the memory of engines that have not been used for a while; the next task loads them again."""
        ...

    def close(self) -> None:
        """End what runs beside this process."""
        ...


class Executors(Protocol):
    """The executors of a runner."""

    def ready(self) -> Sequence[Executor]:
        """Those that can be given work now, at least one; asked whenever there is work.

        Raises:
            EngineUnusable: there is none.
        """
        ...

    def normalizers(self) -> Sequence[Executor]:
        """Those that only normalize, ahead of the others; perhaps none."""
        ...

    def release_if_idle(self) -> None:
        """See `Executor`; for all of them."""
        ...

    def close(self) -> None:
        """See `Executor`; for all of them."""
        ...


@dataclass(frozen=True)
class FixedExecutors:
    """Executors whose number doesn't change: an `Executors`."""

    executors: Sequence[Executor]
    only_normalize: Sequence[Executor] = ()

    def all(self) -> list[Executor]:
        return [*self.executors, *self.only_normalize]

    def ready(self) -> Sequence[Executor]:
        return self.executors

    def normalizers(self) -> Sequence[Executor]:
        return self.only_normalize

    def release_if_idle(self) -> None:
        for executor in self.all():
            executor.release_if_idle()

    def close(self) -> None:
        for executor in self.all():
            executor.close()


def result_of(executor: Executor, task: Task, *args: Any, should_stop: StopFn) -> Any:
    """The only result of a task; see `Executor.run`."""
    [result] = executor.run(task, *args, progress=lambda *_: None, should_stop=should_stop)
    return result


def is_of_a_lost_gpu(error: Exception) -> bool:
    """Whether it is one after which a process can't use its GPU any more: all later calls give it again."""
    return any(words in str(error) for words in ("CUDA error", "HIP error", "Triton Error [CUDA]"))


def portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note.

    One that can't be pickled, or would end the owner as SystemExit does, becomes one that says the same.
    """
    trace = "".join(traceback.format_exception(error))
    found: BaseException = RuntimeError(f"{type(error).__name__}: {error}")
    if isinstance(error, Exception | Stopped):
        with suppress(Exception):
            found = pickle.loads(pickle.dumps(error))
    found.add_note(trace)
    return found
