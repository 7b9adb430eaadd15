"""Everything a working verb needs, set up and taken down in the right order."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path

from rich.console import Console

from pipeline.app import App
from pipeline.errors import DiskFull, FolderUnusable
from pipeline.fs.mounts import mount_of
from pipeline.intake.archive import archive_files, finish_moves
from pipeline.maintenance.reconcile import reconcile
from pipeline.outbox.outbox import Outbox
from pipeline.progress import Reporter, WatchedReporter, reporter_for
from pipeline.runner.retry import take_over
from pipeline.service.health import Health
from pipeline.service.loop import Processor
from pipeline.service.sd_notify import Notifier
from pipeline.service.signals import Signals
from pipeline.store.store import Store
from pipeline.workspace import Workspace

LOG_BYTES, LOG_FILES = 5_000_000, 3
START_PAUSE_S = 10.0  # between tries of `watch` to start up on a full disk
RELEASE_PATIENCE_S = 1.0  # for the database, when the process is about to end anyway

log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Session:
    """What a working verb works with."""

    app: App
    store: Store
    processor: Processor
    signals: Signals
    health: Health
    notifier: Notifier
    reporter: Reporter


@contextmanager
def open_session(app: App, root: Path | None, *, is_watching: bool = False) -> Iterator[Session]:
    """Everything a working verb needs, as the only instance, with signals turned into a stop."""
    console, signals, notifier = Console(stderr=True), Signals(), Notifier.from_env()
    _prepare(app.workspace)
    with app.workspace.locked(), _logged(app.workspace.log, console):
        health = Health(app.workspace.health)
        health.open()
        app.fetch_missing()
        store = app.store()
        assert store is not None
        signals.overdue = partial(_leave_at_once, app.workspace.database, is_watching=is_watching)
        try:
            _see_the_outbox(app, store)
            given_up = _pick_up(app, store)
            reporter = WatchedReporter(reporter_for(console), notifier.progress)
            with signals.on_signals(hangup_reloads=is_watching), reporter:
                processor = app.processor(store, root, reporter, signals)
                processor.runner.outcome.failed += given_up
                yield Session(app, store, processor, signals, health, notifier, reporter)
        finally:
            health.close()
            store.close()


def _prepare(workspace: Workspace) -> None:
    """Make and try the folders; a disk that is full of our own intermediate files is no reason to give up."""
    try:
        workspace.prepare()
    except DiskFull:
        if workspace.state.is_dir():
            with workspace.locked():
                workspace.drop_normalized()
        workspace.prepare()


def wait_for_room(app: App, full: DiskFull) -> bool:
    """Wait a while before `watch` starts up anew on a full disk; False if it was asked to stop."""
    signals, health = Signals(), Health(app.workspace.health)
    here = app.workspace.state.is_dir()
    with app.workspace.locked() if here else nullcontext(), signals.on_signals(hangup_reloads=True):
        if here:
            health.open()
            health.degraded("disk", str(full))
        log.warning("%s; tried again in %.0f s", full, START_PAUSE_S)
        signals.wait(START_PAUSE_S)
    return not signals.is_stopped()


def _see_the_outbox(app: App, store: Store) -> None:
    """Refuse an outbox whose disk isn't mounted: all results would seem to be missing, and be made again.

    Raises:
        FolderUnusable: it was on a mount of its own, and is an empty folder below that mount now.
    """
    mount = mount_of(app.workspace.outbox)
    if mount is None:
        return
    before, now = store.fact("outbox mount"), str(mount.mount_point)
    was_deeper = before is not None and len(before) > len(now) and app.workspace.outbox.is_relative_to(before)
    if was_deeper and not any(app.workspace.outbox.iterdir()):
        raise FolderUnusable(f"the outbox was on a disk mounted at {before}, which isn't mounted now")
    if before != now:
        store.note_fact("outbox mount", now)


def _pick_up(app: App, store: Store) -> int:
    """Put in order what a killed instance left, before anything else; returns how many tracks that failed."""
    config, inbox = app.config, app.workspace.inbox
    given_up = 0
    for crashed in take_over(store, config.retry, now=time.time()):
        track, then = crashed.track, "given up" if crashed.given_up else "goes on"
        log.info("%s: was cut off in %s, %s", track.name, crashed.stage, then)
        if crashed.given_up:
            given_up += 1
            files = store.files_of(track.sha256)
            archive_files(store, files, inbox, config.intake, error=f"{track.name}: {crashed.error}")
    finish_moves(store, inbox)
    for finding in reconcile(
        store,
        Outbox(app.workspace.outbox),
        app.workspace,
        thorough=False,
        repair=True,
        redo_missing=config.retention.redo_missing,
        now=time.time(),
    ):
        log.warning("%s: %s", finding.where, finding.text)
    return given_up


def _leave_at_once(database: Path, signum: int, *, is_watching: bool) -> None:
    """The work didn't come to its next step in time: put it back and end, which is safe at any moment."""
    log.warning("the work did not stop in time and is cut off; it is queued again")
    with suppress(sqlite3.Error):
        Store(database, busy_timeout_s=RELEASE_PATIENCE_S).release_all(now=time.time())
    os._exit(0 if is_watching else 128 + signum)


@contextmanager
def _logged(path: Path, console: Console) -> Iterator[None]:
    """People's lines to the terminal, everything with tracebacks to a file that can't grow for ever."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    handler = _FileHandler(
        path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    watchdog = logging.getLogger("watchdog")
    watchdog.propagate = False
    added = [(log, handler), (log, _ConsoleHandler(console)), (watchdog, handler)]
    for logger, one in added:
        logger.addHandler(one)
    try:
        yield
    finally:
        for logger, one in added:
            logger.removeHandler(one)
            with suppress(OSError):
                one.close()


class _FileHandler(RotatingFileHandler):
    """A line that can't be written, to a full disk say, is on the terminal all the same."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's own name)
        pass


class _ConsoleHandler(logging.Handler):
    """Through the console that draws the bars, so that a line doesn't tear them."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console
        form = "%(message)s" if console.is_terminal else "%(asctime)s %(levelname)s %(message)s"
        self.setFormatter(logging.Formatter(form))

    def emit(self, record: logging.LogRecord) -> None:
        record.exc_text = None
        plain = logging.makeLogRecord({**record.__dict__, "exc_info": None})
        self._console.print(self.format(plain), markup=False, highlight=False, soft_wrap=True)
