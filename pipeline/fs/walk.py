"""Every file below a folder, without ever leaving that folder.

Each folder is opened in the open folder above it, never through a symbolic link, and files are
examined in the open folder (openat(2) and O_NOFOLLOW). So a folder that is replaced by a link in the
middle of a walk can't lead outside. A file may change between the walk and its being opened: compare
its identity then.
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

    @property
    def is_linked(self) -> bool:
        return self.shown != "/".join(self.real)

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
    _links: list[Place] = field(default_factory=list)

    def files(self) -> Iterator[FoundFile]:
        """In the order of the names; the targets of links come last, without those that were found before.

        Raises:
            OSError: `root` itself can't be listed.
        """
        root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in self.reserved:  # by identity, since some file systems take `Done` for `done`
                with suppress(OSError):  # it does not exist yet
                    self._visited.add(_id(os.stat(name, dir_fd=root_fd)))
            found_ids: set[FileId] = set()
            for found in self._below(root_fd, Place()):
                found_ids.add(_id(found.stat))
                yield found
            for link in self._links:  # grows when a link leads to a folder with links
                for found in self._follow(root_fd, link):
                    if _id(found.stat) not in found_ids:
                        found_ids.add(_id(found.stat))
                        yield found
        finally:
            os.close(root_fd)

    def _below(self, folder_fd: int, folder: Place) -> Iterator[FoundFile]:
        if (folder_id := _id(os.fstat(folder_fd))) in self._visited:
            return
        self._visited.add(folder_id)
        names = sorted(os.listdir(folder_fd), key=os.fsencode)
        siblings = frozenset(names)
        for name in names:
            place = folder.below(name)
            if place.real[0] not in self.reserved and not self.is_ignored(place.shown):
                yield from self._entry(folder_fd, place, siblings)

    def _entry(self, folder_fd: int, place: Place, siblings: frozenset[str]) -> Iterator[FoundFile]:
        """One file, or the files of one folder; none if it is gone or can't be read."""
        name = place.real[-1]
        try:
            found = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                self._link(place)
            elif stat.S_ISDIR(found.st_mode):
                if self._is_too_deep(place):
                    self.report(f"{place.shown[:60]}…", "is nested too deeply, so its files are left alone")
                    return
                with _opened(folder_fd, (name,)) as fd:
                    yield from self._below(fd, place)
            elif stat.S_ISREG(found.st_mode) and self.is_wanted(name, folder_fd):
                yield FoundFile(place, found, siblings)
        except OSError as e:
            if e.errno not in GONE:
                self.report(place.shown, f"can't be read: {os_reason(e)}")

    def _is_too_deep(self, folder: Place) -> bool:
        n_bytes = len(os.fsencode(f"{self.root}/{folder.shown}"))
        return len(folder.real) > MAX_DEPTH or n_bytes > MAX_FOLDER_BYTES

    def _link(self, place: Place) -> None:
        if self.follow_symlinks:
            self._links.append(place)
        else:
            self.report(place.shown, "is a symbolic link, left alone (see intake.follow_symlinks)")

    def _follow(self, root_fd: int, link: Place) -> Iterator[FoundFile]:
        """The files that a link leads to, if they lie below the walked folder."""
        try:
            root = Path(os.path.realpath(self.root))
            target = Path(os.path.realpath(root.joinpath(*link.real), strict=True))
            if not target.is_relative_to(root):
                self.report(link.shown, "is a symbolic link that leads out of the folder, left alone")
                return
            place = Place(target.relative_to(root).parts, link.shown)
            if place.real and place.real[0] not in self.reserved:
                with _opened(root_fd, place.real[:-1]) as fd:
                    yield from self._entry(fd, place, frozenset(os.listdir(fd)))  # noqa: PTH208
        except OSError:
            self.report(link.shown, "is a symbolic link whose target can't be read")


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
