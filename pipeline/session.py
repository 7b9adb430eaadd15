"""One run of a working command: the lock, the log, recovery after a crash, and an orderly end."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial

from rich.console import Console

from pipeline.app import App
from pipeline.errors import (
    BucketAway,
    DiskFull,
    EngineUnusable,
    FolderUnusable,
    PipelineError,
    os_reason,
)
from pipeline.executors.process import kill_workers
from pipeline.intake.archive import archive_files, recover_moves
from pipeline.logs import is_journal, logging_to
from pipeline.maintenance.reconcile import OUTBOX_MOUNT, check_outbox_mount, reconcile
from pipeline.outbox.outbox import Outbox
from pipeline.progress import LogReporter, Reporter, TerminalReporter
from pipeline.runner.retry import recover_crashed
from pipeline.service.health import Health
from pipeline.service.loop import LONGEST_PAUSE_S, Session, Watch, condition_name
from pipeline.service.metrics import Metrics
from pipeline.service.sd_notify import Notifier
from pipeline.service.signals import Signals
from pipeline.store.store import Store
from pipeline.workspace import InputFolder, Workspace, expand_user

START_PAUSE_S = 10.0  # between the first tries of `watch` to start on a full disk or without an engine
RELEASE_PATIENCE_S = 1.0  # for the database, when the process is about to end anyway

log = logging.getLogger("pipeline")

View = Callable[[App, Console], AbstractContextManager[None]]  # shows on a terminal what an instance does


@contextmanager
def open_session(
    app: App, folder: InputFolder, signals: Signals, *, view: View | None = None, is_watching: bool = False
) -> Iterator[Session]:
    """Open everything that a working command needs, as the only instance."""
    console, notifier = Console(stderr=True), Notifier.from_env()
    log_format = app.config.log.format
    as_json = log_format == "json" or (log_format == "auto" and is_journal())
    is_live = console.is_terminal and not as_json and view is not None
    _prepare(app.workspace)
    with (
        app.workspace.locked(),
        logging_to(app.workspace.log, console, as_json=as_json),
        app.workspace.leased(),
    ):
        health = Health(app.workspace.health)
        health.note(watchdog_s=notifier.watchdog_s)
        app.fetch_missing()
        store = app.open_store()
        signals.overdue = partial(_release_and_exit, app.workspace, is_watching=is_watching)
        try:
            if mount := check_outbox_mount(app.workspace.outbox, store):
                store.set_fact(OUTBOX_MOUNT, mount)
            given_up = _recover(app, store)

            def progress() -> None:
                notifier.progress()
                health.progress()

            reporter: Reporter = TerminalReporter(console, progress) if is_live else LogReporter(progress)
            ingest, runner = app.ingest_and_runner(store, folder, reporter, signals)
            runner.result.failed |= given_up
            session = Session(app, ingest, runner, signals, health, notifier)
            health.workers = session.workers
            with _metrics(app, health), view(app, console) if is_live and view else nullcontext():
                session.note_wanted()
                try:
                    yield session
                finally:
                    session.runner.close()
                    if gallery := session.runner.gallery:
                        with suppress(OSError, PipelineError):
                            gallery.refresh(force=True)
        finally:
            store.close()


@contextmanager
def _metrics(app: App, health: Health) -> Iterator[None]:
    """Publish metrics as the configuration says. A port that can't be used ends no work."""
    asked, workspace = app.config.metrics, app.workspace
    textfile = app.home / expand_user(asked.textfile) if asked.textfile else workspace.state / "metrics.prom"
    metrics = Metrics(workspace, textfile)
    health.on_report = metrics.on_report
    with ExitStack() as on_end:
        on_end.callback(metrics.end)
        if asked.port is not None:
            try:
                on_end.enter_context(metrics.served(asked.port))
            except OSError as e:
                health.degraded("metrics", f"port {asked.port} (metrics.port) can't be used: {os_reason(e)}")
        yield


def _prepare(workspace: Workspace) -> None:
    """Make and check the folders; on a full disk, remove our own intermediate files and try once more."""
    try:
        workspace.prepare()
    except DiskFull:
        if workspace.state.is_dir():
            with workspace.locked():
                workspace.drop_normalized()
        workspace.prepare()


def watch_inbox(app: App, signals: Signals, view: View | None = None) -> None:
    """Run the daemon until a signal asks to stop.

    A full disk, a bucket that doesn't answer or an unusable engine at the start is waited out like one
    during the work.
    """
    signals.overdue = lambda signum: os._exit(0)
    pause_s = START_PAUSE_S
    while not signals.is_stopped():
        try:
            folder = app.workspace.input_folder
            with open_session(app, folder, signals, view=view, is_watching=True) as session:
                Watch(session).run()
                log.info("stopped")
        except (BucketAway, DiskFull, EngineUnusable) as e:
            _wait_to_start(app, signals, e, pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            with suppress(PipelineError):  # the configuration may have been changed meanwhile
                app = app.reopened()


def _wait_to_start(
    app: App, signals: Signals, fault: FolderUnusable | EngineUnusable, pause_s: float
) -> None:
    health, notifier = Health(app.workspace.health), Notifier.from_env()
    notifier.ready()  # a service that waits is running, and its watchdog must not act
    notifier.progress()
    has_state = app.workspace.state.is_dir()
    with app.workspace.locked() if has_state else nullcontext():
        if has_state:
            health.degraded(condition_name(fault), str(fault))
        log.warning("%s; trying again in %.0f s", fault, pause_s)
        signals.wait(pause_s)


def _recover(app: App, store: Store) -> set[str]:
    """Put in order what a killed instance left; returns the hashes of the tracks that are given up."""
    config, inbox = app.config, app.workspace.inbox_files
    given_up = recover_crashed(store, config, now=time.time())
    for track in given_up:
        files = store.files_of(track.sha256)
        archive_files(store, files, inbox, config.intake, error=f"{track.name}: {track.error}")
    recover_moves(store, inbox)
    for finding in reconcile(
        store,
        Outbox(app.workspace.outbox_files),
        app.workspace,
        thorough=False,
        repair=True,
        redo_missing=config.retention.redo_missing,
        now=time.time(),
    ):
        log.warning("%s: %s", finding.where, finding.text)
    return {track.sha256 for track in given_up}


def _release_and_exit(workspace: Workspace, signum: int, *, is_watching: bool) -> None:
    """End the process because the work did not stop in time, which is safe at any moment."""
    log.warning("the work did not stop in time and is cut off; it is queued again")
    with suppress(sqlite3.Error, FolderUnusable):
        Store(workspace.database, busy_timeout_s=RELEASE_PATIENCE_S).release_all(now=time.time())
    kill_workers()
    os._exit(0 if is_watching else 128 + signum)
