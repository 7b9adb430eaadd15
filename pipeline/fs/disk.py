"""Errors of the machine as opposed to those of a track, and free disk space."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.errors import DiskFull, FolderUnusable, os_reason

FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
CLOSED_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


def environment_error(error: BaseException) -> FolderUnusable | None:
    """The error as one of the machine, not of a track: a full disk, a folder or database that can't be used.

    None for any other error. A device error (EIO) while a track's files are read or written is one of
    the track: it may be a single bad sector, so it counts as an attempt.
    """
    if isinstance(error, FolderUnusable):
        return error
    if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        kind = DiskFull if full else FolderUnusable
        return kind(f"the database can't be used: {error}")
    if isinstance(error, OSError) and error.errno in (*FULL_ERRORS, *CLOSED_ERRORS):
        kind = DiskFull if error.errno in FULL_ERRORS else FolderUnusable
        where = f" ({error.filename})" if error.filename else ""
        return kind(f"{os_reason(error)}{where}")
    return None


def environment_error_outside_tracks(error: BaseException) -> FolderUnusable | None:
    """As `environment_error`, but any OSError counts, for code that does not work on a track."""
    if isinstance(error, OSError) and environment_error(error) is None:
        where = f" ({error.filename})" if error.filename else ""
        return FolderUnusable(f"{os_reason(error)}{where}")
    return environment_error(error)


def free_bytes(folders: Iterable[Path]) -> float:
    """Free space on the fullest of the folders' disks.

    Raises:
        FolderUnusable: one of them does not exist.
    """
    free = float("inf")
    for folder in folders:
        try:
            free = min(free, shutil.disk_usage(folder).free)
        except OSError as e:
            raise FolderUnusable(f"{folder} can't be used: {os_reason(e)}") from e
    return free


def count_that_fit(folders: Sequence[Path], *, each_bytes: float, reserve_bytes: float) -> int:
    """How many things of that size fit on the folders' disks, with the reserve left free.

    Raises:
        DiskFull: not even one fits.
    """
    free = free_bytes(folders)
    if free < each_bytes + reserve_bytes:
        raise DiskFull(
            f"{free / 1e6:.0f} MB are free for {', '.join(map(str, folders))}, and"
            f" {(each_bytes + reserve_bytes) / 1e6:.0f} MB are needed (disk.min_free_mb and the work's own)"
        )
    return int((free - reserve_bytes) // max(each_bytes, 1.0))
