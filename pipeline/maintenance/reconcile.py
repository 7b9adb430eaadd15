"""Makes the outbox, the working copies and the database agree again after a kill or a change by others.

A quick check, done at every start, trusts a result whose size is right and whose mtime is not later
than its record. A thorough check reads and hashes every result. The track of a missing or altered
result is queued again, and the runner makes only what is missing. A folder that belongs to no track
is only reported. To be called only by the holder of the instance lock, after `Store.recover`.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import os_reason
from pipeline.fs.names import printable
from pipeline.maintenance.retention import finish_interrupted_removals, unneeded_copies
from pipeline.outbox.outbox import Outbox, Published, files_of, listed_files
from pipeline.store.schema import Track, TrackState
from pipeline.store.store import Store
from pipeline.workspace import Workspace

MTIME_SLACK_S = 2.0  # between a file's mtime and the clock with which its unit was recorded
_GONE = (errno.ENOENT, errno.ENOTDIR)


@dataclass(frozen=True)
class Finding:
    """A difference between what is there and what is recorded."""

    # leftover: of a killed run; result: missing or altered; lost: a result that can't be made again;
    # unreadable: nothing can be said of it; unknown: a folder that belongs to no track
    kind: Literal["leftover", "result", "lost", "unreadable", "unknown"]
    where: str  # printable: a folder of the outbox, or a path
    text: str  # what is wrong and what was done about it
    mended: bool = False  # it is in order now, or will be once the queue is processed


def reconcile(
    store: Store,
    outbox: Outbox,
    workspace: Workspace,
    *,
    thorough: bool,
    repair: bool,
    now: float,
    redo_missing: bool = True,
) -> list[Finding]:
    """Compare the outbox and the working copies with the database.

    Args:
        thorough: hash every result instead of trusting its size and mtime.
        repair: remove leftovers and queue tracks with missing results again; otherwise change nothing.
        redo_missing: whether missing or altered results are made again at all.

    Raises:
        OSError: the outbox itself can't be read.
    """
    if repair:
        finish_interrupted_removals(store, outbox)
    tracks = store.tracks()
    findings = list(_check_folders(outbox, tracks, repair=repair))
    broken: list[tuple[Track, Finding]] = []
    for track in tracks:
        if track.state == TrackState.DONE and track.collected_at is None:
            finding = _check_results(track, store, outbox, workspace, thorough=thorough)
            if finding is not None and finding.kind == "result" and repair and redo_missing:
                broken.append((track, finding))
            elif finding is not None:
                findings.append(finding)
    if broken:
        with store.transaction():
            for track, finding in broken:
                if store.track(track.sha256) == track:  # no other process has queued or collected it since
                    store.requeue(track.sha256, now=now)
                    findings.append(replace(finding, text=f"{finding.text}: queued again", mended=True))
    copies = list(unneeded_copies(workspace, {track.sha256: track for track in store.tracks()}))
    findings += _remove(copies, "is a working copy that nothing needs", repair=repair)
    return findings


# -- the outbox's folders --------------------------------------------------------------------------


def _check_folders(outbox: Outbox, tracks: list[Track], *, repair: bool) -> Iterator[Finding]:
    """Temporary files of killed runs, and folders that belong to no track."""
    states: dict[str, TrackState] = {}
    for track in tracks:
        if states.get(track.folder) != TrackState.RUNNING:
            states[track.folder] = track.state
    for folder in outbox.track_folders():
        state = states.get(folder)
        try:
            if state is None:
                if outbox.read_manifest(folder) is not None:
                    yield Finding("unknown", printable(folder), "belongs to no track of this database")
            elif state in (TrackState.DONE, TrackState.FAILED):  # the runner uses or removes those of others
                yield from _remove(outbox.temporary_files(folder), repair=repair)
        except PermissionError as e:
            yield _unreadable(folder, e)


def _remove(paths: list[Path], text: str = "was left by a killed run", *, repair: bool) -> Iterator[Finding]:
    for path in paths:
        where = printable(path)
        if not repair:
            yield Finding("leftover", where, text)
            continue
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as e:  # it does no harm, so it is no reason to stop
            yield Finding("leftover", where, f"{text}, and can't be removed: {os_reason(e)}")
        else:
            yield Finding("leftover", where, f"{text}: removed", mended=True)


def _unreadable(folder: str, error: OSError) -> Finding:
    return Finding("unreadable", printable(folder), f"can't be read: {os_reason(error)}")


# -- results ---------------------------------------------------------------------------------------


def _check_results(
    track: Track, store: Store, outbox: Outbox, workspace: Workspace, *, thorough: bool
) -> Finding | None:
    units = [unit for unit in store.units_of(track.sha256) if "file" in unit["result"]]
    where = printable(track.folder)
    try:
        problem = _find_problem(track, units, outbox, thorough=thorough)
        if problem is None:
            return None
        if has_source(track, store, workspace) or _has_all_results(track, units, outbox):
            return Finding("result", where, problem)
        return Finding("lost", where, f"{problem}; it can't be made again: its source is gone")
    except OSError as e:
        return _unreadable(track.folder, e)


def _find_problem(track: Track, units: list[dict[str, Any]], outbox: Outbox, *, thorough: bool) -> str | None:
    """Compare a finished track's folder with its recorded results.

    Raises:
        OSError: something is there but can't be read.
    """
    finished_at = {
        (one.file, one.sha256): unit["finished_at"] for unit in units for one in files_of(unit["result"])
    }
    manifest = outbox.read_manifest(track.folder)
    files = listed_files(manifest)
    if manifest is None or files is None:
        return "manifest.json is missing or damaged"
    if not isinstance(source := manifest.get("source"), dict) or source.get("sha256") != track.sha256:
        return "manifest.json belongs to another track"
    if any((one.file, one.sha256) not in finished_at for one in files):
        return "manifest.json names files that are not recorded"
    problems = [_file_problem(track, one, outbox, finished_at, thorough=thorough) for one in files]
    return ", ".join(filter(None, problems)) or None


def _has_all_results(track: Track, units: list[dict[str, Any]], outbox: Outbox) -> bool:
    wanted = {one.file: one for unit in units for one in files_of(unit["result"])}  # the newest of each name
    return bool(wanted) and len(outbox.find_intact(track.folder, wanted)) == len(wanted)


def _file_problem(
    track: Track,
    published: Published,
    outbox: Outbox,
    finished_at: Mapping[tuple[str, str], float],
    *,
    thorough: bool,
) -> str | None:
    name = printable(published.file)
    try:
        stat = (outbox.root / track.folder / published.file).stat()
    except OSError as e:
        if e.errno in _GONE:
            return f"{name} is missing"
        raise
    untouched = stat.st_mtime <= finished_at[published.file, published.sha256] + MTIME_SLACK_S
    if stat.st_size == published.bytes and untouched and not thorough:
        return None
    return None if outbox.is_intact(track.folder, published) else f"{name} is altered"


def has_source(track: Track, store: Store, workspace: Workspace) -> bool:
    """Whether a file of the track's size is at one of its paths; the runner checks its hash later."""
    recorded = [file.current_path for file in store.files_of(track.sha256)]
    for path in (workspace.scratch(track.sha256).source, *recorded):
        with suppress(OSError):
            if path.is_file() and path.stat().st_size == track.bytes:
                return True
    return False
