"""What `reproduce` does and says: takes of a file, of a manifest or of the whole outbox, made again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from pipeline.app import App
from pipeline.engines.base import ProgressFn
from pipeline.errors import ConfigError, os_reason
from pipeline.fs.atomic import write_atomically
from pipeline.fs.names import printable
from pipeline.maintenance.reconcile import check_outbox_mount
from pipeline.outbox.outbox import MANIFEST, Outbox
from pipeline.reproduce.again import Again, source_of
from pipeline.reproduce.compare import Outcome
from pipeline.reproduce.recorded import BadRecord, Recorded, listed_under, of_manifest, of_sound

SAME, DIFFERENT, UNTRIED = range(3)  # exit codes
WORDS = {"same": "the same", "different": "different", "untried": "can't be tried"}


def takes_of(app: App, target: Path, file: str | None) -> list[Recorded]:
    """The takes that a manifest lists (all, or that with a name), or the one of a sound file.

    Raises:
        BadRecord: there are none.
    """
    shown = printable(target)
    files = app.workspace.files_at(target.parent)
    try:
        content = files.read(target)
    except OSError as e:
        raise BadRecord(f"{shown} can't be read: {os_reason(e)}") from e
    if target.suffix != ".json":
        if file is not None:
            raise ConfigError("--file names a take of a manifest, so it goes with a manifest only")
        return [of_sound(content, shown)]
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise BadRecord(f"{shown} is not JSON: {e}") from e

    def read(name: str) -> bytes | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            return files.read(target.parent / name)
        return None

    takes = of_manifest(manifest, lambda name: printable(target.parent / name), read)
    if file is None:
        return takes
    if found := list(listed_under(takes, file)):
        return found
    raise BadRecord(f"{shown} lists no {file}: it has {', '.join(one.file for one in takes)}")


def all_takes(app: App) -> Iterator[list[Recorded] | Outcome]:
    """The takes of each track of the outbox, or why a track's can't be known.

    Raises:
        FolderUnusable: see `check_outbox_mount`; without it, there would seem to be nothing that differs.
    """
    outbox = Outbox(app.workspace.outbox_files)
    if store := app.read_store():
        with closing(store):
            check_outbox_mount(outbox.root, store)

    def read(folder: str, file: str) -> bytes | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            return outbox.read(folder, file)
        return None

    for folder, files, manifest in outbox.contents_and_manifests():
        shown = printable(folder)
        if isinstance(files, OSError):
            yield Outcome(shown, None, None, "untried", f"it can't be read: {os_reason(files)}")
        elif MANIFEST in files:  # otherwise the track is in work
            try:
                yield of_manifest(manifest, partial("{}/{}".format, shown), partial(read, folder))
            except BadRecord as e:
                yield Outcome(shown, None, None, "untried", str(e))


def outcomes(
    app: App, tracks: Iterable[list[Recorded] | Outcome], source: Path | None = None
) -> Iterator[Outcome]:
    """Make the takes of each track again; `source`: a file to make them from, if it is given."""
    store, workspace = app.read_store(), app.workspace
    with ExitStack() as held:
        scratch = Path(held.enter_context(tempfile.TemporaryDirectory()))
        if store:
            held.enter_context(closing(store))
        again = Again(
            app.settings("generate"),
            lambda sha256: source_of(sha256, store, workspace, scratch, source),
            held.enter_context(_bar()),
        )
        for track in tracks:
            yield from [track] if isinstance(track, Outcome) else again.run(track)


@contextmanager
def _bar() -> Iterator[ProgressFn]:
    """A bar for the take that is made, on a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)
        yield lambda file, done, total: bars.update(
            task, description=escape(file), completed=done, total=total
        )


def exit_code(counts: Mapping[str, int]) -> int:
    """Of the command that had these outcomes."""
    return DIFFERENT if counts["different"] else UNTRIED if counts["untried"] else SAME


def sum_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[state]} {words}" for state, words in WORDS.items())


def line(outcome: Outcome) -> str:
    """One outcome for people."""
    parts = [f"{outcome.file}: {WORDS[outcome.state]}", *([outcome.why] if outcome.why else [])]
    if outcome.state == "different":
        versions = outcome.versions or {}
        changed = [f"{name} {now} instead of {then}" for name, (then, now) in versions.items()]
        parts.append(f"now with {', '.join(changed)}" if changed else "no version that is recorded differs")
    return "; ".join(parts)


def write_output(outcome: Outcome, path: Path) -> None:
    """Write the file that was made.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        write_atomically(path, path.with_name(f".{path.name}.part"), outcome.content)
    except OSError as e:
        raise ConfigError(f"{printable(path)} can't be written: {os_reason(e)}") from e
