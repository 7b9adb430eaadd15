"""From a folder to files that are ready. A scan is the truth; events only say when to look.

Ready means that nobody has written to a file for `settle_s`: its size, mtime and inode have not
changed for that long. On a local disk the file's own times can prove it at the first look (ctime
too, which no copy sets back); elsewhere only two looks of our own that far apart do. Where the
system can tell, a file that somebody has open for writing isn't ready however long it rests.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.fs.names import printable
from pipeline.fs.walk import Found, Walk
from pipeline.intake.ignore import Ignore, still_downloading

log = logging.getLogger("pipeline")

DONE, FAILED = "done", "failed"  # reserved in the inbox, never scanned
SNIFF_BYTES = 64
COARSE_S = 2.0  # the coarsest times of a file system: FAT's; others without fractions count in seconds
NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Rules:
    """What a scan leaves out, and what it waits for."""

    ignore: tuple[str, ...] = ()  # besides what is always ignored: see pipeline.intake.ignore
    marker: str | None = None  # ".done": name.wav is whole once name.wav.done is there
    follow_symlinks: bool = False  # to what lies below the scanned folder; never out of it
    is_inbox: bool = True  # `done` and `failed` are reserved; everything is taken, audio or not


@dataclass(frozen=True)
class ScannedFile:
    """A regular file as a scan saw it."""

    path: Path
    display: str  # below the scanned folder, printable
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int = 0
    marked: bool = True  # False: its marker isn't there yet, or a download tool's own file still is
    linked: Path | None = None  # the file itself, if a symbolic link was followed to it

    @property
    def to_open(self) -> Path:
        """Where the bytes are; no part of it below the scanned folder was a link."""
        return self.path if self.linked is None else self.linked

    @property
    def changed_s(self) -> float:
        """When it was last written to or renamed, as far as its times tell."""
        return max(self.mtime_ns, self.ctime_ns) / NS_PER_S

    @property
    def granularity_s(self) -> float:
        """How much later than that it may have been; times without a fraction come from a coarse clock."""
        return COARSE_S if self.mtime_ns % NS_PER_S == 0 == self.ctime_ns % NS_PER_S else 0.0

    def same_as(self, other: ScannedFile) -> bool:
        """Unchanged. ctime doesn't count: indexers, backups and other hard links change it all the time."""
        return self._identity() == other._identity()

    def _identity(self) -> tuple[int, int, int, int]:
        return self.size, self.mtime_ns, self.device, self.inode


@dataclass
class Settling:
    """Knows which files rest; remembers what was seen when, for those whose own times don't prove it."""

    settle_s: float
    trust_times: bool = True  # the files' times are of the clock that `now` is of
    _seen: dict[Path, tuple[ScannedFile, float]] = field(default_factory=dict)

    def is_settled(self, scanned: ScannedFile, now: float) -> bool:
        """Whether nobody has written to it for `settle_s`; `now` in seconds since the epoch."""
        wait_s = self.settle_s + scanned.granularity_s if self.settle_s > 0 else 0.0
        if self.trust_times and scanned.changed_s <= now - wait_s:
            return True
        before, since = self._seen.get(scanned.path, (None, now))
        if before is None or not before.same_as(scanned) or now < since:  # a clock set back starts anew
            since = now
            self._seen[scanned.path] = scanned, since
        return now - since >= wait_s

    def keep_only(self, paths: set[Path]) -> None:
        for gone in self._seen.keys() - paths:
            del self._seen[gone]


class Scanner:
    """Looks at one folder again and again; what is wrong there is logged once, not at every look."""

    def __init__(self, root: Path, rules: Rules) -> None:
        self.root = root
        self.rules = rules
        self._ignore = Ignore(rules.ignore)
        self._told: set[str] = set()

    def scan(self) -> Iterator[ScannedFile]:
        """Every regular file below the folder that may be a track, in the order of the names.

        Of a folder that isn't the inbox, only what begins or ends like audio is seen. What symbolic
        links lead to comes last, and only if it was not seen already.

        Raises:
            OSError: the folder itself can't be listed. Folders below it that vanish, or can't be
                read, don't hide the others.
        """
        problems: set[str] = set()
        walk = Walk(
            root=self.root,
            reserved=(DONE, FAILED) if self.rules.is_inbox else (),
            follow_symlinks=self.rules.follow_symlinks,
            is_left_out=self._ignore.matches,
            is_wanted=self._is_wanted,
            tell=lambda shown, what: self._tell(f"{printable(shown)}: {what}", problems),
        )
        for found in walk.files():
            yield self._sighting(found, problems)
        self._told &= problems  # what was mended and comes again is told again

    def _is_wanted(self, name: str, folder_fd: int) -> bool:
        if self.rules.marker is not None and name.endswith(self.rules.marker):
            return False
        return self.rules.is_inbox or _may_be_audio(name, folder_fd)

    def _sighting(self, found: Found, problems: set[str]) -> ScannedFile:
        place, stat = found.place, found.stat
        real = "/".join(place.real)
        return ScannedFile(
            path=self.root / place.shown,
            display=printable(place.shown),
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            ctime_ns=stat.st_ctime_ns,
            inode=stat.st_ino,
            device=stat.st_dev,
            marked=self._is_marked(found, problems),
            linked=None if real == place.shown else self.root / real,
        )

    def _is_marked(self, found: Found, problems: set[str]) -> bool:
        name = found.place.real[-1]
        if self.rules.marker is not None and name + self.rules.marker not in found.siblings:
            return False
        sign = still_downloading(name, found.stat.st_size, found.siblings)
        if sign is not None:
            shown = printable(found.place.shown)
            self._tell(f"{shown}: left alone while {printable(sign)} says that it is being written", problems)
        return sign is None

    def _tell(self, problem: str, problems: set[str]) -> None:
        problems.add(problem)
        if problem not in self._told:
            self._told.add(problem)
            log.warning("%s", problem)


def has_writer(path: Path) -> bool:
    """Whether somebody has the file open for writing, as far as the system tells.

    Linux grants a read lease only on a file that nobody has open for writing (F_SETLEASE in
    fcntl(2)). It is dropped at once. Without leases the answer is no, and time alone decides: on
    other systems, on NFS and FUSE, and for other users' files without CAP_LEASE. A file that was
    closed but is still mapped for writing counts; writers on another machine don't.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        return e.errno == errno.EWOULDBLOCK  # a file server has a write lease on it: an oplock
    try:
        # Whoever opens the file for writing in this instant waits until the lease is gone, and we
        # are sent a signal: SIGIO, which ends a process, unless another is asked for.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as e:
        return e.errno == errno.EAGAIN
    finally:
        os.close(fd)
    return False


def _may_be_audio(name: str, folder_fd: int) -> bool:
    """By its ending or by its first bytes."""
    from pipeline import audio

    if audio.looks_like_audio(b"", name):
        return True
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder_fd)
        with os.fdopen(fd, "rb") as file:
            return audio.looks_like_audio(file.read(SNIFF_BYTES), name)
    except OSError:
        return False
