"""What becomes of a source once its track is finished or has failed, and what a kill in between leaves."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pipeline.config import Intake
from pipeline.fs import copying
from pipeline.fs.copying import Identity
from pipeline.intake import scanner
from pipeline.intake.scanner import ScannedFile
from pipeline.store.schema import FileState, SourceFile, Track
from pipeline.store.store import Store

log = logging.getLogger("pipeline")


def archive_files(
    store: Store, found: list[SourceFile], inbox: Path | None, settings: Intake, *, error: str | None
) -> None:
    """Do with a finished or failed track's files what the configuration says; only those of the inbox move.

    A file that is not what was taken in any more is left alone: the next look takes it as a new
    one. While the whole inbox is away nothing is decided.
    """
    for file in found:
        here = file.moved_to or file.path
        if file.state == FileState.SETTLED or (file.state == FileState.FAILED and error is not None):
            continue
        if file.root != inbox or here.is_symlink():  # a link stays: moved, it may lead nowhere
            store.settle_file(file.path, state=FileState.SETTLED)
            continue
        try:
            if not is_same(file, Identity.of(here.lstat())):
                continue
            _drop_marker(file, settings)  # first: alone it would vouch for the next file of that name
            moved_to = _dispose(file, here, settings, error)
            inode = None if moved_to is None else moved_to.lstat().st_ino
        except FileNotFoundError:
            if inbox.is_dir():
                store.settle_file(file.path, state=FileState.LOST)
        except OSError as e:
            log.warning("%s: can't be moved out of the inbox: %s", file.display, e.strerror)
        else:
            state = FileState.SETTLED if error is None else FileState.FAILED
            store.settle_file(file.path, state=state, moved_to=moved_to, inode=inode)


def _drop_marker(file: SourceFile, settings: Intake) -> None:
    if settings.marker is not None and settings.after != "keep":
        file.path.with_name(file.path.name + settings.marker).unlink(missing_ok=True)


def _below_the_inbox(file: SourceFile) -> Path:
    """Where the file came from, also if it is recorded under its place in the archive."""
    below = file.path.relative_to(file.root)
    archived = len(below.parts) > 1 and below.parts[0] in (scanner.DONE, scanner.FAILED)
    return Path(*below.parts[1:]) if archived else below


def is_there(file: SourceFile) -> bool:
    """Whether the file lies where it is known to be, unchanged."""
    try:
        return is_same(file, Identity.of((file.moved_to or file.path).lstat()))
    except OSError:
        return False


def drop_stale_error(path: Path) -> None:
    """Remove the reason that stands beside a failed file's place, if the file itself has left it."""
    if not os.path.lexists(path):
        copying.error_file(path).unlink(missing_ok=True)


def restore_to_inbox(store: Store, track: Track) -> None:
    """Put a file that couldn't be read back in the inbox, to be taken in as if it had just come.

    There is no hash of what couldn't be read, so nothing of its record is worth keeping.
    """
    for file in store.files_of(track.sha256):
        if file.moved_to is not None and os.path.lexists(file.moved_to):
            copying.move_aside(file.moved_to, file.root / _below_the_inbox(file))
            copying.error_file(file.moved_to).unlink(missing_ok=True)
    store.forget(track.sha256)


def finish_moves(store: Store, inbox: Path) -> int:
    """After a kill: find the files whose move to `done` or `failed` was made but not recorded.

    A rename keeps size, times and inode, so they can be told. Returns how many were found.
    """
    cut_off = [
        (file, track)
        for file, track in store.unsettled_below(inbox)
        if not is_there(file)
        and not (
            file.state == FileState.FAILED and os.path.lexists(file.path)
        )  # brought back: the next look takes it
    ]
    if not cut_off:
        return 0
    there = {
        Identity.of(path.lstat()): path
        for name in (scanner.DONE, scanner.FAILED)
        for path in sorted((inbox / name).rglob("*"))
    }
    n = 0
    for file, track in cut_off:
        path = there.get(Identity(file.size, file.mtime_ns, file.inode))
        if path is None:
            if inbox.is_dir() and not os.path.lexists(file.path):
                store.settle_file(file.path, state=FileState.LOST)
            continue
        n += 1
        failed = path.is_relative_to(inbox / scanner.FAILED)
        if failed and not copying.error_file(path).exists():
            copying.write_error(path, f"{track.name}: {track.error}")
        state = FileState.FAILED if failed else FileState.SETTLED
        store.settle_file(file.path, state=state, moved_to=path)
    return n


def _dispose(file: SourceFile, here: Path, settings: Intake, error: str | None) -> Path | None:
    """Move, delete or keep; returns the new place, or None if it stays where it was found (or is gone)."""
    if error is not None:
        moved_to = copying.move_aside(here, file.root / scanner.FAILED / _below_the_inbox(file))
        copying.write_error(moved_to, error)
        return moved_to
    if file.state == FileState.FAILED:
        copying.error_file(here).unlink(missing_ok=True)
    if settings.after == "move":
        return copying.move_aside(here, file.root / scanner.DONE / _below_the_inbox(file))
    if settings.after == "delete":
        here.unlink()
    elif file.state == FileState.FAILED:
        back = copying.move_aside(here, file.root / _below_the_inbox(file))
        return None if back == file.path else back
    return None


def is_same(file: SourceFile, seen: ScannedFile | Identity) -> bool:
    return (file.size, file.mtime_ns, file.inode) == (seen.size, seen.mtime_ns, seen.inode)
