"""Several batches at the same time, each in a thread of the owner with a worker of its own.

The threads mostly wait for their workers. Each has its own connection to the database.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from pipeline.errors import DiskFull
from pipeline.executors.base import Executor
from pipeline.runner.runner import Runner
from pipeline.store.schema import Track


@dataclass(kw_only=True)
class NormalizingRunner(Runner):
    """Normalizes the tracks of the next batch while the engines are busy with another one."""

    def next_track(self) -> Track | None:
        """The first track of the next batch that is not normalized yet."""
        now = self.clock()
        for track in self.store.due(self.recipe.config.generate.batch_tracks, self.folder, now=now):
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

    executors: Sequence[Executor]
    normalizer: Executor | None = None  # normalizes ahead, where one batch at a time takes long
    wake: Callable[[], None]  # called in another thread whenever a batch has ended
    _runners: list[Runner] = field(default_factory=list)
    _free: list[Runner] = field(default_factory=list)
    _error: BaseException | None = None  # the first one that ended a batch
    _unclaimed: set[int] = field(default_factory=set)  # ids of runners that have not claimed a batch yet
    _n_busy: int = 0
    _n_ended: int = 0
    _is_closing: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)  # guards the seven above

    def __post_init__(self) -> None:
        shared = {one.name: getattr(self, one.name) for one in fields(Runner) if one.init}
        shared |= {"n_parallel": len(self.executors), "should_stop": self._is_stopped}
        kinds = [(Runner, executor) for executor in self.executors]
        if self.normalizer:
            kinds.append((NormalizingRunner, self.normalizer))
        for kind, executor in kinds:
            own = {"executor": executor, "reporter": self.reporter.another()}
            self._runners.append(kind(**{**shared, **own}))
        self._free += self._runners

    def _is_stopped(self) -> bool:
        return self._is_closing or self.should_stop()

    @property
    def is_busy(self) -> bool:
        return self._n_busy > 0

    @property
    def has_room(self) -> bool:
        is_limited = self.was_disk_full and self.is_busy
        return self._error is None and not is_limited and any(map(self._takes_batches, self._free))

    @property
    def has_error(self) -> bool:
        return self._error is not None

    def workers(self) -> list[dict[str, Any]]:
        return [facts for runner in self._runners for facts in runner.workers()]

    def drain(self) -> bool:
        """See `Runner.drain`."""
        worked, n_ended = False, self._n_ended
        while self.next_batch():
            worked = True
            with self._changed:
                while self._n_ended == n_ended:
                    self._changed.wait()
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
        while self.has_room and self._has_unclaimed_tracks():
            self._start(next(filter(self._takes_batches, self._free)))
        if not self.has_room and not (self._unclaimed or self.was_disk_full or self.has_error):
            for runner in self._free:
                if isinstance(runner, NormalizingRunner) and runner.next_track():
                    self._start(runner)
        return self.is_busy or self.has_error

    def _start(self, runner: Runner) -> None:
        with self._changed:
            self._free.remove(runner)
            self._n_busy += 1
            self._unclaimed.add(id(runner))
        runner.was_disk_full = self.was_disk_full
        runner.on_claimed = partial(self._unclaimed.discard, id(runner))
        threading.Thread(target=self._process_batch, args=[runner], daemon=True).start()

    @staticmethod
    def _takes_batches(runner: Runner) -> bool:
        return not isinstance(runner, NormalizingRunner)

    def _has_unclaimed_tracks(self) -> bool:
        """Whether more tracks are due than there are runners about to claim some."""
        n = len(self._unclaimed)
        return len(self.store.due(n + 1, self.folder, now=self.clock())) > n

    def _process_batch(self, runner: Runner) -> None:
        error: BaseException | None = None
        try:
            runner.try_batch()
            self.store.disconnect()
        except BaseException as e:  # raised in the main thread by `next_batch`
            error = e
        runner.reporter.idle()
        with self._changed:
            self._unclaimed.discard(id(runner))
            self._n_busy -= 1
            self._n_ended += 1
            self._free.append(runner)
            if error is None:
                self.was_disk_full = False
            elif self._error is None:
                self._error = error
            self._changed.notify_all()
        self.wake()

    def release_if_idle(self) -> None:
        for runner in self._runners:
            runner.executor.release_if_idle()

    def close(self) -> None:
        self._is_closing = True
        with self._changed:
            self._changed.wait_for(lambda: not self.is_busy)
        for runner in self._runners:
            runner.executor.close()
