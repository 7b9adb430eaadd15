"""`doctor`: checks the installation, the machine and the home; a failed check does not end the others."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.app import App
from pipeline.engines import cards
from pipeline.engines.base import StageName
from pipeline.engines.pretrained import check_device
from pipeline.engines.selection import missing_packages
from pipeline.errors import PipelineError
from pipeline.executors.beside import n_generators
from pipeline.fs.bucket import BucketFiles
from pipeline.fs.disk import environment_error
from pipeline.fs.names import printable
from pipeline.maintenance.reconcile import check_outbox_mount, reconcile
from pipeline.outbox.outbox import Outbox
from pipeline.ratings.agreement import agreements
from pipeline.service.health import read_health
from pipeline.store.store import Store
from pipeline.weights import hub
from pipeline.workspace import ENGINES_FOLDER

LOW_DISK_BYTES = 2 << 30


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    mark: Literal["ok", "note", "bad"]
    what: str
    text: str


def run_checks(app: App, *, repair: bool) -> Iterator[Check]:
    """Run all checks.

    Args:
        repair: queue missing or altered results again, and remove leftovers. Only for the holder of
            the instance lock.
    """
    yield Check("ok", "configuration", str(app.config_path or "built in"))
    checks = {
        "folders": _folders(app),
        "decoders": _decoders(),
        "engines": _engines(app),
        **{f"engine of {stage}": _choice(app, stage) for stage in app.stages},
        **({"ray": _ray(app)} if app.config.executor.kind == "ray" else {}),
        "workers": _workers(app),
        "database": _database(app, repair=repair),
    }
    for what, results in checks.items():
        try:
            yield from results
        except Exception as e:
            error = environment_error(e, in_track=False) or e
            if not isinstance(error, PipelineError):
                raise
            yield Check("bad", what, str(error))


def _folders(app: App) -> Iterator[Check]:
    app.workspace.prepare()
    folders = (app.workspace.inbox, app.workspace.outbox, app.workspace.state)
    yield Check("ok", "folders", ", ".join(map(printable, folders)))
    for files in (app.workspace.inbox_files, app.workspace.outbox_files):
        if isinstance(files, BucketFiles):
            files.check_conditions(uuid.uuid4().hex)
            yield Check("ok", "bucket", f"{files.url} honours the conditions of writes")
    free = min(shutil.disk_usage(folder).free for folder in app.workspace.disks)
    mark: Literal["ok", "bad"] = "bad" if free < LOW_DISK_BYTES else "ok"
    yield Check(mark, "disk", f"{free / 1e9:.1f} GB free for results and working copies")


def _decoders() -> Iterator[Check]:
    import av
    import soundfile

    ffmpeg, sndfile = av.ffmpeg_version_info, soundfile.__libsndfile_version__
    yield Check("ok", "decoders", f"FFmpeg {ffmpeg} (PyAV {av.__version__}), libsndfile {sndfile}")


def _engines(app: App) -> Iterator[Check]:
    """Which engines are installed, and what they have recorded about themselves."""
    folder = app.workspace.state / ENGINES_FOLDER
    for card in cards().values():
        if missing := missing_packages(card):
            text = f"needs {', '.join(missing)}: {card.install}"
            yield Check("note", f"{card.stage} engine {card.name}", text)
        else:
            yield Check("ok", f"{card.stage} engine {card.name}", card.summary)
        if card.upkeep and (found := card.upkeep.last_start(folder)):
            yield Check("ok", f"{card.name} at its last start", found)


def _choice(app: App, stage: StageName) -> Iterator[Check]:
    """Which engine the configuration uses for a stage, and whether everything that it needs is here."""
    choice = app.choice(stage)
    where = f", weights in {choice.folder} ({choice.revision})" if choice.folder else ""
    yield Check("ok", f"{stage} uses", f"{choice.card.name}: {choice.why}{where}")
    if "torch" in choice.card.packages and app.config.executor.kind != "ray":
        check_device(app.config.device)
    if choice.needs_weights:
        text = f"{choice.model} is not on this machine yet: {hub.FETCH_COMMAND}"
        yield Check("note", f"{stage} weights", text)
    if stage == "generate":
        app.check_variations(choice)


def _ray(app: App) -> Iterator[Check]:
    """The nodes of the Ray cluster, and versions there that differ from those here."""
    cluster = app.ray_cluster(app.engine_choices)
    try:
        nodes = cluster.nodes()
        for total, node in nodes:
            installed = ", ".join(f"{name} {version}" for name, version in node.versions.items())
            yield Check("ok", f"ray {node.where}", f"{total}; {installed}")
        for sentence in cluster.differences([node for _, node in nodes]):
            yield Check("bad", "ray versions", sentence)
        n = n_generators(cluster.ready())
        yield Check("ok", "ray workers", f"{n} with {cluster.resources} each (cluster: {cluster.address})")
    finally:
        cluster.close()


def _workers(app: App) -> Iterator[Check]:
    """The engines that each worker of a running instance has loaded."""
    report = (read_health(app.workspace.health) or {}) if app.workspace.is_locked() else {}
    for worker in report.get("workers", ()):
        loaded = ", ".join(worker.get("loaded", ())) or "no engine"
        yield Check("ok", f"worker ({worker['where']})", f"has {loaded} loaded")


def _database(app: App, *, repair: bool) -> Iterator[Check]:
    """Whether the database is intact, and if so, whether every recorded result is in the outbox."""
    if not app.workspace.database.exists():
        yield Check("ok", "database", "not created yet: nothing has been processed")
        return
    store = Store(app.workspace.database, read_only=not repair)
    store.check()
    counts = ", ".join(f"{n} {state}" for state, n in store.counts().items())
    yield Check("ok", "database", f"intact: {counts}")
    for engine, text in agreements(store):
        yield Check("ok", f"ratings of {engine}", text)
    check_outbox_mount(app.workspace.outbox, store)
    findings = reconcile(
        store,
        Outbox(app.workspace.outbox_files),
        app.workspace,
        thorough=True,
        repair=repair,
        redo_missing=repair or app.config.retention.redo_missing,  # an explicit --repair wins
        now=time.time(),
    )
    if app.workspace.is_locked() and not repair:  # files of the running instance look like leftovers
        findings = [finding for finding in findings if finding.kind != "leftover"]
    for finding in findings:
        is_harmless = finding.mended or finding.kind == "unknown"
        yield Check("note" if is_harmless else "bad", finding.where, finding.text)
    if not findings:
        yield Check("ok", "outbox", "all results are as recorded")
    elif not repair and any(finding.kind in ("result", "leftover") for finding in findings):
        yield Check("note", "repair", "stop the running instance, if any, and run `doctor --repair`")
