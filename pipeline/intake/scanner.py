"""The files of one folder that may be tracks. Events only say when to scan; the scan is the truth.

A scan never leaves the folder. Each folder is opened in the open folder above it, never through a
symbolic link, and files are examined in the open folder (openat(2) and O_NOFOLLOW). So a folder that
is replaced by a link in the middle of a scan can't lead outside. A file may change between the scan
and its being opened: compare its identity then.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.config import Intake
from pipeline.errors import os_reason
from pipeline.fs.copying import FileIdentity
from pipeline.fs.files import Files, is_in_bucket
from pipeline.fs.names import printable
from pipeline.intake.ignore import Ignore, still_downloading
from pipeline.workspace import DONE, FAILED, InputFolder

log = logging.getLogger("pipeline")

SNIFF_BYTES = 64
COARSE_S = 2.0  # the coarsest file times are FAT's; other file systems without fractions count seconds
NS_PER_S = 1_000_000_000
MAX_FOLDER_BYTES = 4096 - 256 - 32  # of a path, so that a file's path below it, or in `failed`, still fits
MAX_DEPTH = 200  # nested folders; pathlib can't make much deeper ones
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # removed, or replaced by something else
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

FileId = tuple[int, int]  # device and inode


@dataclass(frozen=True)
class ScannedFile:
    """A regular file at the time of a scan."""

    path: Path
    real_path: Path  # the one to open: no part of it below the scanned folder was a link
    display: str  # the path below the scanned folder, printable
    identity: FileIdentity
    ctime_ns: int
    device: int = 0
    marked: bool = True  # False: its marker is missing, or a download tool's own file is still there

    @property
    def changed_s(self) -> float:
        """When it was last written to or renamed, according to its own times."""
        return max(self.identity.mtime_ns, self.ctime_ns) / NS_PER_S

    @property
    def granularity_s(self) -> float:
        """How much later than `changed_s` the change may have been: times without fractions are coarse."""
        return COARSE_S if self.identity.mtime_ns % NS_PER_S == 0 == self.ctime_ns % NS_PER_S else 0.0


@dataclass(frozen=True)
class Place:
    """A path relative to the scanned folder."""

    real: tuple[str, ...] = ()  # its parts; none of them is a link
    shown: str = ""  # the path by which the user reaches it; the same if no link was followed

    def below(self, name: str) -> Place:
        return Place((*self.real, name), f"{self.shown}/{name}" if self.shown else name)


class Scans(Protocol):
    """Lists the files of one folder that may be tracks, as often as wanted."""

    def scan(self) -> Iterator[ScannedFile]: ...


class BucketScanner:
    """Lists the objects of an inbox in a bucket. The listing is the truth, and is read page by page."""

    def __init__(self, files: Files, settings: Intake) -> None:
        self._files = files
        self._ignore = Ignore(settings.ignore)
        self._marker = settings.marker

    def scan(self) -> Iterator[ScannedFile]:
        """Every object that may be a track, in the order of the keys.

        Raises:
            FolderUnusable: the bucket can't be listed.
        """
        for entry in self._files.entries(self._files.root, without=(DONE, FAILED)):
            parts = entry.path.relative_to(self._files.root).parts
            shown = "/".join(parts)
            is_reserved = len(parts) == 1 and shown in (DONE, FAILED)  # such as the marker of an empty folder
            if not is_reserved and not self._is_ignored(parts):
                yield ScannedFile(entry.path, entry.path, printable(shown), entry.identity, ctime_ns=0)

    def _is_ignored(self, parts: tuple[str, ...]) -> bool:
        is_marker = self._marker is not None and parts[-1].endswith(self._marker)
        return is_marker or any(self._ignore.matches("/".join(parts[:n])) for n in range(1, len(parts) + 1))


def scanner_for(folder: InputFolder, settings: Intake, files: Files) -> Scans:
    """The scanner of an input folder with these files."""
    return BucketScanner(files, settings) if is_in_bucket(folder.path) else Scanner(folder, settings)


class Scanner:
    """Scans one folder repeatedly; a problem is logged once, not at every scan."""

    def __init__(self, folder: InputFolder, settings: Intake) -> None:
        self.root = folder.path
        self._is_inbox = folder.is_inbox  # then every file is taken, audio or not
        self._reserved = (DONE, FAILED) if folder.is_inbox else ()
        self._marker = settings.marker
        self._follow_symlinks = settings.follow_symlinks
        self._ignore = Ignore(settings.ignore)
        self._logged: set[str] = set()
        self._problems: set[str] = set()  # of this scan, as what follows
        self._visited: set[FileId] = set()  # no folder is entered twice, so there are no loops
        self._links: list[Place] = []

    def scan(self) -> Iterator[ScannedFile]:
        """Every regular file below the folder that may be a track, in the order of the names.

        In a folder that is not the inbox, only files that begin or end like audio count. The targets
        of symbolic links come last, without those that were found already.

        Raises:
            OSError: the folder itself can't be listed. A folder below it that vanishes or can't be
                read does not hide the others.
        """
        self._problems, self._visited, self._links = set(), set(), []
        found_ids: set[FileId] = set()
        root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in self._reserved:  # by identity, since some file systems take `Done` for `done`
                with suppress(OSError):  # it does not exist yet
                    self._visited.add(_id(os.stat(name, dir_fd=root_fd)))
            for found in self._below(root_fd, Place()):
                found_ids.add((found.device, found.identity.inode))
                yield found
            for link in self._links:  # grows when a link leads to a folder with links
                for found in self._follow(root_fd, link):
                    if (found.device, found.identity.inode) not in found_ids:
                        found_ids.add((found.device, found.identity.inode))
                        yield found
        finally:
            os.close(root_fd)
        self._logged &= self._problems  # a problem that goes away and comes back is logged again

    def _below(self, folder_fd: int, folder: Place) -> Iterator[ScannedFile]:
        if (folder_id := _id(os.fstat(folder_fd))) in self._visited:
            return
        self._visited.add(folder_id)
        names = sorted(os.listdir(folder_fd), key=os.fsencode)
        siblings = frozenset(names)
        for name in names:
            place = folder.below(name)
            if place.real[0] not in self._reserved and not self._ignore.matches(place.shown):
                yield from self._entry(folder_fd, place, siblings)

    def _entry(self, folder_fd: int, place: Place, siblings: frozenset[str]) -> Iterator[ScannedFile]:
        """One file, or the files of one folder; none if it is gone or can't be read."""
        name = place.real[-1]
        try:
            found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode) and self._follow_symlinks:
                self._links.append(place)
            elif stat.S_ISLNK(found.st_mode):
                self._report(place.shown, "is a symbolic link, left alone (see intake.follow_symlinks)")
            elif stat.S_ISDIR(found.st_mode) and self._is_too_deep(place):
                self._report(f"{place.shown[:60]}…", "is nested too deeply, so its files are left alone")
            elif stat.S_ISDIR(found.st_mode):
                with _opened(folder_fd, (name,)) as fd:
                    yield from self._below(fd, place)
            elif stat.S_ISREG(found.st_mode) and self._is_wanted(name, folder_fd):
                yield self._scanned(place, found, siblings)
        except OSError as e:
            if e.errno not in GONE:
                self._report(place.shown, f"can't be read: {os_reason(e)}")

    def _is_too_deep(self, folder: Place) -> bool:
        n_bytes = len(os.fsencode(f"{self.root}/{folder.shown}"))
        return len(folder.real) > MAX_DEPTH or n_bytes > MAX_FOLDER_BYTES

    def _is_wanted(self, name: str, folder_fd: int) -> bool:
        if self._marker is not None and name.endswith(self._marker):
            return False
        return self._is_inbox or _may_be_audio(name, folder_fd)

    def _follow(self, root_fd: int, link: Place) -> Iterator[ScannedFile]:
        """The files that a link leads to, if they lie below the scanned folder."""
        try:
            root = Path(os.path.realpath(self.root))
            target = Path(os.path.realpath(root.joinpath(*link.real), strict=True))
            if not target.is_relative_to(root):
                self._report(link.shown, "is a symbolic link that leads out of the folder, left alone")
                return
            place = Place(target.relative_to(root).parts, link.shown)
            if place.real and place.real[0] not in self._reserved:
                with _opened(root_fd, place.real[:-1]) as fd:
                    yield from self._entry(fd, place, frozenset(os.listdir(fd)))  # noqa: PTH208
        except OSError:
            self._report(link.shown, "is a symbolic link whose target can't be read")

    def _scanned(self, place: Place, found: os.stat_result, siblings: frozenset[str]) -> ScannedFile:
        return ScannedFile(
            path=self.root / place.shown,
            real_path=self.root.joinpath(*place.real),
            display=printable(place.shown),
            identity=FileIdentity.of(found),
            ctime_ns=found.st_ctime_ns,
            device=found.st_dev,
            marked=self._is_marked(place, found.st_size, siblings),
        )

    def _is_marked(self, place: Place, size: int, siblings: frozenset[str]) -> bool:
        name = place.real[-1]
        if self._marker is not None and name + self._marker not in siblings:
            return False
        sign = still_downloading(name, size, siblings)
        if sign is not None:
            self._report(place.shown, f"left alone while {printable(sign)} says that it is being written")
        return sign is None

    def _report(self, shown: str, problem: str) -> None:
        text = f"{printable(shown)}: {problem}"
        self._problems.add(text)
        if text not in self._logged:
            self._logged.add(text)
            log.warning("%s", text)


@contextmanager
def _opened(folder_fd: int, parts: tuple[str, ...]) -> Iterator[int]:
    """Open a folder below an open one, without following any link."""
    fd = os.open(".", OPEN_FOLDER, dir_fd=folder_fd)
    try:
        for part in parts:
            below = os.open(part, OPEN_FOLDER, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _id(found: os.stat_result) -> FileId:
    return found.st_dev, found.st_ino


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
