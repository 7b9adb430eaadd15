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
from pathlib import Path

BLOCK_BYTES = 1 << 20


def write_atomically(path: Path, temporary: Path, content: bytes | memoryview) -> str:
    """Write a file at `path` by way of `temporary` in the same folder; returns its SHA-256.

    Raises:
        OSError: it couldn't be written, or the disk returned other bytes than were written (EIO).
            The temporary file is removed, unless that fails too.
    """
    sha256 = hashlib.sha256(content).hexdigest()
    with replacing(path, temporary):
        _make_folder(temporary.parent)
        temporary.unlink(missing_ok=True)  # a killed run may have left it
        with temporary.open("xb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        _check(temporary, content)
    return sha256


@contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[None]:
    """Rename `temporary`, which is written and flushed inside, to `path`; remove it after an error."""
    try:
        yield
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to raise
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
