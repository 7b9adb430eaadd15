"""Wakes the service when something changes below a folder, and reports when it can't.

Events only say when to scan; the periodic scan finds everything. So waking too often does no harm,
and a change that watchdog does not report is found by the next periodic scan. Whenever watching
begins anew the service is woken, since earlier changes were not seen.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import os_reason

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver

log = logging.getLogger("pipeline")

RETRY_S = 60.0  # between attempts to watch a folder after the system refused
LIMITS = {  # the reason of a refusal, by errno
    errno.ENOSPC: "the limit fs.inotify.max_user_watches is reached",
    errno.EMFILE: "the limit fs.inotify.max_user_instances or that of open files is reached",
}


class FolderEvents:
    """Watches one folder and everything below it with watchdog; `watch` may be called repeatedly.

    One observer serves the whole run and only its watches change, since every new observer takes an
    inotify instance, of which the system has few.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._observer: BaseObserver | None = None
        self._overflow = _OverflowHandler()
        self.is_on = False

    def watch(self, root: Path) -> None:
        """Begin to watch. Raises OSError or RuntimeError if the system refuses; then nothing is watched."""
        self.release()
        if self._observer is None or not self._observer.is_alive():
            self.close()
            self._observer = _started_observer()
            logging.getLogger("watchdog").addHandler(self._overflow)
        self._overflow.occurred = False
        # The real path, as inotify would watch a link itself.
        _schedule(self._observer, os.path.realpath(root), self._wake)
        self.is_on = True

    def missed(self) -> str | None:
        """Why events may have been missed since `watch`, or None."""
        if self._observer is None or not self.is_on:
            return None
        if self._overflow.occurred:
            return "more changed at once than the system could report"
        emitters = self._observer.emitters
        if self._observer.is_alive() and emitters and all(emitter.is_alive() for emitter in emitters):
            return None
        return "a thread of the observer has ended"

    def release(self) -> None:
        """Remove the watches."""
        self.is_on = False
        if self._observer is not None:
            self._observer.unschedule_all()

    def close(self) -> None:
        self.is_on = False
        if self._observer is not None:
            logging.getLogger("watchdog").removeHandler(self._overflow)
            self._observer.stop()
            self._observer.join()
            self._observer = None


class _OverflowHandler(logging.Handler):
    """Notices an overflow of the system's event queue, which watchdog only logs."""

    occurred = False

    def emit(self, record: logging.LogRecord) -> None:
        if "overflow" in record.getMessage():
            self.occurred = True


def _started_observer() -> BaseObserver:
    from watchdog.observers import Observer

    observer = Observer()
    observer.start()
    return observer


def _schedule(observer: BaseObserver, root: str, wake: Callable[[], None]) -> None:
    """Call `wake` for every kind of change, but not when a file is opened or read, as a scan does."""
    from watchdog import events

    class Handler(events.FileSystemEventHandler):
        def dispatch(self, event: events.FileSystemEvent) -> None:
            wake()

    changes = [
        getattr(events, kind + change)
        for kind in ("File", "Dir")
        for change in ("CreatedEvent", "ModifiedEvent", "MovedEvent", "DeletedEvent", "AttribEvent")
    ]
    observer.schedule(Handler(), root, recursive=True, event_filter=[*changes, events.FileClosedEvent])


class Watcher:
    """Watches the folder `root`, which may vanish, come back and be replaced. Used from one thread."""

    def __init__(
        self,
        root: Path,
        wake: Callable[[], None],
        *,
        polling: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`polling`: use no events, only check that `root` is there. `wake` is called from any thread."""
        self.root = root
        self._wake = wake
        self._without_events = polling
        self._clock = clock
        self._events = FolderEvents(wake)
        self._identity: tuple[int, int] | None = None  # of the folder at the last check
        self._refused: str | None = None  # why the system refused to watch the folder
        self._retry_at = 0.0  # when to try again after that

    @property
    def polling(self) -> bool:
        """Whether the folder has to be polled now, as its changes make no events."""
        return not self._events.is_on

    def start(self) -> None:
        """Begin to watch if that is possible; `check` reports what prevents it."""
        self.check()

    def check(self) -> str | None:
        """What is wrong, in a sentence, or None. Repairs what it can, so a lost watch is reported once."""
        try:
            identity = _identity(self.root)
        except OSError as e:
            if self._identity is not None:
                self._wake()
            self._events.release()
            self._identity = self._refused = None
            return f"{self.root} can't be watched: {os_reason(e)}"
        lost = self._lost(identity)
        if lost is not None or self._identity is None:
            self._events.release()
            self._refused = None
            self._wake()
        self._identity = identity
        if not self._without_events and not self._events.is_on:
            self._watch()
        return self._refused or lost

    def stop(self) -> None:
        self._events.close()

    def _lost(self, identity: tuple[int, int]) -> str | None:
        reason = self._events.missed()
        if reason is None and self._identity is not None and identity != self._identity:
            reason = "another folder took its place"
        if reason is None:
            return None
        return f"changes in {self.root} may have been missed: {reason}; it is scanned again"

    def _watch(self) -> None:
        if self._refused is not None and self._clock() < self._retry_at:
            return
        self._refused, self._retry_at = None, self._clock() + RETRY_S
        try:
            self._events.watch(self.root)
        except (OSError, RuntimeError) as e:  # RuntimeError: no thread could be started
            reason = LIMITS.get(getattr(e, "errno", None) or 0, str(e))
            log.debug("no events from %s", self.root, exc_info=True)
            self._refused = f"{self.root} gives no events and is polled instead: {reason}"
        else:
            self._wake()


def _identity(root: Path) -> tuple[int, int]:
    """Device and inode of the folder. Raises OSError if it can't be listed or entered."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.stat(".", dir_fd=folder)
    finally:
        os.close(folder)
    return found.st_dev, found.st_ino
