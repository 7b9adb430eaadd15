"""Copies of source files that are hashed while they are made, and moves that never overwrite a file."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import BadAudio, os_reason

READ_BYTES = 1 << 20
MAX_NAME_BYTES = 255  # of one file name, on the usual file systems


@dataclass(frozen=True)
class FileIdentity:
    """A file counts as unchanged while these are the same."""

    size: int  # bytes
    mtime_ns: int  # 0 in a bucket, as is the inode
    inode: int
    etag: str = ""  # of an object in a bucket; a file on a disk has none

    @classmethod
    def of(cls, found: os.stat_result) -> FileIdentity:
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


class FileChanged(OSError):
    """A file was written to or replaced while it was read."""


class WriteFailed(OSError):
    """The copy couldn't be written: an error of the disk, not of the file that was copied."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_in(
    path: Path,
    target: Path,
    *,
    expected: FileIdentity | None = None,
    follow: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> str | None:
    """Copy a file and hash the bytes that are written.

    The copy is not flushed to the disk: it is hashed again before it is used, and the original
    stays until the track is finished.

    Args:
        expected: the file's identity when it was found to be ready; checked on the open file.
        follow: whether `path` may be a symbolic link.

    Returns:
        The SHA-256, or None if it was asked to stop.

    Raises:
        FileChanged: the file is not the expected one, or changed while it was read.
        BadAudio: the file is missing or may not be read.
        WriteFailed: the copy can't be written.
        OSError: anything else, such as a failing device.
    """
    sha = hashlib.sha256()
    with _opened(path, follow=follow) as source:
        before = os.fstat(source.fileno())
        if not stat.S_ISREG(before.st_mode) or (expected is not None and FileIdentity.of(before) != expected):
            raise FileChanged(path)
        with write_errors(target):
            copy = target.open("wb")
        with copy:
            while block := source.read(READ_BYTES):
                if should_stop():
                    return None
                if source.tell() > before.st_size:  # it grows while it is read, perhaps without end
                    raise FileChanged(path)
                sha.update(block)
                with write_errors(target):
                    copy.write(block)
                    copy.flush()
        if FileIdentity.of(os.fstat(source.fileno())) != FileIdentity.of(before):
            raise FileChanged(path)
    return sha.hexdigest()


def _opened(path: Path, *, follow: bool) -> BinaryIO:
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)  # opening a FIFO must not block
    try:
        return os.fdopen(os.open(path, flags), "rb")
    except (PermissionError, FileNotFoundError, IsADirectoryError) as e:
        raise BadAudio(f"can't be read: {os_reason(e)}") from e


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Raise errors of a copy that is being written as WriteFailed."""
    try:
        yield
    except OSError as e:
        raise WriteFailed(e.errno, e.strerror, str(target)) from e


def move_to_free_name(path: Path, target: Path) -> Path:
    """Move a file to `target`, or to a free name like it if there is such a file; returns the new path."""
    target = free_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.move(path, target)
    except OSError:
        if os.path.lexists(path):  # the target is on another disk, and the copy is incomplete
            target.unlink(missing_ok=True)
        raise
    return target


def error_path(path: Path) -> Path:
    """The file beside a failed file that says why it failed: `<name>.error.txt`."""
    name, suffix = os.fsencode(path.name), b".error.txt"
    if len(name) + len(suffix) > MAX_NAME_BYTES:  # shortened, with a hash so that it stays unique
        suffix = b"~" + hashlib.sha256(name).hexdigest()[:8].encode() + suffix
        name = name[: MAX_NAME_BYTES - len(suffix)]
    return path.with_name(os.fsdecode(name + suffix))


def free_name(path: Path) -> Path:
    """`path`, or the first of `name (2).ext`, `name (3).ext`, … that does not exist."""
    return next(candidate for candidate in names_like(path) if not os.path.lexists(candidate))


def names_like(path: Path) -> Iterator[Path]:
    """`path`, `name (2).ext`, `name (3).ext`, …: the names among which a free one is looked for, in order."""
    yield path
    for n in itertools.count(2):
        ending = os.fsencode(f" ({n}){path.suffix}")
        stem = os.fsencode(path.stem)[: MAX_NAME_BYTES - len(ending)]
        yield path.with_name(os.fsdecode(stem + ending))
