"""Several batches at the same time, each in a thread of the owner with a worker of its own.

The threads mostly wait for their workers. Each has its own connection to the database.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

from pipeline.errors import DiskFull
from pipeline.executors.base import Executor
from pipeline.runner.runner import Runner


@dataclass(kw_only=True)
class ParallelRunner(Runner):
    """A runner that hands batches to one runner per executor, and does not wait for them."""

    executors: Sequence[Executor]
    wake: Callable[[], None]  # called in another thread whenever a batch has ended
    _free: list[Runner] = field(default_factory=list)
    _error: BaseException | None = None  # the first one that ended a batch
    _unclaimed: set[int] = field(default_factory=set)  # ids of runners that have not claimed a batch yet
    _n_busy: int = 0
    _n_ended: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)  # guards the five above

    def __post_init__(self) -> None:
        shared = {one.name: getattr(self, one.name) for one in fields(Runner) if one.init}
        for executor in self.executors:
            own = {
                "executor": executor,
                "reporter": self.reporter.another(),
                "n_parallel": len(self.executors),
            }
            self._free.append(Runner(**{**shared, **own}))

    @property
    def is_busy(self) -> bool:
        return self._n_busy > 0

    @property
    def has_error(self) -> bool:
        return self._error is not None

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
        while self._has_room() and self._has_unclaimed_tracks():
            with self._changed:
                runner = self._free.pop()
                self._n_busy += 1
                self._unclaimed.add(id(runner))
            runner.was_disk_full = self.was_disk_full
            runner.on_claimed = partial(self._unclaimed.discard, id(runner))
            threading.Thread(target=self._process_batch, args=[runner], daemon=True).start()
        return self.is_busy or self.has_error

    def _has_room(self) -> bool:
        return bool(self._free) and self._error is None and not (self.was_disk_full and self.is_busy)

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
        for executor in self.executors:
            executor.release_if_idle()

    def close(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self.is_busy)
        for executor in self.executors:
            executor.close()
