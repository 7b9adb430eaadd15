"""Wakes the service when something changes below a folder, and reports when it can't.

Events only say when to scan; the periodic scan finds everything. So waking too often does no harm,
and a change that watchdog does not report is found by the next periodic scan. Whenever watching
begins anew the service is woken, since earlier changes were not seen.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import os_reason

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver

log = logging.getLogger("pipeline")

LIMITS = {  # the reason of a refusal, by errno
    errno.ENOSPC: "the limit fs.inotify.max_user_watches is reached",
    errno.EMFILE: "the limit fs.inotify.max_user_instances or that of open files is reached",
}


def _started(root: str, wake: Callable[[], None]) -> BaseObserver:
    """Call `wake` for every kind of change, but not when a file is opened or read, as a scan does."""
    from watchdog import events
    from watchdog.observers import Observer

    class Handler(events.FileSystemEventHandler):
        def dispatch(self, event: events.FileSystemEvent) -> None:
            wake()

    changes = [
        getattr(events, kind + change)
        for kind in ("File", "Dir")
        for change in ("CreatedEvent", "ModifiedEvent", "MovedEvent", "DeletedEvent", "AttribEvent")
    ]
    observer = Observer()
    try:
        observer.schedule(Handler(), root, recursive=True, event_filter=[*changes, events.FileClosedEvent])
        observer.start()
    except BaseException:
        observer.stop()
        raise
    return observer


class Watcher:
    """Watches the folder `root`, which may vanish, come back and be replaced. Used from one thread."""

    def __init__(self, root: Path, wake: Callable[[], None], *, polling: bool) -> None:
        """`polling`: use no events. `wake` is called from any thread."""
        self.root = root
        self._wake = wake
        self._without_events = polling
        self._observer: BaseObserver | None = None  # while the folder is watched
        self._identity: tuple[int, int] | None = None  # of the watched folder

    @property
    def polling(self) -> bool:
        """Whether the folder has to be polled now, as its changes make no events."""
        return self._observer is None

    def check(self) -> str | None:
        """Begin to watch, or go on after the watch was lost; returns what prevents it, in a sentence."""
        if self._without_events:
            return None
        try:
            identity = _identity(self.root)
        except OSError as e:
            self.stop()
            return f"{self.root} can't be watched: {os_reason(e)}"
        if self._observer is not None and (identity != self._identity or not _is_alive(self._observer)):
            log.warning("changes in %s may have been missed, so it is scanned again", self.root)
            self.stop()
        return self._watch(identity) if self._observer is None else None

    def stop(self) -> None:
        """Stop watching, and end the observer's threads."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None

    def _watch(self, identity: tuple[int, int]) -> str | None:
        """Begin to watch; returns why the system refused it."""
        try:
            # The real path, since inotify would watch a link itself.
            self._observer = _started(os.path.realpath(self.root), self._wake)
        except (OSError, RuntimeError) as e:  # RuntimeError: no thread could be started
            reason = LIMITS.get(getattr(e, "errno", None) or 0, str(e))
            return f"{self.root} gives no events and is polled instead: {reason}"
        self._identity = identity
        self._wake()
        return None


def _is_alive(observer: BaseObserver) -> bool:
    """Whether all threads of the observer run; that of a folder which was removed has ended."""
    return observer.is_alive() and all(emitter.is_alive() for emitter in observer.emitters)


def _identity(root: Path) -> tuple[int, int]:
    """Device and inode of the folder. Raises OSError if it can't be listed or entered."""
    os.scandir(root).close()
    (root / "..").stat()  # needs the permission to enter the folder
    found = root.stat()
    return found.st_dev, found.st_ino
