"""The generate stage of a batch of tracks: takes are made, judged, chosen and published.

Every call of the generator makes all takes that the tracks of the batch still want, since they can share one
pass over a model's weights. A take that isn't decided about yet is held in the state folder, so that a kill
loses nothing.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import traceback
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from pipeline.engines.base import ProgressFn
from pipeline.errors import EngineFailure
from pipeline.executors import tasks
from pipeline.executors.base import Executor, Task, result_of
from pipeline.executors.beside import BesideGenerator
from pipeline.executors.judge import Judge
from pipeline.executors.tasks import MadeTake, TakeRequest
from pipeline.fs.disk import environment_error
from pipeline.outbox import manifest
from pipeline.outbox.manifest import Json
from pipeline.outbox.outbox import REJECTED, Outbox, Published
from pipeline.outbox.settings import Settings
from pipeline.plan import Recipe, Take, VariationUnit
from pipeline.progress import Reporter
from pipeline.records import Audio, Stage
from pipeline.runner.attempts import Attempts, Job
from pipeline.runner.making import at_album_loudness, file_form, record_of
from pipeline.runner.takes import JudgedTake, TakeChoice, choices
from pipeline.store.schema import AttemptOutcome
from pipeline.store.store import Store

log = logging.getLogger("pipeline")

TAKE = "take"  # what a held take is called in the state folder
NO_AUDIO = Audio(np.zeros((1, 0), np.float32), 1)


@dataclass(frozen=True)
class Wanted:
    """One take that a call of the generator is to make."""

    job: Job
    choice: TakeChoice
    take: Take
    request: TakeRequest


@dataclass
class Generation:
    """Makes and publishes the missing variations of tracks. Everything it depends on is passed in."""

    recipe: Recipe
    store: Store
    outbox: Outbox
    executor: Executor
    judge: Judge  # compares results with each other; the verdicts come from the workers
    attempts: Attempts
    reporter: Reporter
    clock: Callable[[], float]
    should_stop: Callable[[], bool]
    set_aside: Callable[[Job, Collection[str]], None]  # copies what a person has kept, see `Runner`
    finish: Callable[[Job], None]  # called for each track whose variations are all published

    def run(self, jobs: Sequence[Job]) -> None:
        """Make all missing variations of the batch, and finish the tracks.

        If the generator raises on a batch, each unfinished track is tried alone, so that only the
        track that caused the error fails.
        """
        incomplete = []
        for job in jobs:
            if job.missing:
                incomplete.append(job)
                continue
            with self.attempts.guarded(job):
                self.finish(job)
        if not incomplete:
            return
        error = self._make_takes(incomplete)
        if error is None:
            return
        _clear_frames(error)
        if len(incomplete) == 1:
            self.attempts.fail(incomplete[0], error)
            return
        for job in incomplete:
            if not job.over:
                self.attempts.end(job, AttemptOutcome.STOPPED)
                self.run([job])

    def _make_takes(self, jobs: Sequence[Job]) -> Exception | None:
        """Call the generator until nothing more is wanted.

        Returns:
            What the generator raised, if one of the tracks may be the cause; other errors are raised.
        """
        for job in jobs:
            with self.attempts.guarded(job):
                self.attempts.begin(job, Stage.GENERATE)
                self._begin(job)
        while wanted := {one.take.key: one for job in jobs for one in self._wanted(job)}:
            names = {one.job.track.sha256: one.job.track.name for one in wanted.values()}
            try:
                self._call(wanted, list(names.values()))
            except Exception as e:
                if isinstance(e, sqlite3.Error) or environment_error(e):
                    raise
                return e
            for one in wanted.values():
                if not one.job.over and one.take in one.choice.missing:
                    self.attempts.fail(one.job, EngineFailure("the engine made too few variations"))
        return None

    def _begin(self, job: Job) -> None:
        """Set up the choices of a track, with the takes that an earlier run has left."""
        job.choices = choices(job.plan.variations, self.recipe.generator.card, self._shared)
        for choice in job.choices:
            if all(unit.key in job.variations for unit in choice.units):
                for unit in choice.units:
                    choice.judged[unit.key] = self._published_take(job, unit)
                choice.kept = tuple(unit.key for unit in choice.units)
            else:
                self._restore(job, choice)
        self._advance(job)

    def _wanted(self, job: Job) -> list[Wanted]:
        found: list[Wanted] = []
        if not job.over:
            with self.attempts.guarded(job):
                sources: dict[str, Audio] = {}  # by key
                for choice in job.choices:
                    unit = choice.units[0]
                    for take in choice.missing:
                        if unit.source not in sources:
                            sources[unit.source] = self._source(job, unit)
                        request = job.request(unit, take, sources[unit.source], self.recipe.config.output)
                        found.append(Wanted(job, choice, take, request))
                # An engine may analyse a source once if its requests are consecutive.
                found.sort(key=lambda one: list(sources).index(one.choice.units[0].source))
        return found

    def _source(self, job: Job, unit: VariationUnit) -> Audio:
        """What a variation is made from, mapped from the state folder; made first if it isn't there."""
        if job.stored(unit.source) is None:
            settings = self.recipe.config.normalize
            changed = self._run(tasks.change, job.audio(), settings, dict(unit.change))
            job.scratch.save("normalized", unit.source, changed)
        return job.audio(unit.source)

    def _call(self, wanted: dict[str, Wanted], names: list[str]) -> None:
        self.reporter.stage(names, Stage.GENERATE, total=len(wanted))
        start = self.clock()
        with closing(self._takes(wanted)) as takes:
            for made in takes:
                one = wanted[made.request_id]
                with self.attempts.guarded(one.job):
                    if made.error:
                        raise made.error
                    self._take_in(one, made, start)
                if one.job.over and not all(other.job.over for other in wanted.values()):
                    # again, as the last steps of a track came between
                    self.reporter.stage(names, Stage.GENERATE, total=len(wanted))
                start = self.clock()

    def _takes(self, wanted: Mapping[str, Wanted]) -> Generator[MadeTake, None, None]:
        """The takes as they are finished; the sound of one stays with the worker until the next is wanted."""
        requests, output = [one.request for one in wanted.values()], self.recipe.config.output
        progress, should_stop = self._progress(requests), self.should_stop
        executor = self.executor
        if not isinstance(executor, BesideGenerator):
            yield from executor.run(
                tasks.make_takes, requests, output, progress=progress, should_stop=should_stop
            )
            return
        folder = executor.folder
        paths = {key: folder / f"{key}.npy" for key in wanted} if folder else {}
        found = self._run(tasks.prepare, requests, self.recipe.generator.card.name)
        requests = tasks.with_prepared(requests, *found)
        sounds = executor.run(tasks.generate, requests, paths, progress=progress, should_stop=should_stop)
        try:
            with closing(sounds):
                for take, made in sounds:
                    one = wanted[take.request_id]
                    if made is None:
                        yield take
                    elif not one.job.over:
                        yield from self._finished(one.request, take, made, {one.source for one in requests})
                    _remove(paths, take.request_id)
        finally:
            for key in paths:
                _remove(paths, key)

    def _finished(
        self, one: TakeRequest, take: MadeTake, made: Any, sources: Collection[str]
    ) -> Iterator[MadeTake]:
        """The take of a sound; the source is sent only if the worker hasn't its analysis from before."""
        bare, output = tasks.with_audio(one, NO_AUDIO), self.recipe.config.output
        for source in (None, one.request.audio):
            finish = partial(self.executor.run, tasks.finish, bare, source, take, made, output, sources)
            is_finished = False
            for finished in finish(progress=lambda *_: None, should_stop=self.should_stop):
                is_finished = True
                yield finished
            if is_finished:
                return

    # -- takes -----------------------------------------------------------------------------------

    def _take_in(self, wanted: Wanted, made: MadeTake, start: float) -> None:
        """Publish what can be decided by a take; otherwise hold it."""
        job, choice, take = wanted.job, wanted.choice, wanted.take
        verdict = made.verdict
        if made.facts is None or verdict is None:
            choice.judged[take.key] = JudgedTake(take, (made.refused or "",), -math.inf, None)
            self._advance(job)
            return
        job.sound_s += made.facts["duration_s"]
        config = self.recipe.config
        settings = Settings(config.normalize, config.output, wanted.request.length_s)
        judged = JudgedTake(
            take,
            verdict.failed,
            verdict.rank,
            verdict.similarity,
            verdict.sound,
            record_of(take, made, self.recipe.generator, settings, config.device),
            is_with_worker=True,
            began=start,
        )
        choice.judged[take.key] = judged
        self._advance(job)
        if any(unit.key not in job.variations for unit in choice.units):
            self._hold(job, choice, judged)
        else:  # the sounds of what is decided are no longer needed
            for key, one in choice.judged.items():
                choice.judged[key] = replace(one, is_with_worker=False)
                job.scratch.remove(TAKE, key)

    def _hold(self, job: Job, choice: TakeChoice, judged: JudgedTake) -> None:
        """Keep a take in the state folder until it is decided about."""
        job.scratch.save(TAKE, judged.take.key, self._run(tasks.sound_of, judged.take.key))
        choice.judged[judged.take.key] = replace(judged, is_with_worker=False, began=None)
        held = {"failed": judged.failed, "rank": judged.rank, "similarity": judged.similarity}
        held["unit"] = choice.units[0].key  # a changed gate or rater asks for another verdict
        self._record(job, judged.take.key, {**judged.record, "held": held}, judged.began)

    def _restore(self, job: Job, choice: TakeChoice) -> None:
        """Take over the missing takes that an earlier run held for the same choice."""
        for take in choice.missing:
            record = self.store.unit(take.key)
            if record is None or record["held"]["unit"] != choice.units[0].key:
                continue
            if (held := self._held(job, take, record)) is None:
                continue
            judged = record.pop("held")
            choice.judged[take.key] = JudgedTake(
                take,
                tuple(judged["failed"]),
                judged["rank"],
                judged["similarity"],
                self._run(tasks.fingerprint, held),
                record,
            )

    def _held(self, job: Job, take: Take, record: Mapping[str, Any]) -> Audio | None:
        return job.scratch.load(TAKE, take.key, record["sample_rate"])

    def _published_take(self, job: Job, unit: VariationUnit) -> JudgedTake:
        """A variation that an earlier run has published, as others are compared with it."""
        record = job.variations[unit.key]
        take = replace(unit.takes[0], key=unit.key, seed=record["seed"])
        if unit.gates.max_shared is None:
            return JudgedTake(take, (), 0.0, None, record=record)
        file = self.outbox.readable(job.track.folder, record["file"])
        sound = self._run(tasks.fingerprint_of_file, file, record["sample_rate"])
        return JudgedTake(take, (), 0.0, None, sound, record)

    def _shared(self, one: JudgedTake, other: JudgedTake) -> float:
        return self.judge.shared(one.sound, other.sound)

    # -- choices ---------------------------------------------------------------------------------

    def _advance(self, job: Job) -> None:
        """Decide what can be decided, in the order of the plan, and publish it; finish a complete track."""
        for choice in job.choices:
            n_asked = 0
            while choice.kept is None and n_asked != len(choice.asked):
                n_asked = len(choice.asked)
                self._restore(job, choice)
                choice.decide()
                if len(choice.asked) > n_asked > 0:
                    log.info("%s: another take of %s: %s", job.track.name, *_last_fault(choice))
        is_album = self.recipe.config.output.album
        if is_album and any(choice.kept is None for choice in job.choices):
            return
        kept = [judged for choice in job.choices for judged in choice.kept_takes]
        album_lufs = min(one.record["loudness_lufs"] for one in kept) if is_album else None
        for choice in job.choices:
            for unit, judged in zip(choice.units, choice.kept_takes, strict=False):
                if unit.key not in job.variations:
                    self._publish(job, choice, unit, judged, album_lufs)
        if not job.missing and not job.over:
            self.finish(job)

    def _publish(
        self, job: Job, choice: TakeChoice, unit: VariationUnit, judged: JudgedTake, album_lufs: float | None
    ) -> None:
        record, gain_db = judged.record, None
        if album_lufs is not None:
            record, gain_db = at_album_loudness(record, album_lufs)
        if failed := choice.faults[judged.take.key]:
            name = PurePath(unit.file).name
            log.warning("%s: %s fails its gates: %s", job.track.name, name, "; ".join(failed))
        self.set_aside(job, [one["sha256"] for one in job.variations.values()])  # it may be rated by now
        published = self._write(job, unit.file, unit.name, replace(judged, record=record), gain_db)
        takes = self._tried(job, choice, unit)
        made = manifest.variation_record(published, unit.name, record, failed, takes)
        job.variations[unit.key] = made
        self._record(job, unit.key, made, judged.began)

    def _tried(self, job: Job, choice: TakeChoice, unit: VariationUnit) -> list[Json]:
        """What the manifest says of all takes; with the best one, those not kept are published if wanted."""
        first, tried = choice.units[0], list[Json]()
        if unit is not first:
            return list(job.variations[first.key]["takes"])
        stem, ending = PurePath(first.file).name.rsplit(".", 1)
        for judged in (choice.judged[take.key] for take in choice.asked):
            failed = list(choice.faults[judged.take.key])
            fact = {**judged.take.facts(), "measured": {"similarity": judged.similarity}, "failed": failed}
            is_rejected = judged.take.key not in (choice.kept or ()) and judged.sound is not None
            if is_rejected and first.gates.rejected == "keep":
                file = f"{REJECTED}/{stem}-{judged.take.key[:8]}.{ending}"
                fact |= vars(self._write(job, file, first.name, judged))
            tried.append(fact)
        return tried

    def _write(
        self, job: Job, file: str, name: str, judged: JudgedTake, gain_db: float | None = None
    ) -> Published:
        output, record = self.recipe.config.output, judged.record
        sound = judged.take.key if judged.is_with_worker else self._held(job, judged.take, record)
        if sound is None:
            raise EngineFailure("a take has disappeared from the state folder")
        form = file_form(job.track.name, job.track.sha256, name, record, output)
        folder = job.track.folder
        place = self.outbox.place(folder, file) if self.executor.shares_disk else None
        return self.outbox.publish(folder, file, self._run(tasks.encode, sound, form, gain_db, place))

    def _run(self, task: Task, *args: Any) -> Any:
        return result_of(self.executor, task, *args, should_stop=self.should_stop)

    def _record(self, job: Job, key: str, record: Json, began: float | None) -> None:
        seconds = 0.0 if began is None else self.clock() - began  # with its writing
        self.store.finish_unit(
            key,
            sha256=job.track.sha256,
            stage=Stage.GENERATE,
            result=record,
            seconds=seconds,
            now=self.clock(),
        )

    def _progress(self, requests: Sequence[TakeRequest]) -> ProgressFn:
        shares = {one.request.request_id: 0.0 for one in requests}

        def progress(request_id: str, done: int, total: int) -> None:
            shares[request_id] = done / total if total else 1.0
            finished = sum(share >= 1 for share in shares.values())
            label = f"variation {min(finished + 1, len(shares))} of {len(shares)}, step {done} of {total}"
            self.reporter.step(sum(shares.values()), len(shares), label)

        return progress


def _remove(paths: Mapping[str, Path], key: str) -> None:
    if path := paths.get(key):
        path.unlink(missing_ok=True)


def _last_fault(choice: TakeChoice) -> tuple[str, str]:
    """The first file of a choice, and why the last take that was judged for it is not kept."""
    faults = [fault for take in choice.asked for fault in choice.faults.get(take.key, ())]
    return PurePath(choice.units[0].file).name, faults[-1]


def _clear_frames(error: BaseException) -> None:
    """Release what the frames of an error's traceback refer to, which is the memory of a whole batch."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
