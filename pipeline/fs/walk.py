"""Every file below a folder, without ever leaving it.

Folders are opened from the top, step by step, none through a symbolic link, and files are looked
at in the folder that was opened (openat(2) and O_NOFOLLOW): a folder that is swapped for a link in
the middle of a walk can't lead outside. What a walk says of a file can be old by the time the file
is opened: compare device and inode then.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import os_reason

MAX_FOLDER_BYTES = 4096 - 256 - 32  # of a path, so that a name below it, and in `failed`, still fits
MAX_DEPTH = 200  # folders in folders; deeper ones are a mistake, and beyond what pathlib can make
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # removed, or another thing put in its place

FileId = tuple[int, int]  # device and inode
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True)
class Place:
    """Where something is, relative to the walked folder."""

    real: tuple[str, ...] = ()  # no part of it is a link
    shown: str = ""  # as a user reached it; the same if no link was followed

    def below(self, name: str) -> Place:
        return Place((*self.real, name), f"{self.shown}/{name}" if self.shown else name)


@dataclass(frozen=True)
class Found:
    """A regular file."""

    place: Place
    stat: os.stat_result
    siblings: frozenset[str]  # the names in its folder


@dataclass
class Walk:
    """One look at everything below `root`."""

    root: Path
    reserved: tuple[str, ...]  # names at the top that are not looked at, however they are reached
    follow_symlinks: bool  # to what lies below `root`
    is_left_out: Callable[[str], bool]  # of a path below `root`, without looking at what it is
    is_wanted: Callable[[str, int], bool]  # of a regular file: its name, and its folder's descriptor
    tell: Callable[[str, str], None]  # what is wrong: the path below `root`, and a sentence's end
    _visited: set[FileId] = field(default_factory=set)  # folders: none twice, so no loops
    _files: set[FileId] = field(default_factory=set)
    _links: list[Place] = field(default_factory=list)

    def files(self) -> Iterator[Found]:
        """In the order of the names; what links lead to comes last, and only if it was not seen before.

        Raises:
            OSError: `root` itself can't be listed.
        """
        root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._reserve(root_fd)
            yield from self._below(root_fd, Place())
            for link in self._links:  # grows while links are found behind links
                yield from self._behind(root_fd, link)
        finally:
            os.close(root_fd)

    def _reserve(self, root_fd: int) -> None:
        """Not by name alone: a file system may take `Done` for `done`."""
        for name in self.reserved:
            try:
                self._visited.add(_id(os.stat(name, dir_fd=root_fd)))
            except OSError:
                continue  # not there yet

    def _below(self, root_fd: int, top: Place) -> Iterator[Found]:
        stack = [iter(self._listed(root_fd, top))]
        while stack:
            each = next(stack[-1], None)
            if each is None:
                stack.pop()
            elif isinstance(each, Place):
                stack.append(iter(self._listed(root_fd, each)))
            else:
                self._files.add(_id(each.stat))
                yield each

    def _listed(self, root_fd: int, folder: Place) -> list[Found | Place]:
        """The files and folders in a folder, as they are now; nothing if it is gone or closed."""
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
    ) -> Found | Place | None:
        if place.real[0] in self.reserved or self.is_left_out(place.shown):
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
            return Found(place, found, siblings)
        return None

    def _folder(self, place: Place) -> Place | None:
        n_bytes = len(os.fsencode(f"{self.root}/{place.shown}"))
        if len(place.real) <= MAX_DEPTH and n_bytes <= MAX_FOLDER_BYTES:
            return place
        self.tell(f"{place.shown[:60]}…", "lies too deep in folders, what is in it is left alone")
        return None

    def _link(self, place: Place) -> None:
        if self.follow_symlinks:
            self._links.append(place)
        else:
            self.tell(place.shown, "is a symbolic link, left alone (see intake.follow_symlinks)")

    def _behind(self, root_fd: int, link: Place) -> Iterator[Found]:
        """What a link leads to, if that lies below the walked folder."""
        root = Path(os.path.realpath(self.root))
        target = Path(os.path.realpath(root.joinpath(*link.real)))
        if not target.is_relative_to(root):
            self.tell(link.shown, "is a symbolic link that leads outside, left alone")
            return
        place = Place(target.relative_to(root).parts, link.shown)
        if not place.real or place.real[0] in self.reserved:
            return
        try:
            found = self._target(root_fd, place)
        except OSError:
            self.tell(link.shown, "is a symbolic link to nothing that can be read")
            return
        if isinstance(found, Place):
            yield from self._below(root_fd, found)
        elif found is not None and _id(found.stat) not in self._files:
            self._files.add(_id(found.stat))
            yield found

    def _target(self, root_fd: int, place: Place) -> Found | Place | None:
        name = place.real[-1]
        with _opened(root_fd, place.real[:-1]) as fd:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                return self._folder(place)
            if not stat.S_ISREG(found.st_mode) or not self.is_wanted(name, fd):
                return None
            with os.scandir(fd) as listing:
                return Found(place, found, frozenset(entry.name for entry in listing))

    def _unreadable(self, shown: str, error: OSError) -> None:
        if error.errno not in GONE:  # one closed folder must not hide the others
            self.tell(shown, f"can't be read: {os_reason(error)}")


@contextmanager
def _opened(root_fd: int, parts: tuple[str, ...]) -> Iterator[int]:
    """A folder below an open one, reached without following a link at any step."""
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
