"""What `gc` removes: old working copies, archived sources and results, by age and by total size.

It runs beside a running daemon. Everything is checked again and removed while the store holds the
track, so that no other process can claim or queue it meanwhile. Files of queued and running tracks
are not touched, nor any file that is not in the database.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pipeline.config import Retention
from pipeline.engines.base import UNFINISHED
from pipeline.fs.copying import error_path
from pipeline.fs.files import Entry, Files
from pipeline.fs.names import printable
from pipeline.outbox.outbox import REJECTED, VARIATIONS, Outbox, is_temporary
from pipeline.store.schema import SourceFile, Track, TrackState
from pipeline.store.store import Store
from pipeline.workspace import DONE, ENGINES_FOLDER, FAILED, Workspace

log = logging.getLogger("pipeline")

DAY_S = 86400.0
UNKNOWN_AT_LEAST_S = DAY_S  # what is not in the database may belong to a scan or a variation in progress
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Removable:
    """Something that may be removed, or was."""

    what: str  # working copy | unfinished | archive | outbox
    path: Path
    bytes: int
    since: float  # when its age began, seconds since the epoch
    # Returns False if it is needed again; None: it is needed now.
    remove: Callable[[], bool] | None = field(compare=False)
    why: str = ""  # it was removed


def collect(
    store: Store, workspace: Workspace, settings: Retention, *, now: float, dry_run: bool
) -> list[Removable]:
    """Remove what is older or larger than the settings allow, the oldest first.

    What can't be removed is logged and is not in the list. With `dry_run` nothing is removed.
    """
    outbox = Outbox(workspace.outbox_files)
    if not dry_run:
        finish_interrupted_removals(store, outbox)
    tracks = {track.sha256: track for track in store.tracks()}
    removed: list[Removable] = []
    for found, days, gigabytes in (
        (_working_copies(store, workspace, tracks, now), settings.work_days, None),
        (_archived(store, workspace, tracks), settings.archive_days, settings.archive_gb),
        (_results(store, outbox, tracks, now), settings.outbox_days, settings.outbox_gb),
    ):
        if days is not None or gigabytes is not None:
            removed += _thin_out(list(found), days, gigabytes, now=now, dry_run=dry_run)
    return removed


def finish_interrupted_removals(store: Store, outbox: Outbox) -> None:
    """Remove the results that a killed `gc` left after it had removed their manifest."""
    collected = {track.folder: track for track in store.tracks() if track.collected_at is not None}
    for folder in [folder for folder, _ in outbox.contents() if folder in collected] if collected else ():
        _remove_collected(store, outbox, collected[folder].sha256)


def _thin_out(
    found: list[Removable], days: float | None, gigabytes: float | None, *, now: float, dry_run: bool
) -> list[Removable]:
    """Remove what is too old, then the oldest until the total, with what is needed, is small enough."""
    total = sum(one.bytes for one in found)
    removed = []
    for one in sorted(found, key=lambda one: (one.since, os.fsencode(one.path))):
        if days is not None and now - one.since > days * DAY_S:
            why = f"older than {days:g} days"
        elif gigabytes is not None and total > gigabytes * 1e9:
            why = f"the oldest beyond {gigabytes:g} GB"
        else:
            continue
        try:
            if one.remove is not None and (dry_run or one.remove()):
                total -= one.bytes
                removed.append(replace(one, why=why))
        except (OSError, sqlite3.Error) as e:
            log.warning("%s: can't be removed: %s", printable(one.path), e)
    return removed


# -- working copies --------------------------------------------------------------------------------


def unneeded_copies(workspace: Workspace, tracks: Mapping[str, Track]) -> Iterator[Path]:
    """Working copies of finished tracks and of tracks that are not in the database, and incomplete copies."""
    for path in sorted((workspace.state / "work").glob("*")):
        is_copy = _SHA256.fullmatch(path.name) or path.name.startswith(".incoming-")
        if is_copy and not _is_in_work(tracks.get(path.name)):
            yield path


def _working_copies(
    store: Store, workspace: Workspace, tracks: Mapping[str, Track], now: float
) -> Iterator[Removable]:
    """Working copies that no track needs, and what engines have stored of unfinished variations."""
    unfinished = sorted((workspace.state / ENGINES_FOLDER).glob(f"*/{UNFINISHED}/*"))
    for path in [*unneeded_copies(workspace, tracks), *unfinished]:
        with suppress(FileNotFoundError):  # it was finished meanwhile
            size, since = _size_and_time(path)
            if path.name in tracks or now - since > UNKNOWN_AT_LEAST_S:
                what = "unfinished" if path.parent.name == UNFINISHED else "working copy"
                yield Removable(what, path, size, since, partial(_remove_copy, store, path, since))
    if folder := workspace.unfinished_in_bucket:
        files = workspace.outbox_files
        for entry in files.entries(folder):
            if now - entry.changed_s > UNKNOWN_AT_LEAST_S:
                remove = partial(_remove_unchanged, files, entry)
                yield Removable("unfinished", entry.path, entry.size, entry.changed_s, remove)


def _is_in_work(track: Track | None) -> bool:
    return track is not None and track.state in (TrackState.QUEUED, TrackState.RUNNING)


def _remove_copy(store: Store, path: Path, since: float) -> bool:
    with store.locked_track(path.name) as track:
        if _is_in_work(track) or not path.exists() or _size_and_time(path)[1] != since:
            return False
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return True


def _remove_unchanged(files: Files, entry: Entry) -> bool:
    found = files.find(entry.path)
    if found is None or found.identity != entry.identity:
        return False
    files.delete(entry.path)
    return True


def _size_and_time(path: Path) -> tuple[int, float]:
    """Size in bytes of a file or of a folder's files, and the latest mtime."""
    found = [each.lstat() for each in (path, *path.glob("*"))]
    return sum(one.st_size for one in (found[1:] or found)), max(one.st_mtime for one in found)


# -- archive ---------------------------------------------------------------------------------------


def _archived(store: Store, workspace: Workspace, tracks: Mapping[str, Track]) -> Iterator[Removable]:
    """Recorded sources in `done` and `failed`."""
    inbox = workspace.inbox_files
    tops = (workspace.inbox / DONE, workspace.inbox / FAILED)
    found = {entry.path: entry for top in tops for entry in inbox.entries(top)}
    for file in store.files_below(workspace.inbox):
        if file.moved_to is None or (entry := found.get(file.moved_to)) is None:
            continue
        if entry.identity != file.identity:
            continue
        track = tracks.get(file.sha256)
        is_needed = track is None or _is_in_work(track)
        remove = None if is_needed else partial(_remove_archived, store, inbox, file, tops)
        error = found.get(error_path(entry.path))
        # The move changed the ctime: a second copy that came later is not as old as its track.
        since = max((track and track.finished_at) or 0.0, entry.changed_s)
        yield Removable("archive", entry.path, entry.size + (error.size if error else 0), since, remove)


def _remove_archived(store: Store, inbox: Files, file: SourceFile, tops: tuple[Path, Path]) -> bool:
    with store.locked_track(file.sha256) as track:
        current = store.file_at(file.path)
        if track is None or _is_in_work(track) or current is None or file.moved_to is None:
            return False
        found = inbox.find(file.moved_to)
        if current.moved_to != file.moved_to or found is None or found.identity != file.identity:
            return False
        inbox.delete(file.moved_to)
        inbox.delete(error_path(file.moved_to))
    for top in tops:
        inbox.prune(file.moved_to.parent, top)
    return True


# -- outbox ----------------------------------------------------------------------------------------


def _results(store: Store, outbox: Outbox, tracks: Mapping[str, Track], now: float) -> Iterator[Removable]:
    sizes = {
        folder: sum(entry.size for name, entry in files.items() if not is_temporary(name))
        for folder, files in outbox.contents()
        if not isinstance(files, OSError)
    }
    for track in tracks.values():
        if size := sizes.get(track.folder):
            is_needed = track.state != TrackState.DONE or track.collected_at is not None
            remove = None if is_needed else partial(_remove_results, store, outbox, track, now)
            folder = outbox.root / track.folder
            yield Removable("outbox", folder, size, track.finished_at or 0.0, remove)


def _remove_results(store: Store, outbox: Outbox, track: Track, now: float) -> bool:
    """Remove this program's files from a track's folder; other files there stay.

    The manifest goes first, in the transaction that records the removal: an error in either leaves
    the results complete but for the manifest, which `reconcile` then has written again. What was rated as
    kept is set aside first, as where another configuration replaces it.
    """
    with store.locked_track(track.sha256) as current:
        if current is None or (current.state, current.finished_at) != (track.state, track.finished_at):
            return False
        outbox.set_aside(track.folder, {one.sha256 for one in store.ratings(track.sha256) if one.kept})
        store.set_collected(track.sha256, now=now)
        outbox.remove_manifest(track.folder)
    _remove_collected(store, outbox, track.sha256)
    return True


def _remove_collected(store: Store, outbox: Outbox, sha256: str) -> None:
    """Remove the files of a collected track, unless it was queued again or has a manifest again."""
    with store.locked_track(sha256) as track:
        if track is None or track.collected_at is None or outbox.read_manifest(track.folder) is not None:
            return
        for entry in outbox.files_in(track.folder).values():
            outbox.files.delete(entry.path)
    for name in (REJECTED, VARIATIONS):
        outbox.files.prune(outbox.root / track.folder / name, outbox.root)
