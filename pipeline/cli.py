"""The command line: verbs, exit codes, and words for people. Engines load only when a stage runs."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline import views
from pipeline.alarm import Alarm
from pipeline.app import App
from pipeline.arrivals import finish_moves, put_away
from pipeline.disk import machines_fault
from pipeline.errors import AlreadyRunning, DiskFull, FolderUnusable, PipelineError, Stopped
from pipeline.health import Health
from pipeline.names import printable
from pipeline.notify import Notifier
from pipeline.outbox import Outbox
from pipeline.reconcile import reconcile
from pipeline.report import Reporter, WatchedReporter, reporter_for
from pipeline.retention import collect
from pipeline.retry import take_over
from pipeline.service import Crew, Watch, run_once
from pipeline.stages import STAGES
from pipeline.store import Store

ALL_DONE, SOME_FAILED, BAD_USAGE, LOCKED, UNUSABLE = range(5)
LOG_BYTES, LOG_FILES = 5_000_000, 3
DISK_PAUSE_S = 10.0  # between tries of `watch` to start up on a full disk
RELEASE_PATIENCE_S = 1.0  # for the database, when the process is about to end anyway

log = logging.getLogger("pipeline")
cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
models = typer.Typer(no_args_is_help=True, help="The models' weights on this machine.")
cli.add_typer(models, name="models")


def main(default_home: Path) -> int:
    """Run a command; returns the exit code of the contract (README, "Exit codes")."""
    try:
        result = cli(standalone_mode=False, obj={"default_home": default_home}, prog_name="run_pipeline.py")
        return int(result or ALL_DONE)
    except typer.Exit as e:
        return e.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except Exception as e:
        if hasattr(e, "exit_code") and hasattr(e, "show"):
            e.show()  # click's own usage errors
            return BAD_USAGE
        error = machines_fault(e) or e
        if not isinstance(error, PipelineError):
            raise
        typer.echo(str(error), err=True)
        if isinstance(error, AlreadyRunning):
            return LOCKED
        return UNUSABLE if isinstance(error, FolderUnusable) else BAD_USAGE


@cli.callback(help="Similar variations of instrumentals, and vectors to find them by, in batch.")
def options(
    context: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(
            help="Folder that the configuration's relative paths resolve in.", envvar="PIPELINE_HOME"
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file instead of HOME/config/default.yaml.")
    ] = None,
) -> None:
    context.obj["home"] = home or context.obj["default_home"]
    context.obj["config"] = config


def _app(context: typer.Context) -> App:
    return App.open(context.obj["home"], context.obj["config"])


Folder = Annotated[
    Path | None, typer.Argument(metavar="DIR", help="A folder of tracks, left in place; default: the inbox.")
]
Tracks = Annotated[
    list[str] | None, typer.Argument(help="Names or starts of hashes; default: all that failed.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@dataclass(frozen=True)
class Office:
    """What a working verb works with."""

    app: App
    store: Store
    crew: Crew
    alarm: Alarm
    health: Health
    notifier: Notifier
    reporter: Reporter


@contextmanager
def _at_work(app: App, root: Path | None, *, is_watching: bool = False) -> Iterator[Office]:
    """Everything a working verb needs, as the only instance, with signals turned into a stop."""
    console, alarm, notifier = Console(stderr=True), Alarm(), Notifier.from_env()
    app.workplace.prepare()
    with app.workplace.locked(), _logged(app.workplace.log, console):
        health = Health(app.workplace.health)
        health.open()
        app.fetch_missing()
        store = app.store()
        assert store is not None
        alarm.overdue = partial(_leave_at_once, app.workplace.database, is_watching=is_watching)
        try:
            _pick_up(app, store)
            reporter = WatchedReporter(reporter_for(console), notifier.progress)
            with alarm.on_signals(hangup_reloads=is_watching), reporter:
                crew = app.crew(store, root, reporter, alarm)
                yield Office(app, store, crew, alarm, health, notifier, reporter)
        finally:
            health.close()
            store.close()


def _pick_up(app: App, store: Store) -> None:
    """Put in order what a killed instance left, before anything else is done."""
    config, inbox = app.config, app.workplace.inbox
    for crashed in take_over(store, config.retry, now=views.now()):
        track, then = crashed.track, "given up" if crashed.given_up else "goes on"
        log.info("%s: was cut off in %s, %s", track.name, crashed.stage, then)
        if crashed.given_up:
            files = store.files_of(track.sha256)
            put_away(store, files, inbox, config.intake, error=f"{track.name}: {crashed.error}")
    finish_moves(store, inbox)
    for finding in reconcile(
        store,
        Outbox(app.workplace.outbox),
        app.workplace,
        thorough=False,
        repair=True,
        redo_missing=config.retention.redo_missing,
        now=views.now(),
    ):
        log.warning("%s: %s", finding.where, finding.text)


def _leave_at_once(database: Path, signum: int, *, is_watching: bool) -> None:
    """The work didn't come to its next step in time: put it back and end, which is safe at any moment."""
    log.warning("the work did not stop in time and is cut off; it is queued again")
    with suppress(sqlite3.Error):
        Store(database, busy_timeout_s=RELEASE_PATIENCE_S).release_all(now=views.now())
    os._exit(ALL_DONE if is_watching else 128 + signum)


@cli.command()
def once(context: typer.Context, folder: Folder = None) -> int:
    """Process all that is ready, then end."""
    app = _app(context)
    root = _root(app, folder)
    with _at_work(app, root) as office:
        try:
            look = run_once(office.crew, office.alarm, office.health)
        except Stopped:
            log.info("stopped; what was under way is queued again")
            return 128 + (office.alarm.stopped_by or signal.SIGINT)
        outcome = office.crew.runner.outcome
    typer.echo(views.summary(outcome, look, app.workplace.outbox))
    return SOME_FAILED if outcome.failed or look.failed else ALL_DONE


@cli.command()
def watch(context: typer.Context) -> int:
    """Stay and process what arrives in the inbox."""
    app = _app(context)
    while True:
        try:
            with _at_work(app, None, is_watching=True) as office:
                _watch(office)
            return ALL_DONE
        except DiskFull as e:  # at start-up; later it is waited out with everything open
            typer.echo(f"{e}; tried again in {DISK_PAUSE_S:.0f} s", err=True)
            time.sleep(DISK_PAUSE_S)


def _watch(office: Office) -> None:
    watcher, mode = office.app.watcher(office.alarm)
    office.health.note(mode=mode)
    log.info("the inbox is watched by %s", mode)
    app = office.app

    def reload(crew: Crew) -> Crew:
        nonlocal app
        fresh = app.reopened()
        fresh.fetch_missing()
        engines = crew.runner.engines
        crew = fresh.crew(office.store, None, office.reporter, office.alarm, engines=engines)
        app = fresh
        return crew

    Watch(office.crew, watcher, office.alarm, office.health, office.notifier, reload).run()
    log.info("stopped")


@cli.command()
def plan(context: typer.Context, folder: Folder = None) -> int:
    """What `once` would do now and why, without doing it."""
    app = _app(context)
    for line in views.plan(app, _root(app, folder)):
        typer.echo(line)
    return ALL_DONE


@cli.command()
def status(context: typer.Context, as_json: AsJson = False) -> int:
    """Counts per state, what runs now, the queue, the last failures."""
    facts = views.status(_app(context))
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else views.status_text(facts))
    return ALL_DONE


@cli.command()
def show(context: typer.Context, track: str, as_json: AsJson = False) -> int:
    """One track: stages, attempts, errors, files."""
    facts = views.show(_app(context), track)
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else views.show_text(facts))
    return ALL_DONE


@cli.command()
def retry(context: typer.Context, tracks: Tracks = None) -> int:
    """Queue failed tracks again."""
    store = _app(context).store()
    assert store is not None
    found = [store.find(name) for name in tracks] if tracks else store.tracks("failed")
    for track in found:
        if track.state == "failed":
            store.requeue(track.sha256, now=views.now())
            typer.echo(f"{track.name}: queued again")
        else:
            typer.echo(f"{track.name}: is {track.state}, not failed")
    if not found:
        typer.echo("nothing has failed")
    return ALL_DONE


@cli.command()
def requeue(
    context: typer.Context,
    track: str,
    stage: Annotated[
        str | None, typer.Option(help=f"Make again from this stage on: {', '.join(STAGES)}.")
    ] = None,
) -> int:
    """Make a finished track again: what its configuration now wants otherwise, or from a stage on."""
    if stage is not None and stage not in STAGES:
        raise typer.BadParameter(f"must be one of {', '.join(STAGES)}", param_hint="--stage")
    store = _app(context).store()
    assert store is not None
    found = store.find(track)
    stages = {"embed": ["embed"], "generate": ["generate"]}.get(stage or "", STAGES if stage else [])
    store.requeue(found.sha256, now=views.now(), stages=stages)
    typer.echo(f"{found.name}: queued again")
    return ALL_DONE


@cli.command()
def doctor(
    context: typer.Context,
    repair: Annotated[
        bool, typer.Option(help="Queue again what is missing or altered, clear leftovers.")
    ] = False,
) -> int:
    """Check the configuration, folders, disk, decoders, engines, database and outbox."""
    app = _app(context)
    worst = ALL_DONE
    with app.workplace.locked() if repair else nullcontext():
        for mark, what, text in views.doctor(app, repair=repair):
            typer.echo(f"{mark:<5} {what}: {text}")
            worst = max(worst, SOME_FAILED if mark == "bad" else ALL_DONE)
    return worst


@cli.command()
def gc(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option(help="Say what would be removed, and remove nothing.")] = False,
) -> int:
    """Remove old working copies, sources and results as `retention` says; never what is still needed."""
    app = _app(context)
    store = app.store()
    assert store is not None
    removals = collect(store, app.workplace, app.config.retention, now=views.now(), dry_run=dry_run)
    for removal in removals:
        size = f"{removal.bytes / 1e6:.1f} MB"
        typer.echo(f"{removal.what}: {printable(removal.path)} ({size}): {removal.why}")
    total = sum(removal.bytes for removal in removals)
    typer.echo(f"{len(removals)} {'would be ' if dry_run else ''}removed, {total / 1e6:.1f} MB")
    return ALL_DONE


@models.command("list")
def models_list(context: typer.Context) -> int:
    """Models whose weights are on this machine."""
    for line in views.models(_app(context)):
        typer.echo(line)
    return ALL_DONE


@models.command("fetch")
def models_fetch(context: typer.Context, names: Annotated[list[str] | None, typer.Argument()] = None) -> int:
    """Download weights ahead of time; default: those the configuration can use."""
    from pipeline import weights

    for model, revision, terms in views.wanted_models(_app(context), names):
        typer.echo(f"{model}: {terms}")
        found = weights.fetch(model, revision)
        typer.echo(f"{model}: {found.folder} ({found.revision})")
    return ALL_DONE


@models.command("path")
def models_path(context: typer.Context, name: str) -> int:
    """Where a model's weights are."""
    from pipeline import weights

    found = weights.locate(name)
    if found is None:
        typer.echo(f"{name} is not on this machine: {weights.FETCH_COMMAND} {name}", err=True)
        return SOME_FAILED
    typer.echo(found.folder)
    return ALL_DONE


def _root(app: App, folder: Path | None) -> Path | None:
    """The folder to scan; None is the inbox, also when it is named: its `done` is no input."""
    if folder is None or folder.resolve() == app.workplace.inbox:
        return None
    if not folder.is_dir():
        raise typer.BadParameter(f"{printable(folder)} is not a folder", param_hint="DIR")
    for ours in (app.workplace.outbox, app.workplace.state):  # results would be taken for sources
        if ours.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(ours):
            raise typer.BadParameter(f"{printable(folder)} and {ours} lie in one another", param_hint="DIR")
    return folder.resolve()


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
