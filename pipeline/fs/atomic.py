"""Atomic writes: a new file is complete or not there, also after a kill or a power cut.

Temporary file in the same folder, fsync, read back, rename, fsync of the folder: the order that
POSIX file systems need (Pillai and others, "All File Systems Are Not Created Equal", OSDI 2014).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Written:
    """A file that is whole, flushed and read back, but may not have its name yet."""

    path: Path
    sha256: str
    bytes: int


def write_atomically(path: Path, temporary: Path, content: bytes | memoryview) -> str:
    """Write a file at `path` by way of `temporary` in the same folder; returns its SHA-256.

    Raises:
        OSError: see `write_new`.
    """
    with replacing(path, temporary):
        return write_new(temporary, content).sha256


def write_new(path: Path, content: bytes | memoryview) -> Written:
    """Write a file and read it back, in place of one that a killed run may have left.

    Raises:
        OSError: it couldn't be written, or the disk returned other bytes than were written (EIO).
            The file is removed, unless that fails too.
    """
    sha256 = hashlib.sha256(content).hexdigest()
    with _removed_after_error(path):
        _make_folder(path.parent)
        path.unlink(missing_ok=True)
        with path.open("xb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        _check(path, content)
    return Written(path, sha256, len(content))


@contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[None]:
    """Rename `temporary`, which is written and flushed inside, to `path`; remove it after an error."""
    with _removed_after_error(temporary):
        yield
        temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def _removed_after_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first error is the one to raise
            path.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Flush a folder, so that its renames and new files survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for parent in made:
        sync_folder(parent.parent)


def _check(path: Path, content: bytes | memoryview) -> None:
    """Compare a file's bytes, read from the disk and not from the page cache where the system allows it.

    Raises:
        OSError: with EIO, if they are not the bytes that were written.
    """
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # macOS has no such call
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        starts = range(0, len(content) + 1, BLOCK_BYTES)  # the last one may be at the end
        is_right = all(file.read(BLOCK_BYTES) == bytes(content[at : at + BLOCK_BYTES]) for at in starts)
    if not is_right:
        raise OSError(errno.EIO, "the disk returned other bytes than were written", str(path))
