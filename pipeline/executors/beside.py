"""Workers beside one that has the generator on a GPU, which makes nothing but the sounds.

The workers share the generator. While it works, they decode, embed, finish, judge and encode, each its own
tracks. A call of the generator makes what all of them wait for, up to a whole batch: the more variations
share a step of a model, the less each costs. A sound goes once from the generator to the worker that finishes
it, see `tasks.generate`, and its file is published from there.
"""

from __future__ import annotations

import logging
import math
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.engines.base import ProgressFn, StopFn, check_stop
from pipeline.engines.loading import EngineChoices, Wanted
from pipeline.errors import Stopped
from pipeline.executors import tasks
from pipeline.executors.base import Executor, Task
from pipeline.executors.tasks import TakeRequest
from pipeline.fs.disk import environment_error

# Workers for each generator: two for each core, since they wait while their sounds are made, or one if they
# have models of their own. Each takes about 0.4 GB, with CLAP 1.1 GB.
PER_CORE, MOST_BESIDE, MOST_WITH_MODELS = 2, 16, 8
# Where models are on the generator's GPU, there is one worker for so much of its memory, of which it takes
# an estimated 1 GB: what CUDA needs for a process, the model, and a few windows of sound.
GPU_GB_PER_WORKER = 8.0
POLL_S = 0.2  # between two questions whether to stop
STEP, RESULT, RAISED, DONE = "step", "result", "raised", "done"

log = logging.getLogger("pipeline")


@dataclass(eq=False)
class Call:
    """The sounds that one worker waits for."""

    wanted: dict[str, TakeRequest]  # by request; those without a result
    paths: Mapping[str, Path]
    should_stop: StopFn
    events: queue.SimpleQueue[tuple[str, Any]] = field(default_factory=queue.SimpleQueue)
    is_left: bool = False  # nobody waits for it any more
    together: Sequence[Call] = ()  # those that are made with it, itself among them; empty: not begun
    has_ended: threading.Event = field(default_factory=threading.Event)  # they have, all of them

    @property
    def n_tracks(self) -> int:
        return len({one.request.track_id for one in self.wanted.values()})

    def is_unwanted(self) -> bool:
        return self.is_left or self.should_stop()

    def take(self, result: tuple[Any, Any]) -> None:
        key = result[0].request_id
        del self.wanted[key]
        if self.is_left and key in self.paths:
            self.paths[key].unlink(missing_ok=True)
        self.events.put((RESULT, result))
        if not self.wanted:
            self.events.put((DONE, None))


@dataclass(eq=False)
class SharedGenerator:
    """A generator that makes in one call what several workers wait for."""

    executor: Executor
    most_tracks: int  # of a call, unless one worker wants more
    _turn: threading.Lock = field(default_factory=threading.Lock)  # of the executor's tasks
    _changing: threading.Lock = field(default_factory=threading.Lock)  # guards the two below
    waiting: list[Call] = field(default_factory=list)  # for the next call of the generator
    _is_at_work: bool = False

    def open(self, should_stop: StopFn) -> Iterator[None]:
        """See `tasks.open_generator`. Who finds it loaded does not wait for a call to end."""
        while not self.executor.loaded:
            if self._turn.acquire(timeout=POLL_S):
                try:
                    yield from self.executor.run(
                        tasks.open_generator, progress=lambda *_: None, should_stop=should_stop
                    )
                    return
                finally:
                    self._turn.release()
            check_stop(should_stop)
        yield None

    def generate(
        self,
        wanted: Sequence[TakeRequest],
        paths: Mapping[str, Path],
        progress: ProgressFn,
        should_stop: StopFn,
    ) -> Iterator[tuple[Any, Any]]:
        """See `tasks.generate`. The sounds are all made at once, even if nobody asks for the next one yet.

        Who leaves a call last waits until the generator has stopped.
        """
        call = Call({one.request.request_id: one for one in wanted}, paths, should_stop)
        self._add(call)
        try:
            while (event := self._event(call))[0] != DONE:
                kind, content = event
                if kind == RAISED:
                    raise content
                if kind == RESULT:
                    yield content
                else:
                    progress(*content)
        finally:
            with self._changing:
                call.is_left = True
                if call in self.waiting:
                    self.waiting.remove(call)
            if call.together and all(one.is_left for one in call.together):
                call.has_ended.wait()

    def _event(self, call: Call) -> tuple[str, Any]:
        """The next event of a call; a stop ends one that still waits."""
        while True:
            with suppress(queue.Empty):
                return call.events.get(timeout=POLL_S)
            if not call.together:
                check_stop(call.should_stop)

    def _add(self, call: Call) -> None:
        with self._changing:
            self.waiting.append(call)
            if not self._is_at_work:
                threading.Thread(target=self._work, daemon=True).start()
                self._is_at_work = True

    def _work(self) -> None:
        while calls := self._next_calls():
            self._make(calls)
            for call in calls:
                call.has_ended.set()

    def _next_calls(self) -> list[Call]:
        """Those that have waited longest, as many as one call of the generator is to make."""
        with self._changing:
            n, n_tracks = 0, 0
            for call in self.waiting:
                n_tracks += call.n_tracks
                if n and n_tracks > self.most_tracks:
                    break
                n += 1
            found, self.waiting = self.waiting[:n], self.waiting[n:]
            for call in found:
                call.together = found
            self._is_at_work = bool(found)
            return found

    def _make(self, calls: Sequence[Call]) -> None:
        """Make what the calls want by one call of the generator; after an error, by one call for each."""
        owners = {key: call for call in calls for key in call.wanted}
        wanted = [one for call in calls for one in call.wanted.values()]
        paths = {key: path for call in calls for key, path in call.paths.items()}
        began_s = time.monotonic()
        try:
            with self._turn:
                for result in self.executor.run(
                    tasks.generate,
                    wanted,
                    paths,
                    progress=lambda key, *step: owners[key].events.put((STEP, (key, *step))),
                    should_stop=lambda: all(call.is_unwanted() for call in calls),
                ):
                    owners[result[0].request_id].take(result)
        except BaseException as e:
            for call in calls:
                if len(calls) == 1 or isinstance(e, Stopped) or environment_error(e):
                    call.events.put((RAISED, e))
                elif call.is_unwanted():
                    call.events.put((RAISED, Stopped("asked to stop")))
                elif call.wanted:
                    self._make([call])
            return
        took_s = time.monotonic() - began_s
        sound_s = sum(one.request.duration_s for one in wanted)
        log.debug("a call made %d takes, %.0f s of sound, in %.2f s", len(wanted), sound_s, took_s)
        for call in calls:
            call.events.put((DONE, None))


@dataclass(eq=False)
class BesideGenerator:
    """An `Executor` of a worker and the generator that it shares."""

    executor: Executor
    shared: SharedGenerator
    folder: Path | None  # where sounds are stored on their way; None: they are sent by value

    @property
    def parts(self) -> list[Executor]:
        return [self.executor, self.shared.executor]

    @property
    def where(self) -> str:
        return f"{self.executor.where} beside {self.shared.executor.where}"

    @property
    def loaded(self) -> Sequence[str]:
        return [*self.shared.executor.loaded, *self.executor.loaded]

    @property
    def shares_disk(self) -> bool:
        return self.executor.shares_disk

    def run(
        self, task: Task, *args: Any, progress: ProgressFn, should_stop: StopFn
    ) -> Generator[Any, None, None]:
        """See `Executor`. A request to the generator waits until the call that runs has ended."""
        if task is tasks.generate:
            wanted, paths = args
            yield from self.shared.generate(wanted, paths, progress, should_stop)
        elif task is tasks.open_generator:
            yield from self.shared.open(should_stop)
        else:
            yield from self.executor.run(task, *args, progress=progress, should_stop=should_stop)

    def release_if_idle(self) -> None:
        for part in self.parts:
            part.release_if_idle()

    def close(self) -> None:
        for part in self.parts:
            part.close()


def workers_beside(
    cores: float, choices: EngineChoices, gpu_gb: Callable[[], float] = lambda: math.inf
) -> int:
    """How many workers with these engines share a generator.

    Args:
        cores: that there are for them.
        gpu_gb: gives the memory of the GPU on which their models are, too; infinite: they are on the CPU.
    """
    embedder, _, rater = choices
    if any(wanted and wanted[0].card.default_model for wanted in (embedder, rater)):
        return max(1, int(min(MOST_WITH_MODELS, cores, gpu_gb() / GPU_GB_PER_WORKER)))
    return max(1, min(MOST_BESIDE, int(PER_CORE * cores)))


def gpu_gb() -> float:
    """Gigabytes of memory of this machine's GPU, of several the smallest; 0 if it is not known.

    It is asked of nvidia-smi, which comes with the driver: torch would load CUDA into this process.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return min(float(mebibytes) for mebibytes in found.stdout.split()) * (1 << 20) / 1e9
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0.0


def beside(
    generator: Executor, executors: Sequence[Executor], folder: Path | None, batch_tracks: int
) -> list[BesideGenerator]:
    """Workers that share a generator, whose calls are for so many tracks."""
    shared = SharedGenerator(generator, batch_tracks)
    return [BesideGenerator(one, shared, folder) for one in executors]


def parts_of(executors: Sequence[Executor]) -> list[Executor]:
    """The workers that executors are made of, each once."""
    found = [one.parts if isinstance(one, BesideGenerator) else [one] for one in executors]
    return list({id(part): part for parts in found for part in parts}.values())


def n_generators(executors: Sequence[Executor]) -> int:
    """How many batches can be generated at the same time."""
    found = (one.shared if isinstance(one, BesideGenerator) else one for one in executors)
    return len({id(one) for one in found})


def engines_beside(choices: EngineChoices, device: str) -> EngineChoices:
    """The engines of a worker beside a generator: on this device, with the threads of its environment."""

    def changed(wanted: Wanted) -> Wanted:
        choice, settings = wanted
        return choice, replace(settings, device=device, threads=None)

    embedder, generator, rater = choices
    return changed(embedder), generator, rater and changed(rater)
