"""Moves source files of finished and failed tracks to the archive: `done` and `failed` in the inbox."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.config import Intake
from pipeline.fs.copying import error_path, names_like
from pipeline.fs.files import Entry, Files, holds
from pipeline.store.schema import FileState, SourceFile, Track
from pipeline.store.store import Store
from pipeline.workspace import DONE, FAILED

log = logging.getLogger("pipeline")


def archive_files(
    store: Store, files: list[SourceFile], inbox: Files, settings: Intake, *, error: str | None
) -> None:
    """Move, delete or keep a track's source files as the configuration says; `error`: why the track failed.

    Only files of the inbox are moved. A file that has changed since it was taken in stays: the next
    scan takes it as a new one.
    """
    for file in files:
        if file.state == FileState.SETTLED or (file.state == FileState.FAILED and error is not None):
            continue  # archived before
        # A link may lead nowhere once it is moved.
        if file.root != inbox.root or inbox.is_link(file.current_path):
            store.set_file_state(file.path, FileState.SETTLED)
            continue
        try:
            found = inbox.find(file.current_path)
            if found is not None and found.identity == file.identity:
                _archive(store, inbox, file, settings, error)
            elif found is None and not inbox.is_away():  # while the inbox is away, no file counts as lost
                store.set_file_state(file.path, FileState.LOST)
        except OSError as e:
            log.warning("%s: can't be moved out of the inbox: %s", file.display, e.strerror)


def _archive(store: Store, inbox: Files, file: SourceFile, settings: Intake, error: str | None) -> None:
    if settings.marker is not None and settings.after != "keep":
        # The marker goes first: without its file it would release the next file of that name too early.
        inbox.delete(file.path.with_name(file.path.name + settings.marker))
    moved_to = _move_finished(inbox, file, settings) if error is None else _move_failed(inbox, file, error)
    found = None if moved_to is None else inbox.find(moved_to)
    state = FileState.SETTLED if error is None else FileState.FAILED
    store.set_file_state(file.path, state, moved_to=moved_to, identity=found.identity if found else None)


def _move_failed(inbox: Files, file: SourceFile, error: str) -> Path:
    target = file.root / FAILED / path_in_inbox(file)
    moved_to = inbox.move_to_free_name(file.current_path, target, sha256=file.sha256)
    inbox.note(error_path(moved_to), f"{error}\n")
    return moved_to


def _move_finished(inbox: Files, file: SourceFile, settings: Intake) -> Path | None:
    """Returns the new path; None if the file was deleted or is at the path where it was found."""
    here, original = file.current_path, file.root / path_in_inbox(file)
    if file.state == FileState.FAILED:
        inbox.delete(error_path(here))
    if settings.after == "move":
        return inbox.move_to_free_name(here, file.root / DONE / path_in_inbox(file), sha256=file.sha256)
    if settings.after == "delete":
        inbox.delete(here)
    elif file.state == FileState.FAILED:
        moved_to = inbox.move_to_free_name(here, original, sha256=file.sha256)
        return None if moved_to == file.path else moved_to
    return None


def path_in_inbox(file: SourceFile) -> Path:
    """The path below the inbox that the file had before any move."""
    below = file.path.relative_to(file.root)
    return Path(*below.parts[1:]) if len(below.parts) > 1 and below.parts[0] in (DONE, FAILED) else below


def restore_to_inbox(store: Store, track: Track, inbox: Files) -> None:
    """Move a file that couldn't be read back to the inbox and forget it: the next scan takes it as new."""
    for file in store.files_of(track.sha256):
        if file.moved_to is not None and inbox.find(file.moved_to) is not None:
            target = file.root / path_in_inbox(file)
            inbox.move_to_free_name(file.moved_to, target, sha256=file.sha256)
            inbox.delete(error_path(file.moved_to))
    store.forget(track.sha256)


def recover_moves(store: Store, inbox: Files) -> None:
    """Record the moves to `done` and `failed` that a kill left unrecorded."""
    for file in store.unarchived_below(inbox.root):
        if not _is_missing(inbox, file):
            continue
        if (moved := _moved(inbox, file)) is not None:
            track = store.track(file.sha256)
            error = f"{track.name}: {track.error}" if track else None
            _record_move(store, inbox, file, moved, error)
        elif not inbox.is_away() and inbox.find(file.path) is None:
            store.set_file_state(file.path, FileState.LOST)


def _record_move(store: Store, inbox: Files, file: SourceFile, moved: Entry, error: str | None) -> None:
    """Record a move, and complete that of a failed file."""
    is_done = moved.path.is_relative_to(inbox.root / DONE)
    if not is_done and error is not None and inbox.find(error_path(moved.path)) is None:
        inbox.note(error_path(moved.path), f"{error}\n")
    state = FileState.SETTLED if is_done else FileState.FAILED
    store.set_file_state(file.path, state, moved_to=moved.path, identity=moved.identity)


def _moved(inbox: Files, file: SourceFile) -> Entry | None:
    """A file in the archive to which this one was moved.

    A rename keeps the size, mtime and inode by which it is recognised, and a copy in a bucket the content.
    """
    for folder in (DONE, FAILED):
        for path in names_like(inbox.root / folder / path_in_inbox(file)):
            if (found := inbox.find(path)) is None:
                break
            if holds(inbox, found, file.identity, file.sha256):
                return found
    return None


def _is_missing(inbox: Files, file: SourceFile) -> bool:
    """Whether the file is not where it is recorded, and no failed file that was put back in the inbox."""
    found = inbox.find(file.current_path)
    is_in_place = found is not None and found.identity == file.identity
    was_put_back = file.state == FileState.FAILED and inbox.find(file.path) is not None
    return not is_in_place and not was_put_back
