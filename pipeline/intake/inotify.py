"""An inotify instance that knows when it may have missed something. Linux only; see inotify(7).

watchdog's own reads on without a word when a subfolder can't be watched for want of watches, when the
root's watch is dropped by the kernel (folder removed and made again, file system unmounted and mounted
again), and when its queue overflows. `Feed` notes each of these.
"""

from __future__ import annotations

import errno
import logging
import os

from watchdog.observers.api import BaseObserver
from watchdog.observers.inotify import InotifyEmitter
from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchCallback,
    WatchDescriptor,
)

log = logging.getLogger("pipeline")


class Feed(InotifyFD):
    """One for the whole run: only the watches on it come and go.

    Making one takes a slot of `fs.inotify.max_user_instances`, and one that is stopped before its
    thread has begun to read leaks its descriptors (watchdog 7.1).
    """

    def __init__(self) -> None:
        super().__init__()
        self.missed: str | None = None  # why events may have been missed since `begin`
        self.is_partial = False  # some subfolder is not watched, for want of watches
        self._root: bytes | None = None
        self._root_watch: int | None = None

    def begin(self, root: str) -> None:
        """Forget what was missed; the watches to come are those of `root`."""
        self._root, self._root_watch = os.fsencode(root), None
        self.missed, self.is_partial = None, False

    def add_callback(
        self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId
    ) -> WatchDescriptor:
        """As watchdog's. Raises OSError also for a folder that can't be read, which watchdog passes over."""
        if not os.access(path, os.R_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), os.fsdecode(path))
        try:
            watch = super().add_callback(path, mask, callback, id_)
        except OSError as e:
            self.is_partial = self.is_partial or e.errno == errno.ENOSPC
            raise
        if path == self._root:
            self._root_watch = watch
        return watch

    def handle_event(self, event: InotifyEvent) -> None:
        """As watchdog's, but an error costs one event and not the thread."""
        if event.is_queue_overflow:
            self.missed = "more changed at once than the system could report"
        elif event.mask & InotifyConstants.IN_UNMOUNT:
            self.missed = "a file system was unmounted"
        elif event.is_ignored and event.wd == self._root_watch and self.missed is None:
            self.missed = "the folder was removed"
        try:
            super().handle_event(event)
        except Exception as e:
            log.exception("an inotify event could not be handled")
            self.missed = f"an event could not be handled ({e!r})"


def observer_on(feed: Feed) -> BaseObserver:
    """An observer that reads from `feed` and leaves it running when it is stopped."""
    return BaseObserver(InotifyEmitter, inotify_fd=feed)
