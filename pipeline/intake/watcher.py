"""Rings when something changes below a folder, and says when it can't.

Events are hints and a rescan is the truth, so all that matters here is to wake too often rather than
too seldom, and never to be silently deaf: whoever loops calls `check` and hears what is wrong. Whenever
watching begins anew it rings, for what came before was not seen.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import os_reason

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver

    from pipeline.intake.inotify import Feed

log = logging.getLogger("pipeline")

RETRY_S = 60.0  # between attempts to get events from a system that refused them
LIMITS = {  # what to raise when the system refuses
    errno.ENOSPC: "the limit fs.inotify.max_user_watches is reached",
    errno.EMFILE: "the limit fs.inotify.max_user_instances or that of open files is reached",
}


class FolderEvents:
    """watchdog on one folder and all below it; `watch` may be called again and again."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._feed: Feed | None = None  # Linux only
        self._observer: BaseObserver | None = None

    def watch(self, root: Path) -> None:
        """Begin, or begin anew. Raises OSError or RuntimeError if the system refuses; then nothing runs."""
        self.release()
        real = os.path.realpath(root)  # inotify would watch a link itself
        observer = self._new_observer(real)
        try:
            _schedule(observer, real, self._wake)
            observer.start()
        except BaseException:
            observer.stop()
            raise
        self._observer = observer

    @property
    def is_on(self) -> bool:
        return self._observer is not None

    @property
    def is_partial(self) -> bool:
        """Changes in some subfolder make no events, for want of watches."""
        return self._feed is not None and self._feed.is_partial

    def missed(self) -> str | None:
        """Why events may have been missed since `watch`, or None."""
        if self._observer is None:
            return None
        if self._feed is not None and self._feed.missed is not None:
            return self._feed.missed
        threads = [self._observer, *self._observer.emitters, *([self._feed] if self._feed else [])]
        if len(self._observer.emitters) == 0 or not all(thread.is_alive() for thread in threads):
            return "a thread of the observer has ended"
        return None

    def release(self) -> None:
        """Drop the watches."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None

    def close(self) -> None:
        self.release()
        if self._feed is not None:
            self._feed.stop()
            if self._feed.ident is not None:
                self._feed.join()
            self._feed = None

    def _new_observer(self, root: str) -> BaseObserver:
        if sys.platform != "linux":
            from watchdog.observers import Observer

            return Observer()
        from pipeline.intake.inotify import Feed, observer_on

        if self._feed is not None and self._feed.ident is not None and not self._feed.is_alive():
            self.close()
        if self._feed is None:
            self._feed = Feed()
        if self._feed.ident is None:  # new, or there was no thread to be had last time
            self._feed.start()
        self._feed.begin(root)
        return observer_on(self._feed)


def _schedule(observer: BaseObserver, root: str, wake: Callable[[], None]) -> None:
    """Have `wake` called for every kind of change. That a file was opened or read is none: we do that."""
    from watchdog import events

    class Ring(events.FileSystemEventHandler):
        def dispatch(self, event: events.FileSystemEvent) -> None:
            wake()

    changes = [
        getattr(events, kind + change)
        for kind in ("File", "Dir")
        for change in ("CreatedEvent", "ModifiedEvent", "MovedEvent", "DeletedEvent", "AttribEvent")
    ]
    observer.schedule(Ring(), root, recursive=True, event_filter=[*changes, events.FileClosedEvent])


class Watcher:
    """Keeps an eye on `root`, which may vanish, come back and be replaced. Used from one thread."""

    def __init__(
        self,
        root: Path,
        wake: Callable[[], None],
        *,
        polling: bool,
        clock: Callable[[], float] = time.monotonic,
        events: FolderEvents | None = None,
    ) -> None:
        """`polling`: no events at all, only see whether `root` is there. `wake` is called from any thread."""
        self.root = root
        self._wake = wake
        self._without_events = polling
        self._clock = clock
        self._events = events or FolderEvents(wake)
        self._identity: tuple[int, int] | None = None  # of the folder last seen there
        self._refused: str | None = None
        self._retry_at = 0.0  # counts while refused

    @property
    def polling(self) -> bool:
        """Whether the folder has to be polled now: not all changes below it make events."""
        return not self._events.is_on or self._refused is not None

    def start(self) -> None:
        """Begin to watch if that is possible now; what is in the way is what `check` then says."""
        self.check()

    def check(self) -> str | None:
        """What is wrong, in a sentence, or None. Heals what it can, so a loss is told once.

        Cheap, but for when it heals.
        """
        try:
            identity = _identity(self.root)
        except OSError as e:
            self._lose_root()
            return f"{self.root} can't be watched: {os_reason(e)}"
        lost = self._lost(identity)
        if lost is not None or self._identity is None:
            self._events.release()
            self._refused = None
            self._wake()
        self._identity = identity
        refused = None if self._without_events else self._watch()
        return refused or lost

    def stop(self) -> None:
        self._events.close()

    def _lose_root(self) -> None:
        if self._identity is not None:
            self._wake()
        self._events.release()
        self._identity = self._refused = None

    def _lost(self, identity: tuple[int, int]) -> str | None:
        reason = self._events.missed()
        if reason is None and self._identity is not None and identity != self._identity:
            reason = "another folder took its place"
        if reason is None:
            return None
        return f"changes in {self.root} may have been missed: {reason}; it is looked through anew"

    def _watch(self) -> str | None:
        """See that events come. Returns why they don't, or not from everywhere; None if all is well."""
        if self._events.is_on and not self._events.is_partial:
            self._refused = None
        elif self._refused is None or self._clock() >= self._retry_at:
            self._refused = self._begin()
            self._retry_at = self._clock() + RETRY_S
        return self._refused

    def _begin(self) -> str | None:
        try:
            self._events.watch(self.root)
        except (OSError, RuntimeError) as e:  # RuntimeError: no thread to be had
            reason = LIMITS.get(getattr(e, "errno", None) or 0, str(e))
            log.debug("no events from %s", self.root, exc_info=True)
            return f"{self.root} gives no events and is polled instead: {reason}"
        self._wake()
        if self._events.is_partial:
            reason = LIMITS[errno.ENOSPC]
            return f"some subfolders of {self.root} give no events and are polled instead: {reason}"
        return None


def _identity(root: Path) -> tuple[int, int]:
    """Device and inode of the folder. Raises OSError if it can't be listed or entered."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.stat(".", dir_fd=folder)
    finally:
        os.close(folder)
    return found.st_dev, found.st_ino
