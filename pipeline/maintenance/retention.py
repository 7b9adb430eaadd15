"""What `gc` removes: old working copies, archived sources and results, by age and by total size.

It works beside a running daemon. What is removed is first checked and moved out of the way while
the store holds the track, so that nobody can claim or queue it meanwhile, and deleted after that.
Nothing that is queued or running is touched, nor any file that the store doesn't know.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.config import Retention
from pipeline.engines.base import UNFINISHED
from pipeline.fs.copying import error_file
from pipeline.fs.names import printable
from pipeline.outbox.outbox import MANIFEST, Outbox
from pipeline.store.schema import SourceFile, Track
from pipeline.store.store import Store
from pipeline.workspace import ENGINES_FOLDER, Workspace

log = logging.getLogger("pipeline")

DAY_S = 86400.0
ASIDE_PREFIX = ".gc-"  # what is on its way out: not seen by anything else
UNKNOWN_AT_LEAST_DAYS = 1.0  # the intake may be about to record a working copy that the store doesn't know
MTIME_SLACK_NS = 2_000_000_000  # FAT keeps times to two seconds
FINISHED = ("done", "failed")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Removal:
    """Something that was removed, or would be."""

    what: str  # working copy | unfinished | archive | outbox
    path: Path
    bytes: int
    why: str


@dataclass(frozen=True)
class Candidate:
    """Something that may be removed."""

    what: str
    path: Path
    bytes: int
    since: float  # what its age is counted from, seconds since the epoch
    remove: Callable[[], bool]  # False: it is needed again
    least_days: float = 0.0


def collect(
    store: Store, workspace: Workspace, settings: Retention, *, now: float, dry_run: bool
) -> list[Removal]:
    """Remove what the settings no longer want kept, the oldest first; `dry_run` only says what.

    What can't be removed is logged and left out of the list.
    """
    outbox = Outbox(workspace.outbox)
    if not dry_run:
        finish_cut_off(store, workspace)
    tracks = {track.sha256: track for track in store.tracks()}
    removed: list[Removal] = []
    if settings.work_days is not None:
        copies = list(_working_copies(store, workspace, tracks))
        copies += _unfinished(workspace)
        removed += _thin_out(copies, 0, settings.work_days, None, now=now, dry_run=dry_run)
    if settings.archive_days is not None or settings.archive_gb is not None:
        archived, kept_bytes = _archived(store, workspace, tracks)
        limits = settings.archive_days, settings.archive_gb
        removed += _thin_out(archived, kept_bytes, *limits, now=now, dry_run=dry_run)
    if settings.outbox_days is not None or settings.outbox_gb is not None:
        results, kept_bytes = _results(store, outbox, tracks, now)
        limits = settings.outbox_days, settings.outbox_gb
        removed += _thin_out(results, kept_bytes, *limits, now=now, dry_run=dry_run)
    return removed


def finish_cut_off(store: Store, workspace: Workspace) -> None:
    """Complete or undo what a killed `gc` left between its move and its commit or its deletion."""
    outbox = Outbox(workspace.outbox)
    for aside in _entries(workspace.outbox):
        sha256 = aside.name.removeprefix(ASIDE_PREFIX)
        if not aside.name.startswith(ASIDE_PREFIX) or not _SHA256.fullmatch(sha256):
            continue
        with store.holding(sha256) as track:
            if track is None or track.state == "running":
                continue
            if track.collected_at is None and outbox.manifest(track.folder) is None:
                # Not committed, and not made again since. Complete it is only if it counts as done.
                _put_back(aside, workspace.outbox / track.folder, with_manifest=track.state == "done")
        shutil.rmtree(aside, ignore_errors=True)
    for entry in _entries(workspace.state / "work"):
        if entry.name.startswith(ASIDE_PREFIX):
            shutil.rmtree(entry, ignore_errors=True)


def _thin_out(
    candidates: Iterable[Candidate],
    kept_bytes: int,
    days: float | None,
    gigabytes: float | None,
    *,
    now: float,
    dry_run: bool,
) -> list[Removal]:
    """Remove what is too old, then the oldest until all of it, `kept_bytes` included, is small enough."""
    oldest_first = sorted(candidates, key=lambda one: (one.since, os.fsencode(one.path)))
    total = kept_bytes + sum(one.bytes for one in oldest_first)
    removed = []
    for one in oldest_first:
        if days is not None and now - one.since > max(days, one.least_days) * DAY_S:
            why = f"older than {max(days, one.least_days):g} days"
        elif gigabytes is not None and total > gigabytes * 1e9:
            why = f"the oldest beyond {gigabytes:g} GB"
        else:
            continue
        try:
            gone = dry_run or one.remove()
        except (OSError, sqlite3.Error) as e:
            log.warning("%s: can't be removed: %s", printable(one.path), e)
            continue
        if gone:
            total -= one.bytes
            removed.append(Removal(one.what, one.path, one.bytes, why))
    return removed


# -- working copies --------------------------------------------------------------------------------


def _unfinished(workspace: Workspace) -> Iterator[Candidate]:
    """What engines keep of variations that were never finished."""
    for path in sorted((workspace.state / ENGINES_FOLDER).glob(f"*/{UNFINISHED}/*")):
        with suppress(OSError):  # it was finished meanwhile
            stat = path.stat()
            yield Candidate("unfinished", path, stat.st_size, stat.st_mtime, partial(_unlink, path))


def _unlink(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True


def _working_copies(store: Store, workspace: Workspace, tracks: dict[str, Track]) -> Iterator[Candidate]:
    """Those of finished tracks and of none, and copies that were cut off."""
    for path in _entries(workspace.state / "work"):
        is_desk = _SHA256.fullmatch(path.name) is not None
        if not is_desk and not path.name.startswith(".incoming-") and path.suffix != ".part":
            continue
        track = tracks.get(path.name)
        if track is not None and track.state not in FINISHED:
            continue
        with suppress(FileNotFoundError):  # finished meanwhile
            size, since = _size_and_time(path)
            least = 0.0 if track is not None else UNKNOWN_AT_LEAST_DAYS
            remove = partial(_remove_copy, store, path, since)
            yield Candidate("working copy", path, size, since, remove, least)


def _remove_copy(store: Store, path: Path, since: float) -> bool:
    aside = path.with_name(f"{ASIDE_PREFIX}{path.name}-{os.getpid()}")
    with store.holding(path.name) as track:
        if track is not None and track.state not in FINISHED:
            return False
        try:
            if _size_and_time(path)[1] != since:
                return False
            path.rename(aside)
        except FileNotFoundError:
            return False
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink()
    return True


def _size_and_time(path: Path) -> tuple[int, float]:
    """Bytes of a file or of a folder's files, and the latest change of any of them."""
    found = [each.lstat() for each in (path, *_entries(path))]
    return sum(one.st_size for one in (found[1:] or found)), max(one.st_mtime for one in found)


# -- archive ---------------------------------------------------------------------------------------


def _archived(store: Store, workspace: Workspace, tracks: dict[str, Track]) -> tuple[list[Candidate], int]:
    """Sources in `done` and `failed` that the store moved there, and the bytes of those to be kept."""
    found, kept_bytes = [], 0
    for file in store.files_below(workspace.inbox):
        top = _archive_of(file, workspace.inbox)
        if file.moved_to is None or top is None:
            continue
        try:
            there = file.moved_to.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not _is_the_one(file, there):
            continue
        track = tracks.get(file.sha256)
        if track is None or track.state not in FINISHED:
            kept_bytes += there.st_size
            continue
        size = there.st_size
        with suppress(FileNotFoundError):
            size += error_file(file.moved_to).lstat().st_size
        # The move changed the ctime: a second copy that came late isn't as old as its track.
        since = max(track.finished_at or 0.0, there.st_ctime)
        remove = partial(_remove_archived, store, file, top)
        found.append(Candidate("archive", file.moved_to, size, since, remove))
    return found, kept_bytes


def _archive_of(file: SourceFile, inbox: Path) -> Path | None:
    for top in (inbox / "done", inbox / "failed"):
        if file.moved_to is not None and file.moved_to.is_relative_to(top):
            return top if file.moved_to.parent.resolve().is_relative_to(top.resolve()) else None
    return None


def _is_the_one(file: SourceFile, there: os.stat_result) -> bool:
    return there.st_size == file.size and abs(there.st_mtime_ns - file.mtime_ns) <= MTIME_SLACK_NS


def _remove_archived(store: Store, file: SourceFile, top: Path) -> bool:
    with store.holding(file.sha256) as track:
        now_known = store.file_at(file.path)
        if track is None or track.state not in FINISHED or now_known is None or file.moved_to is None:
            return False
        if now_known.moved_to != file.moved_to or not _is_the_one(file, file.moved_to.lstat()):
            return False
        file.moved_to.unlink()
        error_file(file.moved_to).unlink(missing_ok=True)
    _prune(file.moved_to.parent, top)
    return True


# -- outbox ----------------------------------------------------------------------------------------


def _results(
    store: Store, outbox: Outbox, tracks: dict[str, Track], now: float
) -> tuple[list[Candidate], int]:
    """What finished tracks have in the outbox, and the bytes of those to be kept."""
    found, kept_bytes = [], 0
    for track in tracks.values():
        size = 0
        for path in outbox.results(track.folder):
            with suppress(FileNotFoundError):
                size += path.lstat().st_size
        if track.state != "done" or track.collected_at is not None:
            kept_bytes += size
        elif size:
            remove = partial(_remove_results, store, outbox, track, now)
            folder = outbox.root / track.folder
            found.append(Candidate("outbox", folder, size, track.finished_at or 0.0, remove))
    return found, kept_bytes


class _MadeAgain(Exception):
    """The track has been worked on since it was looked at."""


def _remove_results(store: Store, outbox: Outbox, track: Track, now: float) -> bool:
    """Take this program's files out of a track's folder; what a person put there stays."""
    folder, aside = outbox.root / track.folder, outbox.root / f"{ASIDE_PREFIX}{track.sha256}"

    def move() -> None:
        today = store.track(track.sha256)
        if today is None or (today.state, today.finished_at) != (track.state, track.finished_at):
            raise _MadeAgain
        files = [*outbox.results(track.folder), *outbox.leftovers(track.folder)]
        for path in sorted(files, key=lambda path: path.name != MANIFEST):  # first the manifest
            target = aside / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)

    try:
        gone = store.collect(track.sha256, move, now=now)
    except _MadeAgain:
        return False
    except BaseException:
        _put_back(aside, folder)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    _prune(folder / "variations", outbox.root)
    return gone


def _put_back(aside: Path, folder: Path, *, with_manifest: bool = True) -> None:
    """Undo a move; last the manifest, and never over another file."""
    files = [path for path in aside.rglob("*") if path.is_file() and (with_manifest or path.name != MANIFEST)]
    for path in sorted(files, key=lambda path: path.name == MANIFEST):
        target = folder / path.relative_to(aside)
        if not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


# -- folders ---------------------------------------------------------------------------------------


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=os.fsencode)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _prune(folder: Path, top: Path) -> None:
    """Remove folders below `top` that have become empty."""
    while folder != top and folder.is_relative_to(top):
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return
        folder = folder.parent
