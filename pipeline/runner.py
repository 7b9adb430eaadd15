"""The one place where queue, stages, engines and outbox meet.

Tracks are claimed in batches, since the variations of a batch share one pass over a model's
weights. Each stage takes the whole batch; a track that fails drops out and the others go on. What
is finished is recorded at once, unit by unit, so a killed run goes on where it was.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline import audio, intake, manifest, stages
from pipeline.arrivals import put_away
from pipeline.config import Normalize
from pipeline.engine_room import Engines
from pipeline.engines.base import Generator, ProgressFn
from pipeline.errors import BadAudio, EngineFailure, FolderUnusable, PipelineError, Stopped
from pipeline.outbox import EMBEDDING, Outbox, Published
from pipeline.plan import Recipe, TrackPlan, VariationUnit
from pipeline.records import Audio, Embedding, Failure, Variation, VariationRequest
from pipeline.report import Reporter
from pipeline.store import Store, Track
from pipeline.workplace import Desk, Workplace

log = logging.getLogger("pipeline")

SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass
class Job:
    """A claimed track on its way through the stages."""

    track: Track
    plan: TrackPlan
    desk: Desk
    normalized: dict[str, Any] = field(default_factory=dict)  # the records of what is finished
    embedding: dict[str, Any] = field(default_factory=dict)
    variations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by unit key
    attempt: int | None = None  # the open attempt's id
    stage: str = "intake"
    over: bool = False  # done, failed or queued again

    @property
    def missing(self) -> list[VariationUnit]:
        return [unit for unit in self.plan.variations if unit.key not in self.variations]

    def audio(self) -> Audio:
        """The normalized audio, mapped from the state folder."""
        loaded = self.desk.load_normalized(self.plan.normalize_key, self.normalized["sample_rate"])
        if loaded is None:
            raise EngineFailure("the normalized audio is gone from the state folder")
        return loaded

    def request(self, unit: VariationUnit, source: Audio) -> VariationRequest:
        return VariationRequest(
            request_id=unit.key,
            track_id=self.track.sha256,
            audio=source,
            duration_s=source.duration_s if unit.duration_s == "source" else unit.duration_s,
            seed=unit.seed,
            params=unit.params,
        )


@dataclass
class Outcome:
    """What a run came to."""

    done: int = 0
    failed: int = 0


@dataclass
class Runner:
    """Works the queue off. All it depends on is handed in."""

    recipe: Recipe
    workplace: Workplace
    store: Store
    outbox: Outbox
    engines: Engines
    reporter: Reporter
    clock: Callable[[], float]
    should_stop: Callable[[], bool]
    outcome: Outcome = field(default_factory=Outcome)

    def drain(self, *, root: Path | None = None) -> None:
        """Process all queued tracks that are due; those of the folder `root` only, if given.

        Raises:
            Stopped: it was asked to stop; what was under way is queued again.
            FolderUnusable: the disk is full or a folder can't be written; the same.
        """
        limit = self.recipe.config.generate.batch_tracks
        while tracks := self.store.claim(limit, now=self.clock(), root=root):
            self.process(tracks)

    def process(self, tracks: Sequence[Track]) -> None:
        """Take claimed tracks through all stages."""
        jobs = [
            Job(track, self.recipe.plan(track.sha256), self.workplace.desk(track.sha256)) for track in tracks
        ]
        try:
            for stage in (self._take_stock, *map(self._stage, stages.STAGES)):
                stage([job for job in jobs if not job.over])
        except BaseException:
            self._put_back(jobs)
            raise

    def _stage(self, name: str) -> Callable[[Sequence[Job]], None]:
        return {"normalize": self._normalize, "embed": self._embed, "generate": self._generate}[name]

    # -- stages ----------------------------------------------------------------------------------

    def _take_stock(self, jobs: Sequence[Job]) -> None:
        """Find what earlier runs finished and the outbox still holds, under the names of today's plan."""
        for job in jobs:
            with self._guarded(job):
                self._check_stop()
                folder, made = job.track.folder, {}
                for key in (job.plan.embed_key, *(unit.key for unit in job.plan.variations)):
                    record = self.store.unit(key)
                    if record is not None and self.outbox.holds(folder, _published(record)):
                        made[key] = record
                complete = {job.plan.embed_key, *(unit.key for unit in job.plan.variations)} <= made.keys()
                if not complete and self.outbox.manifest(folder) is not None:
                    self._working_copy(job)  # a result that stands is not opened for work that can't be done
                self.outbox.open_for_work(folder)
                job.embedding = made.pop(job.plan.embed_key, {})
                files = {unit.key: unit.file for unit in job.plan.variations if unit.key in made}
                self.outbox.rename(folder, {made[key]["file"]: file for key, file in files.items()})
                for key, file in files.items():
                    job.variations[key] = {**made[key], "file": file}
                    if made[key]["file"] != file:
                        self._record(job, key, "generate", job.variations[key], seconds=0.0)

    def _normalize(self, jobs: Sequence[Job]) -> None:
        settings = self.recipe.config.normalize
        for job in jobs:
            key = job.plan.normalize_key
            job.normalized = self.store.unit(key) or {}
            needed = not job.embedding or job.missing
            if job.normalized and (not needed or job.desk.load_normalized(key, settings.sample_rate)):
                continue
            with self._attempt(job, "normalize"):
                start = self.clock()
                decoded, source = audio.decode(
                    self._working_copy(job), sample_rate=settings.sample_rate, limits=_limits(settings)
                )
                normalized = stages.normalize(decoded, settings)
                job.desk.save_normalized(key, normalized)
                job.normalized = manifest.normalized_record(source, normalized)
                self._record(job, key, "normalize", job.normalized, self.clock() - start)

    def _embed(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.embedding:
                continue
            with self._attempt(job, "embed"):
                start = self.clock()
                embedder = self.engines.embedder()
                result = stages.embed(job.audio(), embedder, should_stop=self.should_stop)
                published = self.outbox.publish(job.track.folder, EMBEDDING, partial(_save, result))
                job.embedding = manifest.embedding_record(published, embedder, self.recipe.embedder)
                self._record(job, job.plan.embed_key, "embed", job.embedding, self.clock() - start)

    def _generate(self, jobs: Sequence[Job]) -> None:
        """All missing variations of all tracks of the batch in one call of the generator."""
        for job in jobs:
            with self._guarded(job):
                if not job.missing:
                    self._finish(job)
        jobs = [job for job in jobs if not job.over]
        if not jobs:
            return
        if failure := self._generate_together(jobs):
            unfinished = [job for job in jobs if not job.over]
            if len(jobs) == 1:
                self._fail(jobs[0], failure)
            for job in unfinished if len(jobs) > 1 else ():  # find out whose fault it is
                self._end_attempt(job, "stopped")
                self._generate([job])

    def _generate_together(self, jobs: Sequence[Job]) -> Exception | None:
        """One call of the generator; returns what it raised, if that is not for all tracks to end by."""
        requests: list[VariationRequest] = []
        owners: dict[str, tuple[Job, VariationUnit]] = {}
        for job in jobs:
            with self._guarded(job):
                self._begin_attempt(job, "generate")
                source = job.audio()
                owners |= {unit.key: (job, unit) for unit in job.missing}
                requests += [job.request(unit, source) for unit in job.missing]
        self.reporter.stage(jobs[0].track.name if len(jobs) == 1 else f"{len(jobs)} tracks", "generate")
        by_id = {request.request_id: request for request in requests}
        last = self.clock()
        try:
            generator = self.engines.generator()
            for result in generator.generate(
                requests, progress=self._progress(requests), should_stop=self.should_stop
            ):
                job, unit = owners[result.request_id]
                with self._guarded(job):
                    self._take(job, unit, by_id[unit.key], result, generator, seconds=self.clock() - last)
                last = self.clock()
        except (Stopped, FolderUnusable, sqlite3.Error):
            raise
        except Exception as e:
            return e
        for job in jobs:
            if not job.over:
                self._fail(job, EngineFailure(f"{generator.name} made too few variations"))
        return None

    def _take(
        self,
        job: Job,
        unit: VariationUnit,
        request: VariationRequest,
        result: Variation | Failure,
        generator: Generator,
        *,
        seconds: float,
    ) -> None:
        """Publish one result, and the track once it was the last."""
        if isinstance(result, Failure):
            raise result.error
        finished = stages.finish(result, request, self.recipe.config.output)
        facts = manifest.variation_facts(unit, generator, self.recipe.generator)
        tags = manifest.wav_tags(job.track.name, job.track.sha256, facts)
        published = self.outbox.publish(
            job.track.folder,
            unit.file,
            lambda out: audio.write_wav(
                out, finished.audio, bit_depth=self.recipe.config.output.bit_depth, tags=tags
            ),
        )
        job.variations[unit.key] = manifest.variation_record(published, facts, finished)
        self._record(job, unit.key, "generate", job.variations[unit.key], seconds)
        if not job.missing and not job.over:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        """Complete the track's folder, then the record, then deal with the source."""
        folder, track = job.track.folder, job.track
        variations = [job.variations[unit.key] for unit in job.plan.variations]
        files = self.store.files_of(track.sha256)
        self.outbox.keep_only(folder, {EMBEDDING, *(record["file"] for record in variations)})
        self.outbox.publish_manifest(
            folder,
            manifest.manifest(
                name=track.name,
                names=[file.display for file in files],
                sha256=track.sha256,
                n_bytes=track.bytes,
                normalized=job.normalized,
                embedding=job.embedding,
                variations=variations,
                config_sha256=self.recipe.config.sha256,
                now=self.clock(),
            ),
        )
        self._end_attempt(job, "done")
        self.store.finish(
            track.sha256, plan_key=job.plan.key, source=job.normalized["source"], now=self.clock()
        )
        job.over = True
        put_away(self.store, files, self.workplace.inbox, self.recipe.config.intake, error=None)
        job.desk.clear()
        self.outcome.done += 1
        self.reporter.finished(track.name, f"{len(variations)} variations in {folder}")

    # -- the pieces ------------------------------------------------------------------------------

    def _working_copy(self, job: Job) -> Path:
        """The track's bytes, copied from wherever they lie and checked, safe from what people do there."""
        target = job.desk.source
        sha256 = job.track.sha256
        if target.exists() and intake.hash_file(target) == sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in self.store.files_of(sha256):
            with suppress(BadAudio):
                if intake.hash_file(file.moved_to or file.path, copy_to=target) == sha256:
                    return target
        raise BadAudio("was removed or changed since it was taken in: put it in the inbox again")

    def _progress(self, requests: Sequence[VariationRequest]) -> ProgressFn:
        shares = {request.request_id: 0.0 for request in requests}

        def progress(request_id: str, done: int, total: int) -> None:
            shares[request_id] = done / total if total else 1.0
            finished = sum(share >= 1 for share in shares.values())
            label = f"variation {min(finished + 1, len(shares))} of {len(shares)}, step {done} of {total}"
            self.reporter.step(sum(shares.values()), len(shares), label)

        return progress

    def _record(self, job: Job, key: str, stage: str, record: dict[str, Any], seconds: float) -> None:
        self.store.finish_unit(
            key, sha256=job.track.sha256, stage=stage, result=record, seconds=seconds, now=self.clock()
        )

    def _check_stop(self) -> None:
        if self.should_stop():
            raise Stopped("asked to stop")

    # -- attempts and failures ---------------------------------------------------------------------

    @contextmanager
    def _guarded(self, job: Job) -> Iterator[None]:
        """What goes wrong with one track is that track's failure; what is the machine's fault is raised."""
        try:
            yield
        except (Stopped, FolderUnusable, sqlite3.Error):
            raise
        except OSError as e:
            if e.errno in SYSTEM_ERRORS:
                where = f" ({e.filename})" if e.filename else ""
                raise FolderUnusable(f"{(e.strerror or str(e)).lower()}{where}") from e
            self._fail(job, e)
        except Exception as e:
            self._fail(job, e)

    @contextmanager
    def _attempt(self, job: Job, stage: str) -> Iterator[None]:
        with self._guarded(job):
            self._begin_attempt(job, stage)
            self.reporter.stage(job.track.name, stage)
            yield
            self._end_attempt(job, "done")

    def _begin_attempt(self, job: Job, stage: str) -> None:
        self._check_stop()
        job.stage = stage
        job.attempt = self.store.begin(job.track.sha256, stage, now=self.clock())

    def _end_attempt(self, job: Job, outcome: str, *, error: Exception | None = None) -> None:
        if job.attempt is not None:
            trace = None if error is None else "".join(traceback.format_exception(error))
            text = None if error is None else _words(error)
            self.store.end(job.attempt, outcome=outcome, now=self.clock(), error=text, traceback=trace)
            job.attempt = None

    def _fail(self, job: Job, error: Exception) -> None:
        if job.over:
            return
        retry, track, text = self.recipe.config.retry, job.track, _words(error)
        self._end_attempt(job, "failed", error=error)
        log.debug("%s: %s failed", track.name, job.stage, exc_info=error)
        final = (
            isinstance(error, PipelineError) and error.permanent
        ) or track.attempts + 1 >= retry.max_attempts
        retry_at = None if final else self.clock() + retry.backoff_s * 2**track.attempts
        self.store.fail(track.sha256, stage=job.stage, error=text, now=self.clock(), retry_at=retry_at)
        job.over = True
        if not final:
            log.warning("%s: %s failed, will be tried again: %s", track.name, job.stage, text)
            return
        self.outcome.failed += 1
        self.reporter.failed(track.name, text)
        sentence = f"{track.name} {text}" if isinstance(error, BadAudio) else f"{track.name}: {text}"
        files = self.store.files_of(track.sha256)
        put_away(self.store, files, self.workplace.inbox, self.recipe.config.intake, error=sentence)
        job.desk.clear()

    def _put_back(self, jobs: Sequence[Job]) -> None:
        """Queue again what a stop or the machine's failure left; the next start does it if this can't."""
        for job in jobs:
            if not job.over:
                with suppress(sqlite3.Error):
                    self._end_attempt(job, "stopped")
                    self.store.release(job.track.sha256)


def _save(embedding: Embedding, out: BinaryIO) -> None:
    np.savez(out, track=embedding.track, windows=embedding.windows, times_s=embedding.times_s)


def _published(record: dict[str, Any]) -> Published:
    return Published(record["file"], record["sha256"], record["bytes"])


def _limits(settings: Normalize) -> audio.DecodeLimits:
    return audio.DecodeLimits(
        min_duration_s=settings.min_duration_s,
        max_duration_s=settings.max_duration_s,
        max_bytes=round(settings.max_size_mb * 1e6),
        accept_truncated=settings.accept_truncated,
    )


def _words(error: Exception) -> str:
    """One line for people; errors of other people's code are named by their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineError) else f"{type(error).__name__}: {text}"
