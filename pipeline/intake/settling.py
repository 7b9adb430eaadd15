"""When a file is ready: nobody has written to it for `settle_s`, and nobody has it open for writing.

Nobody has written to a file if its size, mtime and inode have not changed for that long. On a local
disk the file's own times can prove this at the first scan (ctime too, which no copying tool sets
back). Elsewhere only two scans that far apart can.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.fs.copying import FileIdentity
from pipeline.intake.scanner import ScannedFile

PATIENCE = 5  # a file that can't be used is tried again until it has been unchanged for 5 * settle_s


@dataclass
class Settling:
    """Tells which files are settled; remembers earlier scans of files whose own times do not prove it."""

    settle_s: float
    trust_times: bool = True  # whether the clock that sets the files' times is the clock of `now`
    _seen: dict[Path, tuple[tuple[FileIdentity, int], float]] = field(default_factory=dict)

    def is_settled(self, scanned: ScannedFile, now: float) -> bool:
        """Whether nobody has written to the file for `settle_s`; `now` in seconds since the epoch."""
        wait_s = self.settle_s + scanned.granularity_s if self.settle_s > 0 else 0.0
        if self.trust_times and scanned.changed_s <= now - wait_s:
            return True
        current = scanned.identity, scanned.device  # not the ctime, which indexers, backups and links change
        before, since = self._seen.get(scanned.path, (None, now))
        if before != current or now < since:  # now < since: a clock was set back
            since = now
            self._seen[scanned.path] = current, since
        return now - since >= wait_s

    def keep_only(self, paths: set[Path]) -> None:
        """Forget the files that are not among `paths`."""
        for gone in self._seen.keys() - paths:
            del self._seen[gone]


def has_writer(path: Path) -> bool:
    """Whether a process of this machine has the file open for writing, as far as the system reports it.

    Linux grants a read lease only on a file that nobody has open for writing (F_SETLEASE in
    fcntl(2)). The lease is dropped at once. A file that was closed but is still mapped for writing
    counts as open. Without leases the answer is no: on other systems, on NFS and FUSE, and for other
    users' files without CAP_LEASE.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        return e.errno == errno.EWOULDBLOCK  # a file server has a write lease on it: an oplock
    try:
        # A process that opens the file for writing now has to wait for the end of the lease, and
        # this process gets a signal: SIGIO by default, which would end it, so another one is set.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as e:
        return e.errno == errno.EAGAIN
    finally:
        os.close(fd)
    return False
