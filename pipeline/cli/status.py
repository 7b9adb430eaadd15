"""What `status`, `show` and the end of `once` say: facts as JSON values, and lines of text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.app import App
from pipeline.config import Config
from pipeline.errors import UnknownTrack
from pipeline.fs.names import printable
from pipeline.runner.retry import local_time, longest_wait_s
from pipeline.service.health import read_health
from pipeline.store.schema import TrackState
from pipeline.store.store import Store

if TYPE_CHECKING:
    from pipeline.intake.ingest import ScanResult
    from pipeline.runner.attempts import RunResult

LISTED = 20  # entries of the queue and failures that `status` lists


def summary(result: RunResult, scan_result: ScanResult, outbox: Path) -> str:
    """The last line of `once`."""
    parts = [f"{len(result.done)} done", f"{len(result.failed)} failed"]
    if scan_result.up_to_date:
        parts.append(f"{scan_result.up_to_date} up to date")
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
    return f"{', '.join(parts)}; results are in {printable(outbox)}"


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
        "workers": health.get("workers", []),
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
    lines += [_worker_text(one) for one in facts["workers"]]
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


def _worker_text(worker: dict[str, Any]) -> str:
    if worker["stage"] is None:
        return f"worker ({worker['where']}): has nothing to do"
    engine = f" by {worker['engine']}" if worker["engine"] else ""
    rate = f", {worker['steps_per_s']:g} steps/s" if worker["steps_per_s"] else ""
    return f"worker ({worker['where']}): {worker['track']}: {worker['stage']}{engine}{rate}"


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
        "outbox": printable(app.workspace.outbox / track.folder),
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
