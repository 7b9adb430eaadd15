"""Moves source files of finished and failed tracks to the archive: `done` and `failed` in the inbox."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pipeline.config import Intake
from pipeline.fs.copying import FileIdentity, error_path, move_to_free_name, write_error
from pipeline.store.schema import FileState, SourceFile, Track
from pipeline.store.store import Store
from pipeline.workspace import DONE, FAILED

log = logging.getLogger("pipeline")


def archive_files(
    store: Store, files: list[SourceFile], inbox: Path, settings: Intake, *, error: str | None
) -> None:
    """Move, delete or keep a track's source files as the configuration says; `error`: why the track failed.

    Only files of the inbox are moved. A file that has changed since it was taken in stays: the next
    scan takes it as a new one.
    """
    for file in files:
        if file.state == FileState.SETTLED or (file.state == FileState.FAILED and error is not None):
            continue  # archived before
        if file.root != inbox or file.current_path.is_symlink():  # a link may lead nowhere once it is moved
            store.set_file_state(file.path, FileState.SETTLED)
            continue
        try:
            if FileIdentity.of(file.current_path.lstat()) == file.identity:
                _archive(store, file, settings, error)
        except FileNotFoundError:
            # While the whole inbox is away, no file counts as lost.
            if inbox.is_dir() and not os.path.lexists(file.current_path):
                store.set_file_state(file.path, FileState.LOST)
        except OSError as e:
            log.warning("%s: can't be moved out of the inbox: %s", file.display, e.strerror)


def _archive(store: Store, file: SourceFile, settings: Intake, error: str | None) -> None:
    if settings.marker is not None and settings.after != "keep":
        # The marker goes first: without its file it would release the next file of that name too early.
        file.path.with_name(file.path.name + settings.marker).unlink(missing_ok=True)
    moved_to = _move_finished(file, settings) if error is None else _move_failed(file, error)
    inode = None if moved_to is None else moved_to.lstat().st_ino
    state = FileState.SETTLED if error is None else FileState.FAILED
    store.set_file_state(file.path, state, moved_to=moved_to, inode=inode)


def _move_failed(file: SourceFile, error: str) -> Path:
    moved_to = move_to_free_name(file.current_path, file.root / FAILED / _path_in_inbox(file))
    write_error(moved_to, error)
    return moved_to


def _move_finished(file: SourceFile, settings: Intake) -> Path | None:
    """Returns the new path; None if the file was deleted or is at the path where it was found."""
    here, original = file.current_path, file.root / _path_in_inbox(file)
    if file.state == FileState.FAILED:
        error_path(here).unlink(missing_ok=True)
    if settings.after == "move":
        return move_to_free_name(here, file.root / DONE / _path_in_inbox(file))
    if settings.after == "delete":
        here.unlink()
    elif file.state == FileState.FAILED:
        moved_to = move_to_free_name(here, original)
        return None if moved_to == file.path else moved_to
    return None


def _path_in_inbox(file: SourceFile) -> Path:
    """The path below the inbox that the file had before any move."""
    below = file.path.relative_to(file.root)
    return Path(*below.parts[1:]) if len(below.parts) > 1 and below.parts[0] in (DONE, FAILED) else below


def restore_to_inbox(store: Store, track: Track) -> None:
    """Move a file that couldn't be read back to the inbox and forget it: the next scan takes it as new."""
    for file in store.files_of(track.sha256):
        if file.moved_to is not None and os.path.lexists(file.moved_to):
            move_to_free_name(file.moved_to, file.root / _path_in_inbox(file))
            error_path(file.moved_to).unlink(missing_ok=True)
    store.forget(track.sha256)


def recover_moves(store: Store, inbox: Path) -> None:
    """Record the moves to `done` and `failed` that a kill left unrecorded.

    A moved file is recognised by its size, mtime and inode, which a rename keeps.
    """
    missing = [file for file in store.unarchived_below(inbox) if _is_missing(file)]
    if not missing:
        return
    archived = {
        FileIdentity.of(path.lstat()): path
        for folder in (DONE, FAILED)
        for path in sorted((inbox / folder).rglob("*"))
    }
    for file in missing:
        moved_to = archived.get(file.identity)
        if moved_to is None:
            if inbox.is_dir() and not os.path.lexists(file.path):
                store.set_file_state(file.path, FileState.LOST)
        elif moved_to.is_relative_to(inbox / DONE):
            store.set_file_state(file.path, FileState.SETTLED, moved_to=moved_to)
        else:
            if not error_path(moved_to).exists() and (track := store.track(file.sha256)):
                write_error(moved_to, f"{track.name}: {track.error}")
            store.set_file_state(file.path, FileState.FAILED, moved_to=moved_to)


def _is_missing(file: SourceFile) -> bool:
    """Whether the file is not where it is recorded, and no failed file that was put back in the inbox."""
    was_put_back = file.state == FileState.FAILED and os.path.lexists(file.path)
    return not file.is_in_place and not was_put_back
