"""What `status`, `show` and the end of `once` say: facts as JSON values, and lines of text."""

from __future__ import annotations

import shutil
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.app import App
from pipeline.config import Config
from pipeline.errors import FolderUnusable, UnknownTrack
from pipeline.fs.names import printable
from pipeline.outbox.outbox import Outbox
from pipeline.pace import Wanted, rough, times_left
from pipeline.records import Stage
from pipeline.runner.retry import local_time, longest_wait_s
from pipeline.service.health import WATCHDOG_S, read_health
from pipeline.store.schema import TrackState
from pipeline.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.intake.ingest import ScanResult
    from pipeline.runner.attempts import RunResult

LISTED = 20  # entries of the queue and failures that `status` lists
SPEED_S = 600.0  # of which the seconds of sound per minute are the mean
BAR = 12  # characters of the longest bar in `show`
STAGE = max(map(len, Stage))  # characters of the longest name


def summary(result: RunResult, scan_result: ScanResult, outbox: Path) -> str:
    """The last line of `once`."""
    parts = [f"{len(result.done)} done", f"{len(result.failed)} failed"]
    if n := len(result.faulty):
        parts.append(f"{n} {'variation fails its' if n == 1 else 'variations fail their'} gates (see `show`)")
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
        "disk_free_bytes": _free_bytes(app),
        "time_left_s": None,
        "sound_s_per_minute": None,
        "ended": 0,
        "oldest_queued_at": None,
        "running": [],
        "waiting": [],
        "queue": [],
        "failures": [],
    }
    store = app.read_store()
    if store is None:
        return facts
    with closing(store):
        facts |= _queue_facts(store, app.config, is_running=is_running)
        return facts | (_times(store, health) if health else {})


def _free_bytes(app: App) -> int | None:
    """Free space on the fullest disk that results are written to."""
    with suppress(OSError):
        return min(shutil.disk_usage(folder).free for folder in app.workspace.disks)
    return None


def _times(store: Store, health: dict[str, Any]) -> dict[str, Any]:
    """What a running instance has done since its start, how fast, and how long the rest takes."""
    now, workers = time.time(), health.get("workers", [])
    started_at = health.get("started_at", now)
    since = max(now - SPEED_S, started_at)
    left: list[float | None] = [None] * len(workers)
    whole = None
    if wanted := health.get("wanted"):
        left, whole = times_left(store, Wanted(**wanted), workers, now=now)
    return {
        "time_left_s": whole,
        "sound_s_per_minute": store.sound_since(since) / max(now - since, 1.0) * 60,
        "ended": store.n_ended_since(started_at),
        "workers": [{**one, "left_s": left_s} for one, left_s in zip(workers, left, strict=True)],
    }


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
                "since_s": round(now - attempt.started_at, 1),
            }
            for attempt in (store.attempts() if is_running else ())
        ],
        "waiting": [
            {"track": track.name, "until": track.not_before, "error": track.error}
            for track in store.waiting(after=now, until=now + longest_wait_s(config), limit=LISTED)
        ],
        "oldest_queued_at": store.oldest_queued(),
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
    lines = [*head_lines(facts)]
    lines += [_worker_text(one) for one in facts["workers"]]
    lines += [f"now: {one['track']}: {one['stage']} for {one['since_s']:.0f} s" for one in facts["running"]]
    lines += [waiting_text(one) for one in facts["waiting"]]
    lines += [f"next: {name}" for name in facts["queue"]]
    lines += [failure_text(one) for one in facts["failures"]]
    return "\n".join(lines)


def head_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Counts, what runs and how fast, what is degraded, and what waits in the inbox."""
    queue = [f"{n} {state}" for state, n in facts["tracks"].items()]
    if facts["time_left_s"]:
        queue.append(f"about {rough(facts['time_left_s'])} left")
    yield ", ".join(queue)
    mode = f", watching the inbox by {facts['mode']}" if facts["mode"] else ""
    yield f"an instance is running{mode}" if facts["instance"] else "no instance is running"
    if facts["instance"]:
        yield f"{facts['sound_s_per_minute'] or 0:.0f} s of sound a minute, {_free_text(facts)}"
    for one in facts["degraded"]:
        yield f"degraded since {local_time(one['since'])}: {one['what']}: {one['text']}"
    states = {
        "waiting": "wait until earlier tracks are done (intake.spool_gb)",
        "settling": "may still be being written",
        "unmarked": "have no marker file yet",
    }
    waiting = [f"{n} {states[state]}" for state, n in (facts["inbox"] or {}).items() if n and state in states]
    if waiting:
        yield f"in the inbox: {', '.join(waiting)}"


def _free_text(facts: dict[str, Any]) -> str:
    free = facts["disk_free_bytes"]
    return "free space unknown" if free is None else f"{free / 1e9:.1f} GB free"


def waiting_text(one: dict[str, Any]) -> str:
    return f"waiting until {local_time(one['until'])}: {one['track']}: {one['error'] or 'new'}"


def failure_text(one: dict[str, Any]) -> str:
    attempts = "1 attempt" if one["attempts"] == 1 else f"{one['attempts']} attempts"
    return f"failed: {one['track']} in {one['stage']} after {attempts}: {one['error']}"


def _worker_text(worker: dict[str, Any]) -> str:
    if worker["stage"] is None:
        return f"worker ({worker['where']}): has nothing to do"
    engine = f" by {worker['engine']}" if worker["engine"] else ""
    rate = f", {worker['steps_per_s']:g} steps/s" if worker["steps_per_s"] else ""
    step = f", {worker['step']}" if worker.get("step") else ""
    left = f", about {rough(worker['left_s'])} left" if worker.get("left_s") else ""
    return f"worker ({worker['where']}): {worker['track']}: {worker['stage']}{engine}{step}{rate}{left}"


def health_text(app: App, *, now: float) -> tuple[bool, str]:
    """Whether an instance is at work, its last progress is recent and nothing is degraded; and what is so.

    Progress is recent if systemd's watchdog would not act yet; without systemd, that of the unit in deploy/.
    """
    report = read_health(app.workspace.health) if app.workspace.is_locked() else None
    if report is None:
        return False, "no instance is running"
    ago_s, limit_s = now - report.get("progress_at", 0.0), report.get("watchdog_s") or WATCHDOG_S
    if ago_s > limit_s:
        return False, f"the last progress was {rough(ago_s)} ago, and {rough(limit_s)} are the limit"
    if conditions := report["conditions"]:
        return False, "; ".join(f"{one['what']}: {one['text']}" for one in conditions)
    return True, f"the last progress was {rough(ago_s)} ago"


def show_facts(app: App, wanted: str) -> dict[str, Any]:
    """What `show --json` prints.

    Raises:
        UnknownTrack: no track, or more than one, has that name.
    """
    store = app.read_store()
    if store is None:
        raise UnknownTrack("nothing has been processed yet")
    track = store.find(wanted)
    manifest: dict[str, Any] = {}
    with suppress(FolderUnusable):  # a bucket may be away
        manifest = Outbox(app.workspace.outbox_files).read_manifest(track.folder) or {}
    published = manifest.get("keys", {}).get("generate", [])
    return {
        "track": track.name,
        "sha256": track.sha256,
        "state": track.state,
        "error": track.error,
        "outbox": printable(app.workspace.outbox / track.folder),
        "source": track.source,
        "files": [{"file": f.display, "state": f.state} for f in store.files_of(track.sha256)],
        "units": [
            {
                "stage": one["stage"],
                "file": one["result"].get("file"),
                "seconds": round(one["seconds"], 2),
                # The gates that it fails, of a variation that is published all the same
                "failed": one["result"].get("failed", []) if one["key"] in published else [],
            }
            for one in store.units_of(track.sha256)
        ],
        "attempts": [
            {
                "stage": one.stage,
                "outcome": one.outcome,
                "error": one.error,
                "started_at": one.started_at,
                "seconds": None if one.ended_at is None else round(one.ended_at - one.started_at, 2),
                "worker": one.worker,
            }
            for one in store.attempts(track.sha256)
        ],
    }


def show_text(facts: dict[str, Any]) -> str:
    lines = [f"{facts['track']} ({facts['sha256'][:8]}): {facts['state']}"]
    if facts["error"]:
        lines.append(f"error: {facts['error']}")
    lines.append(f"outbox: {facts['outbox']}")
    lines += [f"source file: {one['file']} ({one['state']})" for one in facts["files"]]
    for one in facts["units"]:
        fails = f", fails its gates: {'; '.join(one['failed'])}" if one["failed"] else ""
        lines.append(f"{one['stage']}: {one['file'] or 'done'} in {one['seconds']} s{fails}")
    longest_s = max((one["seconds"] or 0.0 for one in facts["attempts"]), default=0.0)
    for one in facts["attempts"]:
        bar = "━" * max(1, round(BAR * (one["seconds"] or 0.0) / max(longest_s, 0.01)))
        took = "" if one["seconds"] is None else f"{one['seconds']:.1f} s"
        shown, outcome = bar if took else "", one["outcome"] or "is running"
        what = f"{one['stage']:<{STAGE}}  {took:>9}  {shown:<{BAR}}  {outcome}"
        worker, error = (
            f"{mark}{text}" if text else "" for mark, text in ((", ", one["worker"]), (": ", one["error"]))
        )
        lines.append(f"{local_time(one['started_at'])}  {what}{worker}{error}")
    return "\n".join(lines)
