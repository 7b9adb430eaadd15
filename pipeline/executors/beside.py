"""A worker on the CPU beside one that has the generator on a GPU, which makes nothing but the sounds.

Several workers on the CPU share one generator: while it works for one, the others decode, embed, finish,
judge and encode. A sound goes once from the generator to the worker that finishes it, see `tasks.generate`,
and its file is published from there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.engines.base import ProgressFn, StopFn, check_stop
from pipeline.engines.loading import EngineChoices, Wanted
from pipeline.executors import tasks
from pipeline.executors.base import Executor, Task

MOST_BESIDE = 4  # workers on the CPU for each generator; each takes about 0.4 GB, and more with a model
POLL_S = 0.2  # between two questions whether to stop


@dataclass(eq=False)
class BesideGenerator:
    """An `Executor` of a worker on the CPU and the generator that it shares."""

    executor: Executor
    generator: Executor
    turn: threading.Lock  # of all that share the generator
    folder: Path | None  # where sounds are stored on their way; None: they are sent by value

    @property
    def parts(self) -> list[Executor]:
        return [self.executor, self.generator]

    @property
    def where(self) -> str:
        return f"{self.executor.where} beside {self.generator.where}"

    @property
    def loaded(self) -> Sequence[str]:
        return [*self.generator.loaded, *self.executor.loaded]

    @property
    def shares_disk(self) -> bool:
        return self.executor.shares_disk

    def run(self, task: Task, *args: Any, progress: ProgressFn, should_stop: StopFn) -> Iterator[Any]:
        """See `Executor`. A task of the generator waits until no other one uses it."""
        if task not in (tasks.generate, tasks.open_generator):
            yield from self.executor.run(task, *args, progress=progress, should_stop=should_stop)
            return
        while True:
            if task is tasks.open_generator and self.generator.loaded:
                yield None  # without waiting for its turn, which may come after a whole batch
                return
            if self.turn.acquire(timeout=POLL_S):
                break
            check_stop(should_stop)
        try:
            yield from self.generator.run(task, *args, progress=progress, should_stop=should_stop)
        finally:
            self.turn.release()

    def release_if_idle(self) -> None:
        for part in self.parts:
            part.release_if_idle()

    def close(self) -> None:
        for part in self.parts:
            part.close()


def beside(generator: Executor, executors: Sequence[Executor], folder: Path | None) -> list[BesideGenerator]:
    """Workers on the CPU that share a generator."""
    turn = threading.Lock()
    return [BesideGenerator(one, generator, turn, folder) for one in executors]


def parts_of(executors: Sequence[Executor]) -> list[Executor]:
    """The workers that executors are made of, each once."""
    found = [one.parts if isinstance(one, BesideGenerator) else [one] for one in executors]
    return list({id(part): part for parts in found for part in parts}.values())


def n_generators(executors: Sequence[Executor]) -> int:
    """How many batches can be generated at the same time."""
    found = (one.generator if isinstance(one, BesideGenerator) else one for one in executors)
    return len({id(one) for one in found})


def engines_beside(choices: EngineChoices, device: str) -> EngineChoices:
    """The engines of a worker beside a generator: on this device, with the threads of its environment."""

    def changed(wanted: Wanted) -> Wanted:
        choice, settings = wanted
        return choice, replace(settings, device=device, threads=None)

    embedder, generator, rater = choices
    return changed(embedder), generator, rater and changed(rater)
