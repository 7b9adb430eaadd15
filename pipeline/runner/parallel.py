"""Several batches at the same time, each in a thread of the owner with a worker of its own.

The threads mostly wait for their workers. Each has its own connection to the database.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from pipeline.errors import DiskFull
from pipeline.executors.base import Executor, Executors, WorkerAway
from pipeline.executors.beside import n_generators
from pipeline.runner.runner import Runner
from pipeline.store.schema import Track

LOOK_AGAIN_S = 5.0  # for workers that have become ready while others work

log = logging.getLogger("pipeline")


@dataclass(kw_only=True)
class NormalizingRunner(Runner):
    """Normalizes the tracks of the next batches while the engines are busy."""

    makes: ClassVar[bool] = False

    def next_track(self) -> Track | None:
        """The first track of the next batches that is not normalized yet."""
        n_next = self.recipe.config.generate.batch_tracks * self.n_parallel
        for track in self.store.due(n_next, self.folder, now=self.clock()):
            if not track.solo and self.store.unit(self.recipe.plan(track.sha256).normalize_key) is None:
                return track
        return None

    def _claim_and_process(self) -> bool:
        self._batch_size()  # raises if the disk is full
        track = self.next_track()
        claimed = self.store.claim([] if track is None else [track])
        self.on_claimed()
        with self.processing(claimed) as jobs:
            self._normalize(jobs)
            self.attempts.put_back(jobs)
        return bool(claimed)


@dataclass(kw_only=True)
class ParallelRunner(Runner):
    """A runner that hands batches to one runner per executor, and does not wait for them."""

    executors: Executors
    wake: Callable[[], None]  # called in another thread whenever a batch has ended
    _runners: dict[int, Runner] = field(default_factory=dict)  # by the id of their executor
    _ready: list[Executor] = field(default_factory=list)  # as of the last time that there was work
    _busy: set[int] = field(default_factory=set)  # ids of executors that work on a batch
    _error: BaseException | None = None  # the first one that ended a batch
    _unclaimed: set[int] = field(default_factory=set)  # those that have not claimed a batch yet, likewise
    _n_ended: int = 0
    _is_closing: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)  # guards the five above

    def _is_stopped(self) -> bool:
        return self._is_closing or self.should_stop()

    @property
    def is_busy(self) -> bool:
        return bool(self._busy)

    @property
    def has_room(self) -> bool:
        return self._may_start() and not self._is_full

    @property
    def has_error(self) -> bool:
        return self._error is not None

    def workers(self) -> list[dict[str, Any]]:
        ids = [*map(id, self._ready), *map(id, self.executors.normalizers())]
        runners = [self._runners[key] for key in ids if key in self._runners]
        return [facts for runner in runners for facts in runner.workers()]

    def drain(self) -> bool:
        """See `Runner.drain`."""
        worked, n_ended = False, self._n_ended
        while self.next_batch():
            worked = True
            with self._changed:
                if self._n_ended == n_ended:
                    self._changed.wait(LOOK_AGAIN_S)
                n_ended = self._n_ended
        return worked

    def next_batch(self) -> bool:
        """Start batches on the free workers; whether any is being processed now.

        Raises what `Runner.next_batch` raises in one of the threads, once no other batch is being processed.
        """
        if self._error is not None:
            if self.is_busy:
                return True
            error, self._error = self._error, None
            if not isinstance(error, DiskFull) or self.was_disk_full:
                raise error
            self.was_disk_full = True
            self.free_space()
        self.next_due()  # ends waits that are longer than any that is set
        while self._may_start() and self._has_unclaimed_tracks() and (runner := self._free()):
            self._start(runner)
        if self._may_start() and self._is_full and not (self._unclaimed or self.was_disk_full):
            for executor in self.executors.normalizers():
                runner = self._runner_of(executor, NormalizingRunner)
                is_free = id(executor) not in self._busy
                if is_free and isinstance(runner, NormalizingRunner) and runner.next_track():
                    self._start(runner)
                    break
        return self.is_busy or self.has_error

    def _start(self, runner: Runner) -> None:
        key = id(runner.executor)
        with self._changed:
            self._busy.add(key)
            self._unclaimed.add(key)
        runner.was_disk_full = self.was_disk_full
        runner.on_claimed = partial(self._unclaimed.discard, key)
        threading.Thread(target=self._process_batch, args=[runner], daemon=True).start()

    def _may_start(self) -> bool:
        return self._error is None and not (self.was_disk_full and self.is_busy)

    @property
    def _is_full(self) -> bool:
        """Whether all executors that were ready work on a batch."""
        return bool(self._ready) and all(id(executor) in self._busy for executor in self._ready)

    def _free(self) -> Runner | None:
        """A runner without a batch whose executor is ready; first those that have engines."""
        self._ready = sorted(self.executors.ready(), key=lambda one: not one.loaded)
        executor = next((one for one in self._ready if id(one) not in self._busy), None)
        return None if executor is None else self._runner_of(executor, Runner)

    def _runner_of(self, executor: Executor, kind: type[Runner]) -> Runner:
        if id(executor) not in self._runners:
            shared = {one.name: getattr(self, one.name) for one in fields(Runner) if one.init}
            own = {
                "executor": executor,
                "reporter": self.reporter.another(),
                "should_stop": self._is_stopped,
            }
            self._runners[id(executor)] = kind(**{**shared, **own})
        runner = self._runners[id(executor)]
        runner.n_parallel = n_generators(self._ready)
        runner.n_sharing = len(self._ready) // runner.n_parallel
        return runner

    def _has_unclaimed_tracks(self) -> bool:
        """Whether more tracks are due than there are runners about to claim some.

        A worker that is being started, which may wait for a place, keeps no track from one that has engines.
        """
        unclaimed = list(self._unclaimed)
        if any(one.loaded and id(one) not in self._busy for one in self._ready):
            unclaimed = [key for key in unclaimed if self._runners[key].executor.loaded]
        n = len(unclaimed)
        return len(self.store.due(n + 1, self.folder, now=self.clock())) > n

    def _process_batch(self, runner: Runner) -> None:
        error: BaseException | None = None
        try:
            try:
                runner.try_batch()
            except WorkerAway as e:
                log.warning("%s; the tracks are queued again", e)
            self.store.disconnect()
        except BaseException as e:  # raised in the main thread by `next_batch`
            error = e
        with self._changed:
            self._unclaimed.discard(id(runner.executor))
            self._busy.discard(id(runner.executor))
            self._n_ended += 1
            if error is None:
                self.was_disk_full = False
            elif self._error is None:
                self._error = error
            self._changed.notify_all()
        self.wake()

    def release_if_idle(self) -> None:
        self.executors.release_if_idle()

    def close(self) -> None:
        self._is_closing = True
        with self._changed:
            self._changed.wait_for(lambda: not self.is_busy)
        self.executors.close()
