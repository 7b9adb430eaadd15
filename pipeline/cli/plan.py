"""What `plan` says: engines, variations, what `once` would do with each track, and how long it may take."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.app import App
from pipeline.errors import FolderUnusable, os_reason
from pipeline.fs.names import printable
from pipeline.pace import Pace, Wanted, makespan_s, rough
from pipeline.plan import PlannedVariation, plan_variations
from pipeline.records import Stage
from pipeline.service.health import read_health
from pipeline.store.schema import TrackState
from pipeline.store.store import Store

if TYPE_CHECKING:
    from pipeline.engines.base import EngineCard
    from pipeline.intake.scanner import ScannedFile
    from pipeline.outbox.outbox import Outbox
    from pipeline.plan import Recipe
    from pipeline.store.schema import Track
    from pipeline.workspace import InputFolder

CONFLICT_COPY = " (a sync tool's conflict copy: a track of its own unless another file has the same content)"


class ToDo(NamedTuple):
    """What a track still needs."""

    name: str
    bytes: int  # of its source
    variations: list[PlannedVariation]

    def seconds(self, pace: Pace) -> float:
        """How long it takes by that pace; nothing, if it needs nothing."""
        source_s = pace.length_s(self.name, self.bytes)
        wanted = [
            (one.tried / one.kept, source_s if one.duration_s == "source" else one.duration_s)
            for one in self.variations
        ]
        n_takes, takes_s = round(sum(n for n, _ in wanted)), sum(n * length_s for n, length_s in wanted)
        return sum(pace.stage_s(stage, source_s, n_takes, takes_s) for stage in Stage) if wanted else 0.0


def plan_lines(app: App, folder: InputFolder) -> Iterator[str]:
    """The engines, the variations, one line per file or queued track, and an estimate of the time.

    Raises:
        FolderUnusable: the folder can't be read, or see `check_outbox_mount`.
    """
    from pipeline.intake.copies import is_conflict_copy
    from pipeline.intake.scanner import scanner_for
    from pipeline.maintenance.reconcile import check_outbox_mount, reconcile
    from pipeline.outbox.outbox import Outbox

    recipe, outbox = app.recipe, Outbox(app.workspace.outbox_files)
    for stage, choice in recipe.engines.items():
        to_fetch = "; its weights would be downloaded first" if choice.needs_weights else ""
        yield f"{stage}: {choice.card.name} ({choice.why}){to_fetch}"
    card = recipe.generator.card
    variations = plan_variations(app.config, card)
    yield f"each track: {len(variations)} variations"
    yield from (f"  {_variation(one, card)}" for one in variations)
    if store := app.read_store():
        check_outbox_mount(app.workspace.outbox, store)
    to_do, listed = list[ToDo](), set[str]()
    try:
        for scanned in scanner_for(folder, app.config.intake, app.workspace.files_at(folder.path)).scan():
            track = _track_of(store, scanned) if store else None
            listed |= {track.sha256} if track else set()
            note = CONFLICT_COPY if is_conflict_copy(scanned.path.name) else ""
            text, missing = _planned(store, scanned, track, recipe, outbox)
            if missing is not None:
                to_do.append(ToDo(scanned.display, scanned.identity.size, missing))
            yield f"{scanned.display}: {text}{note}"
    except OSError as e:
        raise FolderUnusable(f"{printable(folder.path)} can't be read: {os_reason(e)}") from e
    for track in store.tracks(TrackState.QUEUED) if store and folder.is_inbox else []:
        if track.sha256 not in listed:
            to_do.append(ToDo(track.name, track.bytes, variations))
            yield f"{track.name}: queued{f', failed before: {track.error}' if track.error else ''}"
    if store and app.config.retention.redo_missing:
        findings = reconcile(store, outbox, app.workspace, thorough=False, repair=False, now=time.time())
        for finding in findings:
            if finding.kind == "result":
                to_do.append(ToDo(finding.where, 0, variations))
                yield f"{finding.where}: {finding.text}: made again"
    workers = (read_health(app.workspace.health) or {}).get("workers", [])
    n_workers = max(sum(one.get("makes", True) for one in workers), 1)  # as in the last run
    yield _estimate(store, recipe, to_do, n_workers) if to_do else "nothing to do"


def _variation(planned: PlannedVariation, card: EngineCard) -> str:
    """One variation's file, length and parameters, without those that are the engine's defaults."""
    length = planned.duration_s if planned.duration_s == "source" else f"{planned.duration_s:g} s"
    defaults = card.params().model_dump(mode="json")
    own = {name: value for name, value in planned.params.items() if value != defaults[name]}
    words = [f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in own.items()]
    dial = {} if planned.similarity is None else {"similarity": planned.similarity}
    words[:0] = [f"{name} {value:g}" for name, value in {**dial, **planned.change}.items()]
    if planned.tried > 1:
        words.append(f"one of the best {planned.kept} of {planned.tried}")
    return f"{Path(planned.file).name}: {', '.join([length, *words])}"


def _track_of(store: Store, scanned: ScannedFile) -> Track | None:
    """The track that a file was taken in as; None if the file is new or has changed since."""
    known = store.file_at(scanned.path)
    is_same = known is not None and known.identity == scanned.identity and known.moved_to is None
    return store.track(known.sha256) if known and is_same else None


def _planned(
    store: Store | None, scanned: ScannedFile, track: Track | None, recipe: Recipe, outbox: Outbox
) -> tuple[str, list[PlannedVariation] | None]:
    """What `once` would do with one file, and why; and the variations that it would make; None: no work."""
    every = plan_variations(recipe.config, recipe.generator.card)
    if store is None or track is None:
        if not scanned.marked:
            return "waits for its marker file", None
        return "new: normalize, embed, generate", every
    if track.state != TrackState.DONE:
        return f"{track.state}{f' ({track.error})' if track.error else ''}", (
            every if track.state == TrackState.QUEUED else None
        )
    if track.collected_at is not None:
        return "up to date (its results were removed by gc)", None
    wanted = recipe.plan(track.sha256)
    if track.plan_key == wanted.key:
        return "up to date", None
    there = _published(store, track, outbox)
    missing: list[PlannedVariation] = [unit for unit in wanted.variations if unit.key not in there]
    embed = "" if wanted.embed_key in there else "embed, "
    vectors = ", embed-variations" if wanted.vectors_key and wanted.vectors_key not in there else ""
    return f"the configuration has changed: {embed}{len(missing)} variations{vectors}", missing


def _published(store: Store, track: Track, outbox: Outbox) -> set[str]:
    """The keys of the track's units whose results its manifest lists: those of earlier plans were removed."""
    from pipeline.outbox.outbox import files_of, listed_files

    listed = set[str]()
    with suppress(OSError):
        listed = {one.sha256 for one in listed_files(outbox.read_manifest(track.folder)) or ()}
    units = [unit for unit in store.units_of(track.sha256) if "file" in unit["result"]]
    return {unit["key"] for unit in units if files_of(unit["result"])[0].sha256 in listed}


def _estimate(store: Store | None, recipe: Recipe, to_do: list[ToDo], n_workers: int) -> str:
    """About how long it takes, by what such work took on this machine."""
    wanted = Wanted.of(recipe)
    n_variations, n_tracks = (
        sum(len(one.variations) for one in to_do),
        sum(bool(one.variations) for one in to_do),
    )
    pace = Pace.of(store.work(wanted.generator, wanted.model), wanted) if store else None
    what = f"to do: variations: {n_variations}, tracks: {n_tracks}"
    if pace is None:
        return f"{what}; no estimate of the time, as {wanted.generator} has made nothing here yet"
    seconds = makespan_s([0.0] * n_workers, [one.seconds(pace) for one in to_do])
    return f"{what}, time: about {rough(seconds)}, by what such work took here before"
