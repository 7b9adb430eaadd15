"""Answers to questions, as values and as lines: plan, status, show, doctor, models."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.app import App
from pipeline.engines import cards
from pipeline.engines.pretrained import check_device
from pipeline.engines.selection import missing_packages
from pipeline.errors import EngineUnusable, FolderUnusable, PipelineError, UnknownTrack, os_reason
from pipeline.intake import scanner
from pipeline.intake.ingest import ScanResult
from pipeline.maintenance.reconcile import reconcile
from pipeline.outbox.outbox import Outbox
from pipeline.progress import local_time
from pipeline.runner.attempts import RunResult
from pipeline.service.health import read_health
from pipeline.store.store import STATES, Store
from pipeline.weights import hub
from pipeline.weights.layout import TRANSFORMERS, Layout
from pipeline.workspace import ENGINES_FOLDER, InputFolder

LAST_FAILURES = 20
LOW_DISK_BYTES = 2 << 30
MODEL_TYPES = ("musicgen_melody", "clap")
LICENSE_UNKNOWN = "licence: see its page on the hub"

now = time.time


def summary(result: RunResult, scan_result: ScanResult, outbox: Path) -> str:
    """The last line of `once`."""
    parts = [f"{len(result.done)} done", f"{len(result.failed)} failed"]
    if scan_result.up_to_date:
        parts.append(f"{len(scan_result.up_to_date)} up to date")
    if scan_result.failed:
        parts.append(f"{len(scan_result.failed)} failed before (see `status`, `retry`)")
    if result.postponed_until is not None:
        parts.append(f"a retry is due at {local_time(result.postponed_until)}, left for the next run")
    if scan_result.troubled:
        parts.append(f"{scan_result.troubled} can't be read now, left for the next run")
    if scan_result.unsettled:
        parts.append(f"{scan_result.unsettled} still being written, left for the next run")
    return f"{', '.join(parts)}; results are in {outbox}"


def plan(app: App, folder: InputFolder) -> Iterator[str]:
    recipe = app.recipe
    for stage, choice in (("embed", recipe.embedder), ("generate", recipe.generator)):
        to_fetch = "; its weights would be downloaded first" if choice.needs_weights else ""
        yield f"{stage}: {choice.card.name} ({choice.why}){to_fetch}"
    variations = recipe.plan("").variations
    names = ", ".join(Path(unit.file).name for unit in variations)
    yield f"each track: {len(variations)} variations: {names}"
    store = app.read_store()
    n = 0
    try:
        for scanned in app.scanner(folder).scan():
            n += 1
            yield f"{scanned.display}: {_what(store, scanned, recipe)}"
    except OSError as e:
        raise FolderUnusable(f"{folder.path} can't be read: {os_reason(e)}") from e
    queued = store.tracks("queued") if store and folder.is_inbox else []
    for track in queued:
        yield f"{track.name}: queued{f', failed before: {track.error}' if track.error else ''}"
    if not n and not queued:
        yield "nothing to do"


def _what(store: Store | None, scanned: scanner.ScannedFile, recipe: Any) -> str:
    known = store.file_at(scanned.path) if store else None
    same = known is not None and (known.size, known.mtime_ns, known.inode) == (
        scanned.size,
        scanned.mtime_ns,
        scanned.inode,
    )
    if store is None or known is None or not same or known.moved_to is not None:
        return "new: normalize, embed, generate" if scanned.marked else "waits for its marker"
    track = store.track(known.sha256)
    if track is None or track.state != "done":
        error = f" ({track.error})" if track and track.error else ""
        return f"{track.state if track else 'new'}{error}"
    if track.collected_at is not None:
        return "up to date (its results were removed by gc)"
    wanted = recipe.plan(track.sha256)
    if track.plan_key == wanted.key:
        return "up to date"
    missing = sum(store.unit(unit.key) is None for unit in wanted.variations)
    embed = "embed, " if store.unit(wanted.embed_key) is None else ""
    return f"the configuration has changed: {embed}{missing} variations"


def status(app: App) -> dict[str, Any]:
    """What `status --json` prints."""
    instance = app.workspace.is_locked()
    said = (read_health(app.workspace.health) or {}) if instance else {}
    facts = {
        "instance": instance,
        "mode": said.get("mode"),
        "inbox": said.get("inbox"),
        "degraded": said.get("conditions", []),
    }
    store = app.read_store()
    if store is None:
        return {
            "tracks": dict.fromkeys(STATES, 0),
            **facts,
            "running": [],
            "waiting": [],
            "queue": [],
            "failures": [],
        }
    names = {track.sha256: track.name for track in store.tracks("running")}
    counts = store.counts()
    if not instance:  # what a killed instance left goes on with the next
        counts = {**counts, "queued": counts["queued"] + counts["running"], "running": 0}
    return {
        "tracks": counts,
        **facts,
        "running": [
            {
                "track": names.get(attempt.sha256, attempt.sha256[:8]),
                "sha256": attempt.sha256,
                "stage": attempt.stage,
                "since_s": round(now() - attempt.started_at, 1),
            }
            for attempt in (store.open_attempts() if instance else ())
        ],
        "waiting": [
            {"track": track.name, "until": track.not_before, "error": track.error}
            for track in store.tracks("queued")
            if track.not_before > now()
        ][:LAST_FAILURES],
        "queue": [
            *(names.values() if not instance else ()),
            *(track.name for track in store.tracks("queued", limit=LAST_FAILURES)),
        ],
        "failures": [
            {
                "track": track.name,
                "sha256": track.sha256,
                "path": _path_of(store, track.sha256),
                "stage": track.stage,
                "error": track.error,
                "attempts": track.attempts,
            }
            for track in store.tracks("failed", limit=LAST_FAILURES)
        ],
    }


def _path_of(store: Store, sha256: str) -> str | None:
    from pipeline.fs.names import printable

    files = store.files_of(sha256)
    return printable(files[-1].moved_to or files[-1].path) if files else None


def status_text(facts: dict[str, Any]) -> str:
    lines = [", ".join(f"{n} {state}" for state, n in facts["tracks"].items())]
    mode = f", the inbox is watched by {facts['mode']}" if facts["mode"] else ""
    lines.append(f"an instance is at work{mode}" if facts["instance"] else "no instance is at work")
    for one in facts["degraded"]:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["since"]))
        lines.append(f"degraded since {since}: {one['what']}: {one['text']}")
    arriving = {"waiting": "wait for room", "settling": "may still be written", "unmarked": "have no marker"}
    held = [f"{n} {arriving[what]}" for what, n in (facts["inbox"] or {}).items() if n and what in arriving]
    lines += [f"in the inbox: {', '.join(held)}"] if held else []
    lines += [f"now: {one['track']}: {one['stage']} for {one['since_s']:.0f} s" for one in facts["running"]]
    lines += [
        f"waits until {local_time(one['until'])}: {one['track']}{': ' + one['error'] if one['error'] else ''}"
        for one in facts["waiting"]
    ]
    lines += [f"next: {name}" for name in facts["queue"]]
    lines += [
        f"failed: {one['track']} in {one['stage']} after {one['attempts']} attempts: {one['error']}"
        for one in facts["failures"]
    ]
    return "\n".join(lines)


def show(app: App, wanted: str) -> dict[str, Any]:
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
    lines += [f"came as: {one['file']} ({one['state']})" for one in facts["files"]]
    lines += [f"{one['stage']}: {one['file'] or 'done'} in {one['seconds']} s" for one in facts["units"]]
    lines += [
        f"attempt at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one['started_at']))}: {one['stage']}"
        f" {one['outcome'] or 'runs'}{': ' + one['error'] if one['error'] else ''}"
        for one in facts["attempts"]
    ]
    return "\n".join(lines)


def doctor(app: App, *, repair: bool = False) -> Iterator[tuple[str, str, str]]:
    """(mark, what, text) per check; the mark is ok, note or bad.

    Args:
        repair: queue again what is missing or altered, and clear leftovers. Only for the holder of
            the instance lock.
    """
    yield "ok", "configuration", str(app.config_path or "built in")
    try:
        app.workspace.prepare()
        yield "ok", "folders", f"{app.workspace.inbox}, {app.workspace.outbox}, {app.workspace.state}"
        free = shutil.disk_usage(app.workspace.outbox).free
        yield "bad" if free < LOW_DISK_BYTES else "ok", "disk", f"{free / 1e9:.1f} GB free for the outbox"
    except PipelineError as e:
        yield "bad", "folders", str(e)
    yield from _decoders()
    yield from _engines(app)
    yield from _database(app, repair=repair)


def _decoders() -> Iterator[tuple[str, str, str]]:
    try:
        import av
        import soundfile
    except (ImportError, OSError) as e:
        yield "bad", "decoders", str(e)
        return
    yield "ok", "decoders", f"libsndfile {soundfile.__libsndfile_version__}, PyAV {av.__version__}"


def _engines(app: App) -> Iterator[tuple[str, str, str]]:
    for card in cards().values():
        missing = missing_packages(card)
        text = f"needs {', '.join(missing)}: {card.install}" if missing else card.summary
        yield "note" if missing else "ok", f"{card.stage} engine {card.name}", text
        if found := card.last_check(app.workspace.state / ENGINES_FOLDER):
            yield "ok", f"{card.name} at its last start", found
        for folder in card.leftovers(app.workspace.state / ENGINES_FOLDER):
            with suppress(OSError):  # a run that has just begun removes it
                size = sum(512 * path.lstat().st_blocks for path in folder.iterdir())
                text = f"{folder} has {size / 1e6:.0f} MB of a killed run, for the next to use or remove"
                yield "note", f"{card.name} left behind", text
    try:
        for stage, choice in zip(("embed", "generate"), app.choices(), strict=True):
            where = f", weights in {choice.folder} ({choice.revision})" if choice.folder else ""
            yield "ok", f"{stage} uses", f"{choice.card.name}: {choice.why}{where}"
            if "torch" in choice.card.packages:
                check_device(app.config.device)
            if choice.needs_weights:
                yield "note", f"{stage} weights", f"{choice.model} is not here yet: {hub.FETCH_COMMAND}"
            if stage == "generate":
                app.check_variations(choice)
    except EngineUnusable as e:
        yield "bad", "engines", str(e)


def _database(app: App, *, repair: bool) -> Iterator[tuple[str, str, str]]:
    store = app.open_store() if repair else app.read_store()
    if store is None:
        yield "ok", "database", "not made yet"
        return
    try:
        problems = store.check()
    except sqlite3.Error as e:
        problems = [str(e)]
    yield "bad" if problems else "ok", "database", "; ".join(problems) or f"sound, {store.counts()}"
    if problems:
        return
    outbox = Outbox(app.workspace.outbox)
    redo = repair or app.config.retention.redo_missing  # who asks for it gets it
    found = reconcile(
        store, outbox, app.workspace, thorough=True, repair=repair, redo_missing=redo, now=now()
    )
    if app.workspace.is_locked() and not repair:  # what it writes just now looks like what a kill leaves
        found = [finding for finding in found if finding.kind != "leftover"]
    for finding in found:
        harmless = finding.mended or finding.kind == "stranger"
        yield "note" if harmless else "bad", finding.where, finding.text
    if not found:
        yield "ok", "outbox", "as recorded"
    elif not repair and any(finding.kind in ("result", "leftover") for finding in found):
        yield "note", "repair", "run `doctor --repair` with no instance at work"


def models(app: App) -> Iterator[str]:
    found = [one for one in hub.cached() if one.model_type in MODEL_TYPES]
    for one in found:
        state = "" if one.complete else ", incomplete"
        yield f"{one.model} {one.revision[:12]}: {one.size_bytes / 1e9:.2f} GB ({one.model_type}{state})"
    here = {one.model for one in found if one.complete}
    for model, revision, terms, layout in wanted_models(app, None):
        listed = layout is TRANSFORMERS and model in here
        if not listed and hub.locate(model, revision, layout=layout) is None:
            yield f"{model}: not here; {terms}; {hub.FETCH_COMMAND}"


def wanted_models(app: App, names: Sequence[str] | None) -> Iterator[tuple[str, str | None, str, Layout]]:
    """Model, revision, licence and format of what the configuration's engines can use, or of `names`."""
    companions = {model: layout for card in cards().values() for model, layout in card.companions}
    for name in names or ():
        yield name, None, LICENSE_UNKNOWN, companions.get(name, TRANSFORMERS)
    if names:
        return
    for section, stage in ((app.config.embed, "embed"), (app.config.generate, "generate")):
        for card in cards().values():
            chosen = card.stage == stage and card.is_meant_by(section.engine)
            if chosen and card.default_model is not None:
                model = section.model or card.default_model
                yield model, section.revision, card.license_of(model), card.layout
                yield from ((name, None, LICENSE_UNKNOWN, layout) for name, layout in card.companions)
