"""Makes outbox, working copies and records agree again, whatever happened between two runs.

At every start it is quick: a result whose size is right and that nobody has written to since it was
finished counts as sound. Thorough, every result is read and hashed. A result that is missing or
altered is queued again, and the runner makes just what isn't there; a folder that belongs to no
track is only reported. Only for the holder of the instance lock, after `Store.recover`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import os_reason
from pipeline.fs.names import printable
from pipeline.maintenance import retention
from pipeline.outbox.outbox import TMP_SUFFIX, Outbox, Published, listed
from pipeline.store.schema import Track
from pipeline.store.store import Store
from pipeline.workspace import Workspace

MTIME_SLACK_S = 2.0  # between the file's own time and the clock's when the unit was recorded
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GONE = (errno.ENOENT, errno.ENOTDIR)


@dataclass(frozen=True)
class Finding:
    """Something that wasn't as it should be."""

    kind: str  # leftover | result | lost | unreadable | stranger
    where: str  # printable: a folder of the outbox, or a path
    text: str  # what is wrong and what became of it
    mended: bool = False  # it is in order now, or will be when the queue is worked off


@dataclass(frozen=True)
class Damage:
    """What is wrong with a finished track's results."""

    text: str
    needs_source: bool  # a result must be made again; otherwise writing the manifest is enough


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
    """Compare all there is with all that is recorded.

    Args:
        thorough: hash every result instead of trusting size and time.
        repair: remove leftovers and queue again what is missing; otherwise nothing is changed.
        redo_missing: whether a missing or altered result is made again at all.

    Raises:
        OSError: the outbox itself can't be read.
    """
    if repair:
        retention.finish_cut_off(store, workspace)
    tracks = store.tracks()
    findings = list(_folders(outbox, tracks, repair=repair))
    found = [
        (track, finding)
        for track in tracks
        if track.state == "done" and track.collected_at is None
        if (finding := _result(track, store, outbox, workspace, thorough=thorough)) is not None
    ]
    broken = [(track, finding) for track, finding in found if finding.kind == "result"]
    if broken and repair and redo_missing:
        found = [(track, finding) for track, finding in found if finding.kind != "result"]
        findings += _queue_again(store, broken, now=now)
    findings += [finding for _, finding in found]
    findings += _scratch(store, workspace, repair=repair)
    return findings


# -- the outbox's folders --------------------------------------------------------------------------


def _folders(outbox: Outbox, tracks: list[Track], *, repair: bool) -> Iterator[Finding]:
    """Temporary files of killed runs, and folders that no track knows."""
    states: dict[str, str] = {}
    for track in tracks:
        states[track.folder] = "running" if states.get(track.folder) == "running" else track.state
    for folder in outbox.folders():
        state = states.get(folder)
        try:
            if state is None:
                if outbox.manifest(folder) is not None:
                    yield Finding("stranger", printable(folder), "belongs to no track of this database")
            elif state != "running":
                # A file between two names is whole, and an unfinished track may still want it.
                left = (
                    outbox.leftovers(folder) if state == "done" else outbox.leftovers(folder, (TMP_SUFFIX,))
                )
                for path in left:
                    yield _leftover(path, "is left of a run that was killed", repair=repair)
        except PermissionError as e:
            yield _unreadable(folder, e)


def _leftover(path: Path, text: str, *, repair: bool) -> Finding:
    where = printable(path)
    if not repair:
        return Finding("leftover", where, text)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as e:  # of no harm to anything: no reason not to start
        return Finding("leftover", where, f"{text}, and can't be removed: {os_reason(e)}")
    return Finding("leftover", where, f"{text}: removed", mended=True)


def _unreadable(folder: str, error: OSError) -> Finding:
    return Finding("unreadable", printable(folder), f"can't be read: {os_reason(error)}")


# -- results ---------------------------------------------------------------------------------------


def _result(
    track: Track, store: Store, outbox: Outbox, workspace: Workspace, *, thorough: bool
) -> Finding | None:
    """What is wrong with a finished track's results; of the kind "result" if they can be made again."""
    try:
        damage = _damage(track, store, outbox, thorough=thorough)
    except OSError as e:
        return _unreadable(track.folder, e)
    if damage is None:
        return None
    where = printable(track.folder)
    if damage.needs_source and not _source_at_hand(track, store, workspace):
        return Finding("lost", where, f"{damage.text}; it can't be made again: its source is gone")
    return Finding("result", where, damage.text)


def _queue_again(store: Store, broken: list[tuple[Track, Finding]], *, now: float) -> Iterator[Finding]:
    """All in one transaction; what somebody else has queued or collected since it was read stays so."""
    with store.together():
        for track, finding in broken:
            if store.track(track.sha256) == track:
                store.requeue(track.sha256, now=now)
                yield replace(finding, text=f"{finding.text}: queued again", mended=True)


def _damage(track: Track, store: Store, outbox: Outbox, *, thorough: bool) -> Damage | None:
    """What is wrong, if anything.

    Raises:
        OSError: something is there but can't be read, so nothing can be said of it.
    """
    manifest = outbox.manifest(track.folder)
    entries = None if manifest is None else listed(manifest)
    units = [unit for unit in store.units_of(track.sha256) if "file" in unit["result"]]
    finished_at = {(unit["result"]["file"], unit["result"]["sha256"]): unit["finished_at"] for unit in units}
    if manifest is None or entries is None:
        text = "manifest.json is missing or damaged"
    elif not isinstance(source := manifest.get("source"), dict) or source.get("sha256") != track.sha256:
        text = "manifest.json is not this track's"
    elif any((entry.file, entry.sha256) not in finished_at for entry in entries):
        text = "manifest.json names files that are not recorded"
    else:
        wrong = [
            f"{printable(entry.file)} {problem}"
            for entry in entries
            if (problem := _problem(track, entry, outbox, finished_at, thorough=thorough)) is not None
        ]
        return Damage(", ".join(wrong), needs_source=True) if wrong else None
    last = {unit["result"]["file"]: unit["result"] for unit in units}  # the newest of each name
    wanted = {file: Published(file, result["sha256"], result["bytes"]) for file, result in last.items()}
    whole = bool(wanted) and len(outbox.held(track.folder, wanted)) == len(wanted)
    return Damage(text, needs_source=not whole)


def _problem(
    track: Track,
    entry: Published,
    outbox: Outbox,
    finished_at: dict[tuple[str, str], float],
    *,
    thorough: bool,
) -> str | None:
    try:
        there = (outbox.root / track.folder / entry.file).stat()
    except OSError as e:
        if e.errno in _GONE:
            return "is missing"
        raise
    untouched = there.st_mtime <= finished_at[entry.file, entry.sha256] + MTIME_SLACK_S
    if there.st_size == entry.bytes and untouched and not thorough:
        return None
    return None if outbox.holds(track.folder, entry) else "is altered"


def _source_at_hand(track: Track, store: Store, workspace: Workspace) -> bool:
    """Whether the bytes seem to be there still; the runner checks their hash before it uses them."""
    places = [file.moved_to or file.path for file in store.files_of(track.sha256)]
    for path in (workspace.scratch(track.sha256).source, *places):
        with suppress(OSError):
            if path.is_file() and path.stat().st_size == track.bytes:
                return True
    return False


# -- working copies --------------------------------------------------------------------------------


def _scratch(store: Store, workspace: Workspace, *, repair: bool) -> Iterator[Finding]:
    """Working copies that nobody works on, and copies that were cut off."""
    states = {track.sha256: track.state for track in store.tracks()}
    folder = workspace.state / "work"
    entries = sorted(folder.iterdir(), key=os.fsencode) if folder.is_dir() else []
    for path in entries:
        state = states.get(path.name)
        if path.name.startswith(".incoming-") or path.suffix == TMP_SUFFIX:
            yield _leftover(path, "is left of a run that was killed", repair=repair)
        elif _SHA256.fullmatch(path.name) and state not in ("queued", "running"):
            yield _leftover(path, "is a working copy that nothing needs", repair=repair)
        elif state == "queued" and path.is_dir():
            for part in sorted(path.glob(f"*{TMP_SUFFIX}")):
                yield _leftover(part, "is left of a run that was killed", repair=repair)
