"""What `status`, `show`, `plan` and the end of `once` say: facts as JSON values, and lines of text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.app import App
from pipeline.config import Config
from pipeline.errors import FolderUnusable, UnknownTrack, os_reason
from pipeline.fs.names import printable
from pipeline.runner.retry import local_time, longest_wait_s
from pipeline.service.health import read_health
from pipeline.store.schema import TrackState
from pipeline.store.store import Store

if TYPE_CHECKING:
    from pipeline.intake.ingest import ScanResult
    from pipeline.intake.scanner import ScannedFile
    from pipeline.plan import Recipe
    from pipeline.runner.attempts import RunResult
    from pipeline.store.schema import Track
    from pipeline.workspace import InputFolder

LISTED = 20  # entries of the queue and failures that `status` lists
CONFLICT_COPY = " (a sync tool's conflict copy: a track of its own unless another file has the same content)"


def summary(result: RunResult, scan_result: ScanResult, outbox: Path) -> str:
    """The last line of `once`."""
    parts = [f"{len(result.done)} done", f"{len(result.failed)} failed"]
    if scan_result.up_to_date:
        parts.append(f"{len(scan_result.up_to_date)} up to date")
    if scan_result.failed:
        parts.append(f"{len(scan_result.failed)} failed before (see `status`, `retry`)")
    if result.postponed_until is not None:
        parts.append(f"a retry is due at {local_time(result.postponed_until)}, left for the next run")
    if scan_result.read_errors:
        parts.append(f"{scan_result.read_errors} can't be read now and are left for the next run")
    if scan_result.unsettled:
        parts.append(f"{scan_result.unsettled} are still being written and are left for the next run")
    if scan_result.unmarked:
        parts.append(f"{scan_result.unmarked} have no marker file yet")
    return f"{', '.join(parts)}; results are in {outbox}"


def plan_lines(app: App, folder: InputFolder) -> Iterator[str]:
    """What `once` would do: the engines, the variations, and one line per file or queued track.

    Raises:
        FolderUnusable: the folder can't be read.
    """
    from pipeline.intake.copies import is_conflict_copy
    from pipeline.intake.scanner import Scanner
    from pipeline.maintenance.reconcile import reconcile
    from pipeline.outbox.outbox import Outbox

    recipe = app.recipe
    for stage, choice in (("embed", recipe.embedder), ("generate", recipe.generator)):
        to_fetch = "; its weights would be downloaded first" if choice.needs_weights else ""
        yield f"{stage}: {choice.card.name} ({choice.why}){to_fetch}"
    variations = recipe.plan("").variations
    names = ", ".join(Path(unit.file).name for unit in variations)
    yield f"each track: {len(variations)} variations: {names}"
    store = app.read_store()
    is_idle, listed = True, set[str]()
    try:
        for scanned in Scanner(folder, app.config.intake).scan():
            is_idle = False
            track = _track_of(store, scanned) if store else None
            listed |= {track.sha256} if track else set()
            note = CONFLICT_COPY if is_conflict_copy(scanned.path.name) else ""
            yield f"{scanned.display}: {_planned(store, scanned, track, recipe)}{note}"
    except OSError as e:
        raise FolderUnusable(f"{folder.path} can't be read: {os_reason(e)}") from e
    for track in store.tracks(TrackState.QUEUED) if store and folder.is_inbox else []:
        is_idle = False
        if track.sha256 not in listed:
            yield f"{track.name}: queued{f', failed before: {track.error}' if track.error else ''}"
    if store and app.config.retention.redo_missing:
        outbox = Outbox(app.workspace.outbox)
        findings = reconcile(store, outbox, app.workspace, thorough=False, repair=False, now=time.time())
        for finding in findings:
            if finding.kind == "result":
                is_idle = False
                yield f"{finding.where}: {finding.text}: made again"
    if is_idle:
        yield "nothing to do"


def _track_of(store: Store, scanned: ScannedFile) -> Track | None:
    """The track that a file was taken in as; None if the file is new or has changed since."""
    known = store.file_at(scanned.path)
    is_same = known is not None and known.identity == scanned.identity and known.moved_to is None
    return store.track(known.sha256) if known and is_same else None


def _planned(store: Store | None, scanned: ScannedFile, track: Track | None, recipe: Recipe) -> str:
    """What `once` would do with one file, and why."""
    if store is None or track is None:
        return "new: normalize, embed, generate" if scanned.marked else "waits for its marker file"
    if track.state != TrackState.DONE:
        return f"{track.state}{f' ({track.error})' if track.error else ''}"
    if track.collected_at is not None:
        return "up to date (its results were removed by gc)"
    wanted = recipe.plan(track.sha256)
    if track.plan_key == wanted.key:
        return "up to date"
    missing = sum(store.unit(unit.key) is None for unit in wanted.variations)
    embed = "embed, " if store.unit(wanted.embed_key) is None else ""
    return f"the configuration has changed: {embed}{missing} variations"


def status_facts(app: App) -> dict[str, Any]:
    """What `status --json` prints."""
    is_running = app.workspace.is_locked()
    health = (read_health(app.workspace.health) or {}) if is_running else {}
    facts = {
        "tracks": dict.fromkeys(TrackState, 0),
        "instance": is_running,
        "mode": health.get("mode"),
        "inbox": health.get("inbox"),
        "degraded": health.get("conditions", []),
        "running": [],
        "waiting": [],
        "queue": [],
        "failures": [],
    }
    store = app.read_store()
    return facts if store is None else {**facts, **_queue_facts(store, app.config, is_running=is_running)}


def _queue_facts(store: Store, config: Config, *, is_running: bool) -> dict[str, Any]:
    counts, now = store.counts(), time.time()
    names = {track.sha256: track.name for track in store.tracks(TrackState.RUNNING)}
    queue = [track.name for track in store.tracks(TrackState.QUEUED, limit=LISTED)]
    if not is_running:  # the next instance continues with what a killed one was working on
        counts = {**counts, "queued": counts["queued"] + counts["running"], "running": 0}
        queue = [*names.values(), *queue]
    return {
        "tracks": counts,
        "running": [
            {
                "track": names.get(attempt.sha256, attempt.sha256[:8]),
                "sha256": attempt.sha256,
                "stage": attempt.stage,
                "since_s": round(time.time() - attempt.started_at, 1),
            }
            for attempt in (store.attempts() if is_running else ())
        ],
        "waiting": [
            {"track": track.name, "until": track.not_before, "error": track.error}
            for track in store.tracks(TrackState.QUEUED)
            if 0 < track.not_before - now <= longest_wait_s(config)
        ][:LISTED],
        "queue": queue,
        "failures": [
            {
                "track": track.name,
                "sha256": track.sha256,
                "path": _path_of(store, track.sha256),
                "stage": track.stage,
                "error": track.error,
                "attempts": track.attempts,
            }
            for track in store.tracks(TrackState.FAILED, limit=LISTED)
        ],
    }


def _path_of(store: Store, sha256: str) -> str | None:
    """Where the newest file of a track is now."""
    files = store.files_of(sha256)
    return printable(files[-1].current_path) if files else None


def status_text(facts: dict[str, Any]) -> str:
    lines = [", ".join(f"{n} {state}" for state, n in facts["tracks"].items())]
    mode = f", watching the inbox by {facts['mode']}" if facts["mode"] else ""
    lines.append(f"an instance is running{mode}" if facts["instance"] else "no instance is running")
    for one in facts["degraded"]:
        lines.append(f"degraded since {local_time(one['since'])}: {one['what']}: {one['text']}")
    states = {
        "waiting": "wait until earlier tracks are done (intake.spool_gb)",
        "settling": "may still be being written",
        "unmarked": "have no marker file yet",
    }
    waiting = [f"{n} {states[state]}" for state, n in (facts["inbox"] or {}).items() if n and state in states]
    lines += [f"in the inbox: {', '.join(waiting)}"] if waiting else []
    lines += [f"now: {one['track']}: {one['stage']} for {one['since_s']:.0f} s" for one in facts["running"]]
    lines += [
        f"waiting until {local_time(one['until'])}: {one['track']}: {one['error'] or 'new'}"
        for one in facts["waiting"]
    ]
    lines += [f"next: {name}" for name in facts["queue"]]
    lines += [
        f"failed: {one['track']} in {one['stage']} after {one['attempts']} attempts: {one['error']}"
        for one in facts["failures"]
    ]
    return "\n".join(lines)


def show_facts(app: App, wanted: str) -> dict[str, Any]:
    """What `show --json` prints.

    Raises:
        UnknownTrack: no track, or more than one, has that name.
    """
    store = app.read_store()
    if store is None:
        raise UnknownTrack("nothing has been processed yet")
    track = store.find(wanted)
    return {
        "track": track.name,
        "sha256": track.sha256,
        "state": track.state,
        "error": track.error,
        "outbox": str(app.workspace.outbox / track.folder),
        "source": track.source,
        "files": [{"file": f.display, "state": f.state} for f in store.files_of(track.sha256)],
        "units": [
            {"stage": u["stage"], "file": u["result"].get("file"), "seconds": round(u["seconds"], 2)}
            for u in store.units_of(track.sha256)
        ],
        "attempts": [
            {"stage": a.stage, "outcome": a.outcome, "error": a.error, "started_at": a.started_at}
            for a in store.attempts(track.sha256)
        ],
    }


def show_text(facts: dict[str, Any]) -> str:
    lines = [f"{facts['track']} ({facts['sha256'][:8]}): {facts['state']}"]
    if facts["error"]:
        lines.append(f"error: {facts['error']}")
    lines.append(f"outbox: {facts['outbox']}")
    lines += [f"source file: {one['file']} ({one['state']})" for one in facts["files"]]
    lines += [f"{one['stage']}: {one['file'] or 'done'} in {one['seconds']} s" for one in facts["units"]]
    lines += [
        f"attempt at {local_time(one['started_at'])}: {one['stage']} {one['outcome'] or 'is running'}"
        f"{': ' + one['error'] if one['error'] else ''}"
        for one in facts["attempts"]
    ]
    return "\n".join(lines)
