"""The one place where queue, stages, engines and outbox meet.

Tracks are claimed in batches, since the variations of a batch share one pass over a model's
weights. Each stage takes the whole batch; a track that fails drops out and the others go on. What
is finished is recorded at once, unit by unit, so a killed run goes on where it was.
"""

from __future__ import annotations

import sqlite3
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline import audio, stages
from pipeline.config import Normalize
from pipeline.engines.base import Generator, ProgressFn
from pipeline.engines.loading import Engines
from pipeline.errors import BadAudio, DiskFull, EngineFailure, FolderUnusable, SourceAway, SourceGone, Stopped
from pipeline.fs import copying
from pipeline.fs.disk import environment_error, room_for
from pipeline.intake.archive import archive_files, is_there
from pipeline.outbox import manifest, verify
from pipeline.outbox.manifest import Json
from pipeline.outbox.outbox import EMBEDDING, Outbox, Published
from pipeline.plan import Recipe, VariationUnit
from pipeline.progress import Reporter
from pipeline.records import Embedding, Failure, Variation, VariationRequest
from pipeline.runner.attempts import Attempts, Job, Outcome
from pipeline.store.schema import Track
from pipeline.store.store import Store
from pipeline.workspace import InputFolder, Workspace


@dataclass
class Runner:
    """Works the queue off. All it depends on is handed in."""

    recipe: Recipe
    workspace: Workspace
    folder: InputFolder  # whose tracks are processed; the inbox stands for the whole queue
    store: Store
    outbox: Outbox
    engines: Engines
    reporter: Reporter
    clock: Callable[[], float]
    should_stop: Callable[[], bool]
    outbox_device: int | None = None  # what the outbox was on when the program started; None: not asked
    _is_cramped: bool = False  # the last batch ended for want of space

    @cached_property
    def attempts(self) -> Attempts:
        return Attempts(
            self.recipe.config, self.workspace, self.store, self.reporter, self.clock, self.should_stop
        )

    @property
    def outcome(self) -> Outcome:
        return self.attempts.outcome

    def next_due(self) -> float | None:
        """When the next queued track may be processed; None if none is queued."""
        return self.store.next_due(self.folder)

    def drain(self) -> bool:
        """Process all queued tracks that are due.

        Returns:
            Whether there were any.

        Raises:
            Stopped: it was asked to stop; what was under way is queued again.
            FolderUnusable: the disk is full or a folder can't be written; the same.
        """
        worked = False
        while self.next_batch():
            worked = True
        return worked

    def next_batch(self) -> bool:
        """Process the next batch of the queue; False if nothing was due. Raises as `drain`."""
        try:
            if (due := self.next_due()) is None or due > self.clock():
                return False
            self._see_the_outbox()
            tracks = self.store.claim(self.store.due(self._batch_size(), self.folder, now=self.clock()))
            self.process(tracks)
        except DiskFull:
            if self._is_cramped:
                raise
            self._is_cramped = True
            self.make_room()
            return self.next_batch()
        except sqlite3.Error as e:
            raise environment_error(e) or e from e
        self._is_cramped = False
        return bool(tracks)

    def process(self, tracks: Sequence[Track]) -> None:
        """Take claimed tracks through all stages."""
        jobs = [
            Job(track, self.recipe.plan(track.sha256), self.workspace.scratch(track.sha256))
            for track in tracks
        ]
        try:
            for stage in (self._take_stock, *map(self._stage, stages.STAGES)):
                stage([job for job in jobs if not job.over])
        except BaseException as e:
            self.attempts.put_back(jobs)
            if (fault := environment_error(e)) and fault is not e:
                raise fault from e
            raise

    def _see_the_outbox(self) -> None:
        """Nothing is written into the folder below a mount that has gone meanwhile."""
        device = self.workspace.outbox.stat().st_dev
        if self.outbox_device is not None and device != self.outbox_device:
            raise FolderUnusable(
                f"{self.workspace.outbox} is on another disk than it was: is its own mounted?"
            )

    def _batch_size(self) -> int:
        """As many tracks as go together and have room for their results; one, after the disk was full."""
        config = self.recipe.config
        folders = [self.workspace.outbox, self.workspace.state]
        reserve = config.disk.min_free_mb * 1e6
        room = room_for(folders, each_bytes=self.recipe.result_bytes, reserve_bytes=reserve)
        return 1 if self._is_cramped else min(config.generate.batch_tracks, room)

    def make_room(self) -> None:
        """Between two batches: remove what can be made again, then put back what a full disk kept running.

        That is normalized audio, and working copies of files that are still where they were.
        """
        self.workspace.drop_normalized()
        for track in [*self.store.tracks("queued"), *self.store.tracks("running")]:
            if any(is_there(file) for file in self.store.files_of(track.sha256)):
                self.workspace.scratch(track.sha256).clear()
        self.store.release_all(now=self.clock())

    def _stage(self, name: str) -> Callable[[Sequence[Job]], None]:
        return {"normalize": self._normalize, "embed": self._embed, "generate": self._generate}[name]

    # -- stages ----------------------------------------------------------------------------------

    def _take_stock(self, jobs: Sequence[Job]) -> None:
        """Find what earlier runs finished and the outbox still holds, under the names of today's plan."""
        for job in jobs:
            with self.attempts.guarded(job):
                self.attempts.check_stop()
                folder = job.track.folder
                wanted = [job.plan.embed_key, *(unit.key for unit in job.plan.variations)]
                recorded = {key: record for key in wanted if (record := self.store.unit(key)) is not None}
                held = self.outbox.held(folder, {key: _published(recorded[key]) for key in recorded})
                is_complete = len(held) == len(wanted)
                if is_complete and self._is_published(job, held):
                    job.embedding = recorded.pop(job.plan.embed_key)
                    job.variations = recorded
                    continue
                if not is_complete and self.outbox.manifest(folder) is not None:
                    self._working_copy(job)  # a result that stands is not opened for work that can't be done
                self.outbox.open_for_work(folder)
                self._take_over(job, recorded, held)

    def _is_published(self, job: Job, held: Mapping[str, Published]) -> bool:
        """Whether a killed run had come as far as the very manifest that is wanted now."""
        named = all(held[unit.key].file == unit.file for unit in job.plan.variations)
        return named and self.outbox.manifest_lists(job.track.folder, list(held.values()))

    def _take_over(self, job: Job, recorded: Mapping[str, Json], held: Mapping[str, Published]) -> None:
        """Rename finished variations to what they are called in today's plan."""
        if job.plan.embed_key in held:
            job.embedding = recorded[job.plan.embed_key]
        names = {unit.key: unit.file for unit in job.plan.variations if unit.key in held}
        self.outbox.rename(job.track.folder, {held[key].file: file for key, file in names.items()})
        for key, file in names.items():
            job.variations[key] = {**recorded[key], "file": file}
            if recorded[key]["file"] != file:
                self._record(job, key, "generate", job.variations[key], seconds=0.0)

    def _normalize(self, jobs: Sequence[Job]) -> None:
        settings = self.recipe.config.normalize
        for job in jobs:
            key = job.plan.normalize_key
            job.normalized = self.store.unit(key) or {}
            needed = not job.embedding or job.missing
            if job.normalized and (not needed or job.scratch.load_normalized(key, settings.sample_rate)):
                continue
            with self.attempts.attempt(job, "normalize"):
                start = self.clock()
                decoded, source = audio.decode(
                    self._working_copy(job), sample_rate=settings.sample_rate, limits=_limits(settings)
                )
                normalized = stages.normalize(decoded, settings)
                job.scratch.save_normalized(key, normalized)
                job.normalized = manifest.normalized_record(source, normalized)
                self._record(job, key, "normalize", job.normalized, self.clock() - start)

    def _embed(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.embedding:
                continue
            with self.attempts.attempt(job, "embed"):
                start = self.clock()
                embedder = self.engines.embedder()
                result = stages.embed(job.audio(), embedder, should_stop=self.should_stop)
                published = self.outbox.publish(
                    job.track.folder,
                    EMBEDDING,
                    partial(_save, result),
                    verify=verify.embedding(embedder.dim, len(result.windows)),
                )
                job.embedding = manifest.embedding_record(published, embedder, self.recipe.embedder)
                self._record(job, job.plan.embed_key, "embed", job.embedding, self.clock() - start)

    def _generate(self, jobs: Sequence[Job]) -> None:
        """All missing variations of all tracks of the batch in one call of the generator."""
        for job in jobs:
            with self.attempts.guarded(job):
                if not job.missing:
                    self._finish(job)
        jobs = [job for job in jobs if not job.over]
        if not jobs:
            return
        if failure := self._generate_together(jobs):
            _let_go(failure)
            unfinished = [job for job in jobs if not job.over]
            if len(jobs) == 1:
                self.attempts.fail(jobs[0], failure)
            for job in unfinished if len(jobs) > 1 else ():  # find out whose fault it is
                self.attempts.end(job, "stopped")
                self._generate([job])

    def _generate_together(self, jobs: Sequence[Job]) -> Exception | None:
        """One call of the generator; returns what it raised, if that is not for all tracks to end by."""
        requests: list[VariationRequest] = []
        owners: dict[str, tuple[Job, VariationUnit]] = {}
        for job in jobs:
            with self.attempts.guarded(job):
                self.attempts.begin(job, "generate")
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
                with self.attempts.guarded(job):
                    self._take(job, unit, by_id[unit.key], result, generator, seconds=self.clock() - last)
                last = self.clock()
        except Exception as e:
            if isinstance(e, Stopped | sqlite3.Error) or environment_error(e):
                raise
            return e
        for job in jobs:
            if not job.over:
                self.attempts.fail(job, EngineFailure(f"{generator.name} made too few variations"))
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
            verify=verify.wav(finished.audio.n_samples, finished.audio.sample_rate, finished.audio.channels),
        )
        job.variations[unit.key] = manifest.variation_record(published, facts, finished)
        self._record(job, unit.key, "generate", job.variations[unit.key], seconds)
        if not job.missing and not job.over:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        """Complete the track's folder, then the record, then deal with the source."""
        folder, track = job.track.folder, job.track
        variations = [job.variations[unit.key] for unit in job.plan.variations]
        came_as = self.store.files_of(track.sha256)
        self.outbox.keep_only(folder, {EMBEDDING, *(record["file"] for record in variations)})
        self.outbox.publish_manifest(
            folder,
            manifest.manifest(
                name=track.name,
                names=[file.display for file in came_as],
                sha256=track.sha256,
                n_bytes=track.bytes,
                normalized=job.normalized,
                embedding=job.embedding,
                variations=variations,
                config_sha256=self.recipe.config.sha256,
                now=self.clock(),
            ),
        )
        with self.store.together():
            self.attempts.end(job, "done")
            self.store.finish(
                track.sha256, plan_key=job.plan.key, source=job.normalized["source"], now=self.clock()
            )
        job.over = True
        archive_files(self.store, came_as, self.workspace.inbox, self.recipe.config.intake, error=None)
        job.scratch.clear()
        self.outcome.done += 1
        self.reporter.finished(track.name, f"{len(variations)} variations in {folder}")

    # -- the pieces ------------------------------------------------------------------------------

    def _working_copy(self, job: Job) -> Path:
        """The track's bytes, copied from wherever they lie and checked, safe from what people do there."""
        target, sha256 = job.scratch.source, job.track.sha256
        if target.exists() and copying.hash_file(target) == sha256:
            return target
        trouble: OSError | None = None
        sources = self.store.files_of(sha256)
        for file in sources:
            try:
                if self._copied(job, file.moved_to or file.path):
                    return target
            except OSError as e:
                if environment_error(e):
                    raise
                trouble = e
        if trouble is not None:
            raise trouble
        if any(file.root == self.workspace.inbox for file in sources) and not self.workspace.inbox.is_dir():
            raise SourceAway("can't be had while the inbox is away")
        raise SourceGone("was removed or changed since it was taken in: put it in the inbox again")

    def _copied(self, job: Job, source: Path) -> bool:
        incoming = self.workspace.incoming()
        try:
            follow = self.recipe.config.intake.follow_symlinks
            if copying.copy_in(source, incoming, follow=follow) != job.track.sha256:
                return False
            job.scratch.adopt(incoming)
        except (BadAudio, copying.Changed):
            return False
        finally:
            incoming.unlink(missing_ok=True)
        return True

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


def _let_go(failure: BaseException) -> None:
    """Of what the frames of a failure hold, that is the memory of the whole batch; its lines stay."""
    chain: BaseException | None = failure
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


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
