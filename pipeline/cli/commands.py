"""The command line: verbs, exit codes, and words for people. Engines load only when a stage runs."""

from __future__ import annotations

import json
import logging
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pipeline.app import App
from pipeline.cli import views
from pipeline.errors import AlreadyRunning, FolderUnusable, PipelineError, Stopped
from pipeline.fs.disk import environment_error
from pipeline.fs.names import printable
from pipeline.intake.archive import restore_to_inbox
from pipeline.maintenance.retention import collect
from pipeline.records import Stage
from pipeline.service.loop import run_once
from pipeline.service.signals import Signals
from pipeline.session import open_session, watch_inbox
from pipeline.store.schema import UNREADABLE
from pipeline.workspace import InputFolder

ALL_DONE, SOME_FAILED, BAD_USAGE, LOCKED, UNUSABLE = range(5)

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
        error = environment_error(e, in_track=False) or e
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


@cli.command()
def once(context: typer.Context, folder: Folder = None) -> int:
    """Process all that is ready, then end."""
    app = _app(context)
    with open_session(app, _input_folder(app, folder), Signals()) as session, session.signals.on_signals():
        try:
            scan_result = run_once(session)
        except Stopped:
            log.info("stopped; what was under way is queued again")
            return 128 + (session.signals.stopped_by or signal.SIGINT)
        result = session.processor.runner.result
    typer.echo(views.summary(result, scan_result, app.workspace.outbox))
    return (
        SOME_FAILED
        if result.failed or scan_result.failed or scan_result.troubled or result.postponed_until is not None
        else ALL_DONE
    )


@cli.command()
def watch(context: typer.Context) -> int:
    """Stay and process what arrives in the inbox."""
    signals = Signals()
    with signals.on_signals(hangup_reloads=True):  # first, so that an early SIGHUP does not end the process
        watch_inbox(_app(context), signals)
    return ALL_DONE


@cli.command()
def plan(context: typer.Context, folder: Folder = None) -> int:
    """What `once` would do now and why, without doing it."""
    app = _app(context)
    for line in views.plan(app, _input_folder(app, folder)):
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
    store = _app(context).open_store()
    found = [store.find(name) for name in tracks] if tracks else store.tracks("failed")
    for track in found:
        if track.state == "failed" and track.stage == UNREADABLE and not store.units_of(track.sha256):
            restore_to_inbox(store, track)
            typer.echo(f"{track.name}: is read again at the next look")
        elif track.state == "failed":
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
        str | None, typer.Option(help=f"Make again from this stage on: {', '.join(Stage)}.")
    ] = None,
) -> int:
    """Make a finished track again: what its configuration now wants otherwise, or from a stage on."""
    if stage is not None and stage not in list(Stage):
        raise typer.BadParameter(f"must be one of {', '.join(Stage)}", param_hint="--stage")
    store = _app(context).open_store()
    found = store.find(track)
    stages = [Stage(stage)] if stage in (Stage.EMBED, Stage.GENERATE) else list(Stage) if stage else []
    if not store.requeue(found.sha256, now=views.now(), stages=stages):
        typer.echo(f"{found.name}: is being worked on; requeue it when it is done", err=True)
        return SOME_FAILED
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
    with app.workspace.locked() if repair else nullcontext():
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
    store = app.open_store()
    removals = collect(store, app.workspace, app.config.retention, now=views.now(), dry_run=dry_run)
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
    from pipeline.weights import hub

    for model, revision, terms, layout in views.wanted_models(_app(context), names):
        typer.echo(f"{model}: {terms}")
        found = hub.fetch(model, revision, layout=layout)
        typer.echo(f"{model}: {found.folder} ({found.revision})")
    return ALL_DONE


@models.command("path")
def models_path(context: typer.Context, name: str) -> int:
    """Where a model's weights are."""
    from pipeline.weights import hub

    found = hub.locate(name)
    if found is None:
        typer.echo(f"{name} is not on this machine: {hub.FETCH_COMMAND} {name}", err=True)
        return SOME_FAILED
    typer.echo(found.folder)
    return ALL_DONE


def _input_folder(app: App, folder: Path | None) -> InputFolder:
    """The folder to scan: the inbox, also when it is given by its path, or another one."""
    if folder is None or folder.resolve() == app.workspace.inbox:
        return app.workspace.input_folder
    if not folder.is_dir():
        raise typer.BadParameter(f"{printable(folder)} is not a folder", param_hint="DIR")
    for ours in (app.workspace.outbox, app.workspace.state):  # results would be taken for sources
        if ours.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(ours):
            raise typer.BadParameter(f"{printable(folder)} and {ours} lie in one another", param_hint="DIR")
    return InputFolder(folder.resolve(), is_inbox=False)
