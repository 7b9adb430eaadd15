"""Every file below a folder, without ever leaving that folder.

Each folder is opened from the top, part by part, none through a symbolic link, and files are examined
in the open folder (openat(2) and O_NOFOLLOW). So a folder that is replaced by a link in the middle of
a walk can't lead outside. A file may change between the walk and its being opened: compare its
identity then.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import os_reason

MAX_FOLDER_BYTES = 4096 - 256 - 32  # of a path, so that a file's path below it, or in `failed`, still fits
MAX_DEPTH = 200  # nested folders; pathlib can't make much deeper ones
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # removed, or replaced by something else

FileId = tuple[int, int]  # device and inode
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True)
class Place:
    """A path relative to the walked folder."""

    real: tuple[str, ...] = ()  # its parts; none of them is a link
    shown: str = ""  # the path by which the user reaches it; the same if no link was followed

    def below(self, name: str) -> Place:
        return Place((*self.real, name), f"{self.shown}/{name}" if self.shown else name)


@dataclass(frozen=True)
class FoundFile:
    """A regular file."""

    place: Place
    stat: os.stat_result
    siblings: frozenset[str]  # the names in its folder


@dataclass
class Walk:
    """One walk over everything below `root`."""

    root: Path
    reserved: tuple[str, ...]  # names directly in `root` that are skipped, also when a link leads to them
    follow_symlinks: bool  # only to what lies below `root`
    is_ignored: Callable[[str], bool]  # is given a path below `root`, of a file or a folder
    is_wanted: Callable[[str, int], bool]  # is given a regular file's name and its folder's descriptor
    report: Callable[[str, str], None]  # is given a path below `root` and what is wrong with it
    _visited: set[FileId] = field(default_factory=set)  # no folder is entered twice, so there are no loops
    _files: set[FileId] = field(default_factory=set)
    _links: list[Place] = field(default_factory=list)

    def files(self) -> Iterator[FoundFile]:
        """In the order of the names; the targets of links come last, without those that were found before.

        Raises:
            OSError: `root` itself can't be listed.
        """
        root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._reserve(root_fd)
            yield from self._below(root_fd, Place())
            for link in self._links:  # grows when a link leads to a folder with links
                yield from self._follow(root_fd, link)
        finally:
            os.close(root_fd)

    def _reserve(self, root_fd: int) -> None:
        """Mark the reserved folders as visited, since some file systems take `Done` for `done`."""
        for name in self.reserved:
            with suppress(OSError):  # it does not exist yet
                self._visited.add(_id(os.stat(name, dir_fd=root_fd)))

    def _below(self, root_fd: int, folder: Place) -> Iterator[FoundFile]:
        for found in self._listed(root_fd, folder):
            if isinstance(found, Place):
                yield from self._below(root_fd, found)
            else:
                self._files.add(_id(found.stat))
                yield found

    def _listed(self, root_fd: int, folder: Place) -> list[FoundFile | Place]:
        """The files and folders in a folder; nothing if it is gone or can't be read."""
        try:
            with _opened(root_fd, folder.real) as fd:
                if (folder_id := _id(os.fstat(fd))) in self._visited:
                    return []
                self._visited.add(folder_id)
                with os.scandir(fd) as listing:
                    entries = sorted(listing, key=lambda entry: os.fsencode(entry.name))
                siblings = frozenset(entry.name for entry in entries)
                found = (self._entry(entry, folder.below(entry.name), fd, siblings) for entry in entries)
                return [each for each in found if each is not None]
        except OSError as e:
            if not folder.real:
                raise
            self._unreadable(folder.shown, e)
            return []

    def _entry(
        self, entry: os.DirEntry[str], place: Place, folder_fd: int, siblings: frozenset[str]
    ) -> FoundFile | Place | None:
        if place.real[0] in self.reserved or self.is_ignored(place.shown):
            return None
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError as e:
            self._unreadable(place.shown, e)
            return None
        if stat.S_ISLNK(found.st_mode):
            self._link(place)
        elif stat.S_ISDIR(found.st_mode):
            return self._folder(place)
        elif stat.S_ISREG(found.st_mode) and self.is_wanted(entry.name, folder_fd):
            return FoundFile(place, found, siblings)
        return None

    def _folder(self, place: Place) -> Place | None:
        n_bytes = len(os.fsencode(f"{self.root}/{place.shown}"))
        if len(place.real) <= MAX_DEPTH and n_bytes <= MAX_FOLDER_BYTES:
            return place
        self.report(f"{place.shown[:60]}…", "is nested too deeply, so its files are left alone")
        return None

    def _link(self, place: Place) -> None:
        if self.follow_symlinks:
            self._links.append(place)
        else:
            self.report(place.shown, "is a symbolic link, left alone (see intake.follow_symlinks)")

    def _follow(self, root_fd: int, link: Place) -> Iterator[FoundFile]:
        """The files that a link leads to, if they lie below the walked folder."""
        root = Path(os.path.realpath(self.root))
        target = Path(os.path.realpath(root.joinpath(*link.real)))
        if not target.is_relative_to(root):
            self.report(link.shown, "is a symbolic link that leads out of the folder, left alone")
            return
        place = Place(target.relative_to(root).parts, link.shown)
        if not place.real or place.real[0] in self.reserved:
            return
        try:
            found = self._target(root_fd, place)
        except OSError:
            self.report(link.shown, "is a symbolic link whose target can't be read")
            return
        if isinstance(found, Place):
            yield from self._below(root_fd, found)
        elif found is not None and _id(found.stat) not in self._files:
            self._files.add(_id(found.stat))
            yield found

    def _target(self, root_fd: int, place: Place) -> FoundFile | Place | None:
        name = place.real[-1]
        with _opened(root_fd, place.real[:-1]) as fd:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                return self._folder(place)
            if not stat.S_ISREG(found.st_mode) or not self.is_wanted(name, fd):
                return None
            with os.scandir(fd) as listing:
                return FoundFile(place, found, frozenset(entry.name for entry in listing))

    def _unreadable(self, shown: str, error: OSError) -> None:
        if error.errno not in GONE:
            self.report(shown, f"can't be read: {os_reason(error)}")


@contextmanager
def _opened(root_fd: int, parts: tuple[str, ...]) -> Iterator[int]:
    """Open a folder below an open one, without following any link."""
    fd = os.open(".", OPEN_FOLDER, dir_fd=root_fd)
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
