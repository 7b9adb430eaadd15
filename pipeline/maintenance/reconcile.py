"""Makes the outbox, the working copies and the database agree again after a kill or a change by others.

A quick check, done at every start, trusts a result whose size is right and whose mtime is not later
than its record. A thorough check reads and hashes every result. The track of a missing or altered
result is queued again, and the runner makes only what is missing. A folder that belongs to no track
is only reported. To be called only by the holder of the instance lock, after `Store.recover`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import FolderUnusable, os_reason
from pipeline.fs.files import Entry
from pipeline.fs.mounts import mounts_of
from pipeline.fs.names import printable
from pipeline.maintenance.retention import finish_interrupted_removals, unneeded_copies
from pipeline.outbox.outbox import Outbox, Published, files_of, is_temporary, listed_files
from pipeline.store.schema import Track, TrackState
from pipeline.store.store import Store
from pipeline.workspace import Workspace

OUTBOX_MOUNT = "outbox mount"  # the fact in the store: where its disk was mounted at the last start
MTIME_SLACK_S = 2.0  # between a file's mtime and the clock with which its unit was recorded


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
    of_folder: dict[str, list[Track]] = {}
    for track in store.tracks():
        of_folder.setdefault(track.folder, []).append(track)
    findings: list[Finding] = []
    broken: list[tuple[Track, Finding]] = []
    for content in _contents(outbox, of_folder):
        tracks = of_folder.pop(content.folder, [])
        findings += _check_folder(content, tracks, outbox, repair=repair)
        for track in tracks:
            if track.state == TrackState.DONE and track.collected_at is None:
                finding = _check_results(track, content, store, outbox, workspace, thorough=thorough)
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
    for path in list(unneeded_copies(workspace, {track.sha256: track for track in store.tracks()})):
        text = "is a working copy that nothing needs"
        findings.append(_removed(path, partial(_remove_copy, path), text, repair=repair))
    return findings


# -- the outbox's folders --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """What is in a track's folder."""

    folder: str
    files: dict[str, Entry] | OSError  # by name; or why the folder can't be read
    manifest: Mapping[str, Any] | None


def _contents(outbox: Outbox, known: Mapping[str, object]) -> Iterator[_Content]:
    """The folders that are there; then the known ones that are not, as empty."""
    for found in outbox.contents_and_manifests():
        yield _Content(*found)
    for folder in list(known):  # those that were there are no longer in it
        yield _Content(folder, {}, None)


def _check_folder(
    content: _Content, tracks: list[Track], outbox: Outbox, *, repair: bool
) -> Iterator[Finding]:
    """Temporary files of killed runs, and a folder that belongs to no track."""
    if isinstance(content.files, OSError):
        yield unreadable(content.folder, content.files)
    elif not tracks:
        if content.manifest is not None:
            yield Finding(
                "unknown",
                printable(content.folder),
                "belongs to no track of this database: `rebuild` records it",
            )
    elif all(track.state in (TrackState.DONE, TrackState.FAILED) for track in tracks):
        for name, entry in content.files.items():  # the runner uses or removes those of other tracks
            if is_temporary(name):
                yield _removed(entry.path, partial(outbox.files.delete, entry.path), repair=repair)


def _removed(
    path: Path, remove: Callable[[], None], text: str = "was left by a killed run", *, repair: bool
) -> Finding:
    where = printable(path)
    if not repair:
        return Finding("leftover", where, text)
    try:
        remove()
    except OSError as e:  # it does no harm, so it is no reason to stop
        return Finding("leftover", where, f"{text}, and can't be removed: {os_reason(e)}")
    return Finding("leftover", where, f"{text}: removed", mended=True)


def _remove_copy(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unreadable(folder: str, error: OSError) -> Finding:
    return Finding("unreadable", printable(folder), f"can't be read: {os_reason(error)}")


# -- results ---------------------------------------------------------------------------------------


def _check_results(
    track: Track, content: _Content, store: Store, outbox: Outbox, workspace: Workspace, *, thorough: bool
) -> Finding | None:
    if isinstance(content.files, OSError):
        return None  # which is reported
    units = [unit for unit in store.units_of(track.sha256) if "file" in unit["result"]]
    where = printable(track.folder)
    try:
        problem = _find_problem(track, units, content.files, content.manifest, outbox, thorough=thorough)
        if problem is None:
            return None
        if has_source(track, store, workspace) or _has_all_results(track, units, outbox):
            return Finding("result", where, problem)
        return Finding("lost", where, f"{problem}; it can't be made again: its source is gone")
    except OSError as e:
        return unreadable(track.folder, e)


def _find_problem(
    track: Track,
    units: list[dict[str, Any]],
    found: Mapping[str, Entry],
    manifest: Mapping[str, Any] | None,
    outbox: Outbox,
    *,
    thorough: bool,
) -> str | None:
    """Compare a finished track's folder with its recorded results.

    Raises:
        OSError: something is there but can't be read.
    """
    finished_at = {
        (one.file, one.sha256): unit["finished_at"] for unit in units for one in files_of(unit["result"])
    }
    files = listed_files(manifest)
    if manifest is None or files is None:
        return "manifest.json is missing or damaged"
    if not isinstance(source := manifest.get("source"), dict) or source.get("sha256") != track.sha256:
        return "manifest.json belongs to another track"
    if any((one.file, one.sha256) not in finished_at for one in files):
        return "manifest.json names files that are not recorded"
    problems = [
        _file_problem(track, one, found.get(one.file), outbox, finished_at, thorough=thorough)
        for one in files
    ]
    return ", ".join(filter(None, problems)) or None


def _has_all_results(track: Track, units: list[dict[str, Any]], outbox: Outbox) -> bool:
    wanted = {one.file: one for unit in units for one in files_of(unit["result"])}  # the newest of each name
    return bool(wanted) and len(outbox.find_intact(track.folder, wanted)) == len(wanted)


def _file_problem(
    track: Track,
    published: Published,
    entry: Entry | None,
    outbox: Outbox,
    finished_at: Mapping[tuple[str, str], float],
    *,
    thorough: bool,
) -> str | None:
    name = printable(published.file)
    entry = entry or outbox.files.find(outbox.root / track.folder / published.file)  # a link isn't listed
    if entry is None:
        return f"{name} is missing"
    untouched = entry.modified_s <= finished_at[published.file, published.sha256] + MTIME_SLACK_S
    if entry.size == published.bytes and untouched and not thorough:
        return None
    return None if outbox.is_intact(track.folder, published) else f"{name} is altered"


def has_source(track: Track, store: Store, workspace: Workspace) -> bool:
    """Whether a file of the track's size is at one of its paths; the runner checks its hash later."""
    places = [(workspace.files_at(file.root), file.current_path) for file in store.files_of(track.sha256)]
    state = workspace.files_at(workspace.state)
    for files, path in ((state, workspace.scratch(track.sha256).source), *places):
        with suppress(OSError):
            if (found := files.find(path)) is not None and found.size == track.bytes:
                return True
    return False


def check_outbox_mount(outbox: Path, store: Store) -> str:
    """Where the disk of the outbox is mounted; empty if the system does not tell, or for a bucket.

    Raises:
        FolderUnusable: the outbox used to be on a mount that is missing now, and its folder is empty: all
            results would seem lost and be made again.
    """
    mounts = mounts_of(outbox)
    if not mounts:
        return ""
    before, now = store.fact(OUTBOX_MOUNT), mounts[0].mount_point
    was_deeper = before is not None and len(before) > len(now) and outbox.is_relative_to(before)
    if was_deeper and not (outbox.exists() and any(outbox.iterdir())):
        raise FolderUnusable(f"the outbox was on a disk mounted at {before}, which isn't mounted now")
    return now
