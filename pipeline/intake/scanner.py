"""The files of one folder that may be tracks. Events only say when to scan; the scan is the truth."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.fs.copying import FileIdentity
from pipeline.fs.names import printable
from pipeline.fs.walk import FoundFile, Walk
from pipeline.intake.ignore import Ignore, still_downloading
from pipeline.workspace import DONE, FAILED

log = logging.getLogger("pipeline")

SNIFF_BYTES = 64
COARSE_S = 2.0  # the coarsest file times are FAT's; other file systems without fractions count seconds
NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class ScanRules:
    """What a scan leaves out, and what it waits for."""

    ignore: tuple[str, ...] = ()  # in addition to what is always ignored: see pipeline.intake.ignore
    marker: str | None = None  # ".done": name.wav is complete once name.wav.done exists
    follow_symlinks: bool = False  # only to files and folders below the scanned folder
    is_inbox: bool = True  # `done` and `failed` are reserved, and every file is taken, audio or not


@dataclass(frozen=True)
class ScannedFile:
    """A regular file at the time of a scan."""

    path: Path
    display: str  # the path below the scanned folder, printable
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int = 0
    marked: bool = True  # False: its marker is missing, or a download tool's own file is still there
    link_target: Path | None = None  # the file itself, if `path` leads through a symbolic link

    @property
    def real_path(self) -> Path:
        """The path to open; no part of it below the scanned folder was a link."""
        return self.path if self.link_target is None else self.link_target

    @property
    def identity(self) -> FileIdentity:
        return FileIdentity(self.size, self.mtime_ns, self.inode)

    @property
    def changed_s(self) -> float:
        """When it was last written to or renamed, according to its own times."""
        return max(self.mtime_ns, self.ctime_ns) / NS_PER_S

    @property
    def granularity_s(self) -> float:
        """How much later than `changed_s` the change may have been: times without fractions are coarse."""
        return COARSE_S if self.mtime_ns % NS_PER_S == 0 == self.ctime_ns % NS_PER_S else 0.0

    def same_as(self, other: ScannedFile) -> bool:
        """Unchanged. The ctime is not compared: indexers, backups and new hard links change it."""
        return (self.identity, self.device) == (other.identity, other.device)


class Scanner:
    """Scans one folder repeatedly; a problem is logged once, not at every scan."""

    def __init__(self, root: Path, rules: ScanRules) -> None:
        self.root = root
        self.rules = rules
        self._ignore = Ignore(rules.ignore)
        self._logged: set[str] = set()

    def scan(self) -> Iterator[ScannedFile]:
        """Every regular file below the folder that may be a track, in the order of the names.

        In a folder that is not the inbox, only files that begin or end like audio count. The targets
        of symbolic links come last, without those that were found already.

        Raises:
            OSError: the folder itself can't be listed. A folder below it that vanishes or can't be
                read does not hide the others.
        """
        problems: set[str] = set()
        walk = Walk(
            root=self.root,
            reserved=(DONE, FAILED) if self.rules.is_inbox else (),
            follow_symlinks=self.rules.follow_symlinks,
            is_ignored=self._ignore.matches,
            is_wanted=self._is_wanted,
            report=lambda shown, problem: self._report(f"{printable(shown)}: {problem}", problems),
        )
        for found in walk.files():
            yield self._scanned(found, problems)
        self._logged &= problems  # a problem that goes away and comes back is logged again

    def _is_wanted(self, name: str, folder_fd: int) -> bool:
        if self.rules.marker is not None and name.endswith(self.rules.marker):
            return False
        return self.rules.is_inbox or _may_be_audio(name, folder_fd)

    def _scanned(self, found: FoundFile, problems: set[str]) -> ScannedFile:
        place, stat = found.place, found.stat
        return ScannedFile(
            path=self.root / place.shown,
            display=printable(place.shown),
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            ctime_ns=stat.st_ctime_ns,
            inode=stat.st_ino,
            device=stat.st_dev,
            marked=self._is_marked(found, problems),
            link_target=self.root.joinpath(*place.real) if place.is_linked else None,
        )

    def _is_marked(self, found: FoundFile, problems: set[str]) -> bool:
        name = found.place.real[-1]
        if self.rules.marker is not None and name + self.rules.marker not in found.siblings:
            return False
        sign = still_downloading(name, found.stat.st_size, found.siblings)
        if sign is not None:
            problem = f"left alone while {printable(sign)} says that it is being written"
            self._report(f"{printable(found.place.shown)}: {problem}", problems)
        return sign is None

    def _report(self, problem: str, problems: set[str]) -> None:
        problems.add(problem)
        if problem not in self._logged:
            self._logged.add(problem)
            log.warning("%s", problem)


def _may_be_audio(name: str, folder_fd: int) -> bool:
    """By the ending of its name or by its first bytes."""
    from pipeline import audio

    if audio.looks_like_audio(b"", name):
        return True
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder_fd)
        with os.fdopen(fd, "rb") as file:
            return audio.looks_like_audio(file.read(SNIFF_BYTES), name)
    except OSError:
        return False
