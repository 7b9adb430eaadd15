"""Which errors are the machine's fault and not a track's, and how much space the disk has."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import DiskFull, EngineUnusable, FolderUnusable, os_reason

FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
CLOSED_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


def environment_error(
    error: BaseException, *, in_track: bool = True
) -> FolderUnusable | EngineUnusable | None:
    """The error as the machine's or the configuration's fault, if it is.

    That is a full disk, a closed folder, an unusable database, or an engine that can't be used.

    A device error (EIO) while a track is processed (`in_track`) is not among them: it may be one bad
    sector below that track's files, so it counts as an attempt. At other times every OSError is the
    machine's.
    """
    if isinstance(error, FolderUnusable | EngineUnusable):
        return error
    if isinstance(error, ImportError):
        return EngineUnusable(f"a package can't be imported: {error}")
    if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        kind: type[FolderUnusable] = DiskFull if full else FolderUnusable
        return kind(f"the database can't be used: {error}")
    if isinstance(error, OSError) and (error.errno in (*FULL_ERRORS, *CLOSED_ERRORS) or not in_track):
        kind = DiskFull if error.errno in FULL_ERRORS else FolderUnusable
        where = f" ({error.filename})" if error.filename else ""
        return kind(f"{os_reason(error)}{where}")
    return None


def count_that_fit(folders: Sequence[Path], *, each_bytes: float, reserve_bytes: float) -> int:
    """How many things of that size fit on the disk and leave the reserve free.

    Raises:
        DiskFull: not even one fits.
        FolderUnusable: a folder does not exist or can't be read.
    """
    free, fullest = float("inf"), Path()
    for folder in folders:
        try:
            free, fullest = min((free, fullest), (shutil.disk_usage(folder).free, folder))
        except OSError as e:
            raise FolderUnusable(f"{folder} can't be used: {os_reason(e)}") from e
    if free < each_bytes + reserve_bytes:
        raise DiskFull(
            f"{free / 1e6:.1f} MB are free for {fullest}, and {(each_bytes + reserve_bytes) / 1e6:.1f} MB are"
            " needed (for the work, and disk.min_free_mb)"
        )
    return int((free - reserve_bytes) // max(each_bytes, 1.0))
