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


class _OverflowHandler(logging.Handler):
    """Notices an overflow of the system's event queue, which watchdog only logs."""

    occurred = False

    def emit(self, record: logging.LogRecord) -> None:
        if "overflow" in record.getMessage():
            self.occurred = True


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
    """Watches the folder `root`, which may vanish, come back and be replaced. Used from one thread.

    One watchdog observer serves the whole run and only its watches change, since every new observer
    takes an inotify instance, of which the system has few.
    """

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
        self._observer: BaseObserver | None = None
        self._overflow = _OverflowHandler()
        self._is_watching = False
        self._identity: tuple[int, int] | None = None  # of the folder at the last check
        self._refused: str | None = None  # why the system refused to watch the folder
        self._retry_at = 0.0  # when to try again after that

    @property
    def polling(self) -> bool:
        """Whether the folder has to be polled now, as its changes make no events."""
        return not self._is_watching

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
            self._release()
            self._identity = self._refused = None
            return f"{self.root} can't be watched: {os_reason(e)}"
        lost = self._lost(identity)
        if lost is not None or self._identity is None:
            self._release()
            self._refused = None
            self._wake()
        self._identity = identity
        if not self._without_events and not self._is_watching:
            self._watch()
        if lost is not None and self._refused is None:
            return f"changes in {self.root} may have been missed: {lost}; it is scanned again"
        return self._refused

    def stop(self) -> None:
        """Stop watching, and end the observer's threads."""
        self._is_watching = False
        if self._observer is not None:
            logging.getLogger("watchdog").removeHandler(self._overflow)
            self._observer.stop()
            self._observer.join()
            self._observer = None

    def _lost(self, identity: tuple[int, int]) -> str | None:
        """Why changes may have been missed since the last check, or None."""
        if self._is_watching and self._observer is not None:
            emitters = self._observer.emitters
            if self._overflow.occurred:
                return "more changed at once than the system could report"
            if not (self._observer.is_alive() and emitters and all(each.is_alive() for each in emitters)):
                return "a thread of the observer has ended"
        if self._identity is not None and identity != self._identity:
            return "another folder took its place"
        return None

    def _watch(self) -> None:
        if self._refused is not None and self._clock() < self._retry_at:
            return
        self._refused, self._retry_at = None, self._clock() + RETRY_S
        try:
            observer = self._running_observer()
            self._overflow.occurred = False
            _schedule(observer, os.path.realpath(self.root), self._wake)  # inotify would watch a link itself
        except (OSError, RuntimeError) as e:  # RuntimeError: no thread could be started
            reason = LIMITS.get(getattr(e, "errno", None) or 0, str(e))
            log.debug("no events from %s", self.root, exc_info=True)
            self._refused = f"{self.root} gives no events and is polled instead: {reason}"
        else:
            self._is_watching = True
            self._wake()

    def _running_observer(self) -> BaseObserver:
        from watchdog.observers import Observer

        if self._observer is None or not self._observer.is_alive():
            self.stop()
            observer = Observer()
            observer.start()
            self._observer = observer
            logging.getLogger("watchdog").addHandler(self._overflow)
        return self._observer

    def _release(self) -> None:
        """Remove the watches."""
        self._is_watching = False
        if self._observer is not None:
            self._observer.unschedule_all()


def _identity(root: Path) -> tuple[int, int]:
    """Device and inode of the folder. Raises OSError if it can't be listed or entered."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.stat(".", dir_fd=folder)
    finally:
        os.close(folder)
    return found.st_dev, found.st_ino
