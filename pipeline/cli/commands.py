"""The verbs and their exit codes.

What only some verbs use is imported inside them, so that `status` and `plan` answer quickly.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import __version__
from pipeline.app import DEFAULT_CONFIG, App
from pipeline.config import Folders
from pipeline.errors import AlreadyRunning, ConfigError, FolderUnusable, PipelineError, Stopped
from pipeline.fs.disk import environment_error
from pipeline.fs.names import printable
from pipeline.records import Stage
from pipeline.workspace import InputFolder, Workspace

ALL_DONE, SOME_FAILED, BAD_USAGE, LOCKED, UNUSABLE = range(5)
TEMPLATE = Path(__file__).with_name("template")  # the folder `config` of a new home

SOURCE_GONE = "its source is gone: put it in the inbox first"

log = logging.getLogger("pipeline")
cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
models = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List and download the models' weights."
)
cli.add_typer(models, name="models")
embeddings = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The vectors of the library.")
cli.add_typer(embeddings, name="embeddings")


def main(default_home: Path | None = None) -> int:
    """Run the command of `sys.argv` and return its exit code.

    `default_home` is used without --home and PIPELINE_HOME; None: the current folder.
    """
    try:
        name = Path(sys.argv[0]).name
        result = cli(standalone_mode=False, obj={"default_home": default_home}, prog_name=name)
        return int(result or ALL_DONE)
    except typer.Exit as e:
        return e.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except Exception as e:
        if hasattr(e, "exit_code") and hasattr(e, "show"):
            e.show()  # typer's own usage errors
            return BAD_USAGE
        error = environment_error(e, in_track=False) or e
        if not isinstance(error, PipelineError):
            raise
        typer.echo(str(error), err=True)
        if isinstance(error, AlreadyRunning):
            return LOCKED
        return UNUSABLE if isinstance(error, FolderUnusable) else BAD_USAGE


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(__version__)
        raise typer.Exit()


@cli.callback(help="Make similar variations of instrumentals, and embeddings to find them by, in batch.")
def options(
    context: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which the configuration's relative paths resolve.", envvar="PIPELINE_HOME"
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file to use instead of HOME/config/default.yaml.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Settings that win over the configuration: HOME/config/presets/NAME.yaml."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    context.obj.update(home=home, config=config, preset=preset)


def _folder(context: typer.Context) -> Path:
    """The home that was named, or the default one, or the current folder."""
    return Path(context.obj["home"] or context.obj["default_home"] or Path.cwd())


def _app(context: typer.Context) -> App:
    """Open the home.

    With a configuration of the command line, any existing folder will do.

    Raises:
        ConfigError: the folder is not a home. A mistyped path must not be filled with new folders.
    """
    home, config, preset = _folder(context), context.obj["config"], context.obj["preset"]
    if not home.is_dir():
        problem = "does not exist" if not home.exists() else "is not a folder"
    elif config is not None or (home / DEFAULT_CONFIG).is_file() or (home / Folders().inbox).is_dir():
        return App.open(home, config, preset)
    else:
        problem = f"is not a home: it has neither {DEFAULT_CONFIG} nor a folder inbox"
    raise ConfigError(
        f"{printable(home)} {problem}: name another home with --home, or make one with"
        f" `{context.find_root().info_name} init {printable(home)}`"
    )


Folder = Annotated[
    Path | None,
    typer.Argument(
        metavar="DIR", help="Folder whose tracks are processed and left in place; default: the inbox."
    ),
]
Tracks = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TRACK", help="Parts of names, or the starts of hashes; default: all that failed."
    ),
]
TrackName = Annotated[
    str, typer.Argument(metavar="TRACK", help="Part of a track's name, or the start of its hash.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


@cli.command()
def init(
    context: typer.Context, folder: Annotated[Path, typer.Argument(metavar="DIR", help="The new home.")]
) -> int:
    """Make a new home: a configuration and the folders."""
    config = folder / DEFAULT_CONFIG
    if config.exists():
        raise ConfigError(f"{printable(config)} exists: {printable(folder)} is a home already")
    workspace = Workspace.of(folder, Folders())
    workspace.prepare()
    shutil.copytree(TEMPLATE, config.parent, dirs_exist_ok=True)
    program = context.find_root().info_name
    typer.echo(f"put tracks into {workspace.inbox}, then run `{program} --home {workspace.home} once`")
    return ALL_DONE


@cli.command()
def once(context: typer.Context, folder: Folder = None) -> int:
    """Process all tracks that are ready, then end."""
    from pipeline.cli.gallery import index_of
    from pipeline.cli.live import bars_on
    from pipeline.cli.status import summary
    from pipeline.service.loop import run_once
    from pipeline.service.signals import Signals
    from pipeline.session import open_session

    app = _app(context)
    opened = open_session(app, _input_folder(app, folder), Signals(), view=bars_on)
    with opened as session, session.signals.on_signals():
        try:
            scan_result = run_once(session)
        except Stopped:
            log.info("stopped; unfinished tracks are queued again")
            return 128 + (session.signals.stopped_by or signal.SIGINT)
        result = session.runner.result
    typer.echo(summary(result, scan_result, app.workspace.outbox))
    if result.done and app.config.gallery.enabled:
        typer.echo(f"to listen and compare, open {index_of(app.workspace.outbox)}")
    unfinished = scan_result.failed or scan_result.read_errors or result.postponed_until is not None
    return SOME_FAILED if result.failed or unfinished else ALL_DONE


@cli.command()
def watch(context: typer.Context) -> int:
    """Keep running and process what arrives in the inbox."""
    from pipeline.cli.live import bars_on
    from pipeline.service.signals import Signals
    from pipeline.session import watch_inbox

    signals = Signals()
    with signals.on_signals(hangup_reloads=True):  # first, so that an early SIGHUP does not end the process
        watch_inbox(_app(context), signals, bars_on)
    return ALL_DONE


@cli.command()
def plan(context: typer.Context, folder: Folder = None) -> int:
    """Show what `once` would do now and why, without doing it."""
    from pipeline.cli.plan import plan_lines

    app = _app(context)
    for line in plan_lines(app, _input_folder(app, folder)):
        typer.echo(line)
    return ALL_DONE


@cli.command()
def status(
    context: typer.Context,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it until Ctrl-C, always up to date.")] = False,
) -> int:
    """Show counts, running work, the queue and failures."""
    from pipeline.cli.status import status_facts, status_text

    if watch and as_json:
        raise typer.BadParameter("--json and --watch don't go together")
    if watch:
        from rich.console import Console

        from pipeline.cli.live import watch_status

        with suppress(KeyboardInterrupt, BrokenPipeError):
            watch_status(_app(context), Console())
        return ALL_DONE
    facts = status_facts(_app(context))
    typer.echo(_json(facts) if as_json else status_text(facts))
    return ALL_DONE


@cli.command()
def health(context: typer.Context) -> int:
    """Say whether an instance is at work and nothing is degraded; otherwise the exit code is 1."""
    from pipeline.cli.status import health_text

    is_well, text = health_text(_app(context), now=time.time())
    typer.echo(text)
    return ALL_DONE if is_well else SOME_FAILED


@cli.command()
def show(context: typer.Context, track: TrackName, as_json: AsJson = False) -> int:
    """Show one track: its stages, attempts, errors and files."""
    from pipeline.cli.status import show_facts, show_text

    facts = show_facts(_app(context), track)
    typer.echo(_json(facts) if as_json else show_text(facts))
    return ALL_DONE


@cli.command()
def retry(context: typer.Context, tracks: Tracks = None) -> int:
    """Queue failed tracks again."""
    from pipeline.intake.archive import restore_to_inbox
    from pipeline.maintenance.reconcile import has_source
    from pipeline.store.schema import UNREADABLE, TrackState

    app = _app(context)
    store = app.open_store()
    found = [store.find(name) for name in tracks] if tracks else store.tracks(TrackState.FAILED)
    for track in found:
        if track.state != TrackState.FAILED:
            typer.echo(f"{track.name}: is {track.state}, not failed")
        elif track.stage == UNREADABLE:
            restore_to_inbox(store, track, app.workspace.inbox_files)
            typer.echo(f"{track.name}: will be read again at the next scan")
        else:
            store.requeue(track.sha256, now=time.time())
            gone = "" if has_source(track, store, app.workspace) else f"; {SOURCE_GONE}"
            typer.echo(f"{track.name}: queued again{gone}")
    if not found:
        typer.echo("nothing has failed")
    return ALL_DONE


@cli.command()
def requeue(
    context: typer.Context,
    track: TrackName,
    stage: Annotated[Stage | None, typer.Option(help="First stage to repeat.")] = None,
) -> int:
    """Process a finished track again.

    Without --stage, only results that the configuration wants otherwise are made again.
    """
    from pipeline.maintenance.reconcile import has_source

    app = _app(context)
    store = app.open_store()
    found = store.find(track)
    if not has_source(found, store, app.workspace):
        typer.echo(f"{found.name}: {SOURCE_GONE}", err=True)
        return SOME_FAILED
    stages = list(Stage) if stage == Stage.NORMALIZE else [stage, Stage.EMBED_VARIATIONS] if stage else []
    if not store.requeue(found.sha256, now=time.time(), stages=stages):
        typer.echo(f"{found.name}: is being processed; requeue it when it is done", err=True)
        return SOME_FAILED
    typer.echo(f"{found.name}: queued again")
    return ALL_DONE


@cli.command()
def doctor(
    context: typer.Context,
    repair: Annotated[
        bool, typer.Option("--repair", help="Queue missing or altered results again and remove leftovers.")
    ] = False,
) -> int:
    """Check the installation, the machine and the home."""
    from pipeline.cli.doctor import run_checks
    from pipeline.service.health import Health

    app = _app(context)
    worst = ALL_DONE
    with ExitStack() as held:
        if repair:
            held.enter_context(app.workspace.locked())
            held.enter_context(app.workspace.leased())
            Health(app.workspace.health).open()  # in place of what an earlier instance reported
        for check in run_checks(app, repair=repair):
            typer.echo(f"{check.mark:<5} {check.what}: {check.text}")
            worst = max(worst, SOME_FAILED if check.mark == "bad" else ALL_DONE)
    return worst


@cli.command()
def rebuild(context: typer.Context) -> int:
    """Record the finished tracks of the outbox again after the state folder was lost."""
    from pipeline.maintenance.rebuild import rebuild as record_again
    from pipeline.maintenance.reconcile import check_outbox_mount
    from pipeline.outbox.outbox import Outbox

    app = _app(context)
    app.workspace.prepare()
    with app.workspace.locked():
        store, outbox = app.open_store(), Outbox(app.workspace.outbox_files)
        check_outbox_mount(app.workspace.outbox, store)
        findings = list(record_again(store, outbox, app.workspace, now=time.time()))
    for finding in findings:
        typer.echo(f"{finding.where}: {finding.text}")
    typer.echo(f"{sum(finding.mended for finding in findings)} tracks recorded")
    return ALL_DONE


@cli.command()
def gc(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be removed, and remove nothing.")
    ] = False,
) -> int:
    """Remove old files as `retention` in the configuration says."""
    from pipeline.maintenance.retention import collect

    app = _app(context)
    store = app.open_store()
    removals = collect(store, app.workspace, app.config.retention, now=time.time(), dry_run=dry_run)
    for removal in removals:
        size = f"{removal.bytes / 1e6:.1f} MB"
        typer.echo(f"{removal.what}: {printable(removal.path)} ({size}): {removal.why}")
    total = sum(removal.bytes for removal in removals)
    typer.echo(f"{len(removals)} {'would be ' if dry_run else ''}removed, {total / 1e6:.1f} MB")
    return ALL_DONE


@cli.command()
def gallery(context: typer.Context) -> int:
    """Write the pages of all finished tracks anew."""
    from pipeline.cli.gallery import index_of, write_pages

    app = _app(context)
    n_written, n_without = write_pages(app)
    typer.echo(f"{n_written} pages written" + (f", {n_without} tracks have no results" if n_without else ""))
    typer.echo(f"open {index_of(app.workspace.outbox)}")
    return ALL_DONE


@cli.command()
def demo(context: typer.Context) -> int:
    """Process the instrumental that comes with the program."""
    import pipeline.demo

    return once(context, Path(pipeline.demo.__file__).parent)


@cli.command()
def score(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The variation.")],
    source: Annotated[Path, typer.Option("--against", metavar="SOURCE", help="What it is compared with.")],
    as_json: AsJson = False,
) -> int:
    """Score one sound file against another; docs/scores.md explains the measures."""
    from pipeline.cli.score import score_files, score_text

    scores = score_files(App.open(_folder(context), context.obj["config"]), file, source)
    typer.echo(_json(scores.as_json()) if as_json else score_text(scores))
    return ALL_DONE


@cli.command()
def reproduce(
    context: typer.Context,
    target: Annotated[
        Path | None, typer.Argument(metavar="MANIFEST|FILE", help="A manifest.json, or a variation.")
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="Every take in the outbox.")] = False,
    source: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The source; default: where the database has it."),
    ] = None,
    file: Annotated[str | None, typer.Option(help="The only take of a manifest that is wanted.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the one file that is made.")] = None,
    as_json: AsJson = False,
) -> int:
    """Make variations again from what is recorded of them, and compare the bytes.

    Ends with 0 if all are the same, 1 if one is different, 2 if one can't be tried.
    """
    from pipeline.cli import reproduce as verb

    if (target is None) != every or (every and (source or file or output)):
        raise typer.BadParameter("takes a manifest or a variation with its options, or --all alone")
    if output is not None and output.exists():
        raise ConfigError(f"{printable(output)} exists, and is left as it is: name another file")
    app = _app(context) if target is None else App.open(_folder(context), context.obj["config"])
    takes = [] if target is None else verb.takes_of(app, target, file)
    if output is not None and len(takes) != 1:
        raise typer.BadParameter(f"--output is for one take, not for {len(takes)}: name it with --file")
    counts, listed = dict.fromkeys(verb.WORDS, 0), []
    for outcome in verb.outcomes(app, verb.all_takes(app) if target is None else [takes], source):
        counts[outcome.state] += 1
        listed.append(outcome.as_json())
        if not as_json and not (every and outcome.state == "same"):
            typer.echo(verb.line(outcome))
        if output is not None and outcome.content:
            verb.write_output(outcome, output)
    if as_json:
        typer.echo(_json({**counts, "takes": listed}))
    elif len(listed) != 1 or every:
        typer.echo(verb.sum_text(counts))
    return verb.exit_code(counts)


@cli.command()
def rate(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="RATINGS.JSON", help="What a page of the gallery saved.")],
) -> int:
    """Store the ratings of results; a later one of the same file wins."""
    from pipeline.ratings.file import read_ratings

    ratings = read_ratings(file)
    store = _app(context).open_store()
    results = {track: store.results_of(track) for track in {rating.track for rating in ratings}}
    known = [rating for rating in ratings if rating.sha256 in results[rating.track]]
    store.rate(known, now=time.time())
    typer.echo(f"{len(known)} ratings stored")
    if n := len(ratings) - len(known):
        typer.echo(f"{n} left out: no results of this home have their hashes, or they were made anew since")
    return ALL_DONE


@cli.command()
def export(
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--kept", metavar="DIR", help="Where the copies go.")],
) -> int:
    """Copy the results that were rated as kept, with names fit for a DAW."""
    from pipeline.cli.export import export_lines

    app, counts = _app(context), Counter[str]()
    for state, line in export_lines(app, folder):
        counts[state] += 1
        typer.echo(line)
    typer.echo(", ".join(f"{n} {state}" for state, n in counts.items()) or "nothing is rated as kept")
    return SOME_FAILED if counts["missing"] or counts["in the way"] else ALL_DONE


@cli.command()
def similar(
    context: typer.Context,
    wanted: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE|TRACK", help="Sound files, or tracks as in `show`; several are added."),
    ] = None,
    *,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="TEXT", help="What it sounds like in words; needs clap."),
    ] = None,
    unwanted: Annotated[
        list[str] | None, typer.Option("--not", metavar="FILE|TRACK", help="What it is to be unlike.")
    ] = None,
    unwanted_texts: Annotated[
        list[str] | None, typer.Option("--not-text", metavar="TEXT", help="The same in words.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many are shown.")] = 10,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="List pairs of sources that are nearly the same instead.")
    ] = False,
    above: Annotated[float, typer.Option(min=-1, max=1, help="The least similarity of such pairs.")] = 0.98,
    as_json: AsJson = False,
) -> int:
    """Find sources and variations that sound like a file, a track or a text; docs/similar.md says how."""
    from pipeline.cli import similar as found

    queries = [*(wanted or ()), *(texts or ()), *(unwanted or ()), *(unwanted_texts or ())]
    if duplicates == bool(queries):
        raise typer.BadParameter("name a file, a track or a --text, or ask for --duplicates")
    library = found.Library.open(_app(context), partial(typer.echo, err=True))
    if duplicates:
        facts = found.duplicate_facts(library, above)
        lines = found.duplicate_text(facts, above)
    else:
        facts = found.similar_facts(
            library,
            wanted or (),
            unwanted or (),
            texts=texts or (),
            unwanted_texts=unwanted_texts or (),
            top=top,
        )
        lines = found.similar_text(facts)
    typer.echo(_json(facts) if as_json else "\n".join(lines))
    return ALL_DONE


@embeddings.command("export")
def embeddings_export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file: .parquet or .npy.")],
) -> int:
    """Write the vectors of all sources and variations with their names, tracks and paths."""
    from pipeline.cli.similar import Library
    from pipeline.search.export import check_target, export

    check_target(file)
    library = Library.open(_app(context), partial(typer.echo, err=True))
    for path in export(file, *library.everything(), library.engine):
        typer.echo(printable(path))
    return ALL_DONE


@models.command("list")
def models_list(context: typer.Context) -> int:
    """List the models whose weights are on this machine."""
    from pipeline.cli.models import model_lines

    for line in model_lines(_app(context)):
        typer.echo(line)
    return ALL_DONE


@models.command("fetch")
def models_fetch(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Hub ids; default: the models that the configuration can use."),
    ] = None,
) -> int:
    """Download weights ahead of time."""
    from pipeline.cli.models import wanted_models
    from pipeline.weights import hub

    for model, revision, terms, layout in wanted_models(_app(context), names):
        typer.echo(f"{model}: {terms}")
        found = hub.fetch(model, revision, layout=layout)
        typer.echo(f"{model}: {found.folder} ({found.revision})")
    return ALL_DONE


@models.command("path")
def models_path(
    context: typer.Context, name: Annotated[str, typer.Argument(metavar="MODEL", help="The hub id.")]
) -> int:
    """Print the folder with a model's weights."""
    from pipeline.weights import hub

    found = hub.locate(name)
    if found is None:
        typer.echo(f"{name} is not on this machine: {hub.FETCH_COMMAND} {name}", err=True)
        return SOME_FAILED
    typer.echo(found.folder)
    return ALL_DONE


def _json(facts: Any) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False)


def _input_folder(app: App, folder: Path | None) -> InputFolder:
    """The folder to scan: the inbox, also when it is given by its path, or another one."""
    if folder is None or folder.resolve() == app.workspace.inbox:
        return app.workspace.input_folder
    if not folder.is_dir():
        raise typer.BadParameter(f"{printable(folder)} is not a folder", param_hint="DIR")
    for ours in (app.workspace.outbox, app.workspace.state):  # otherwise results would be taken for sources
        if ours.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(ours):
            raise typer.BadParameter(
                f"{printable(folder)} and {ours} must not lie in one another", param_hint="DIR"
            )
    return InputFolder(folder.resolve(), is_inbox=False)
