"""Takes tracks from the queue through the stages: where queue, stages, engines and outbox meet.

Tracks are claimed in batches, since the variations of a batch share one pass over a model's
weights. Each stage processes the whole batch; a track that fails drops out and the others go on.
Every finished unit of work is recorded at once, so that after a kill the next run goes on from there.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pipeline.engines.base import check_stop
from pipeline.errors import BadAudio, DiskFull, EngineUnusable, SourceAway, SourceGone
from pipeline.executors import tasks
from pipeline.executors.base import Executor, Task, WorkerLost, result_of
from pipeline.executors.encode import variations_file
from pipeline.executors.judge import Judge
from pipeline.fs import copying
from pipeline.fs.disk import count_that_fit, environment_error
from pipeline.gallery.gallery import Gallery
from pipeline.gallery.pictures import Picture
from pipeline.logs import log_facts
from pipeline.maintenance.reconcile import check_outbox_mount
from pipeline.outbox import manifest
from pipeline.outbox.manifest import Json
from pipeline.outbox.outbox import EMBEDDING, PAGE, VECTORS, Outbox, Published, files_of
from pipeline.plan import Recipe
from pipeline.progress import Reporter
from pipeline.records import Stage
from pipeline.runner.attempts import Attempts, Job, RunResult
from pipeline.runner.generation import Generation
from pipeline.runner.making import limits_of
from pipeline.runner.retry import local_time, longest_wait_s
from pipeline.store.schema import AttemptOutcome, SourceFile, Track, TrackState
from pipeline.store.store import Store
from pipeline.workspace import InputFolder, Workspace

LOAD_TRIES = 3  # of loading the engines: an idle process may have died, and another be killed by chance

log = logging.getLogger("pipeline")


@dataclass
class Runner:
    """Processes the queue. Everything it depends on is passed in."""

    recipe: Recipe
    workspace: Workspace
    folder: InputFolder  # whose tracks are processed; the inbox stands for the whole queue
    store: Store
    outbox: Outbox
    executor: Executor
    judge: Judge  # compares results with each other; the verdicts come from the workers
    reporter: Reporter
    clock: Callable[[], float]
    should_stop: Callable[[], bool]
    gallery: Gallery | None = None  # where the pages of finished tracks are written
    n_parallel: int = 1  # batches that are generated at the same time, this runner's among them
    n_sharing: int = 1  # runners that share a generator, likewise
    result: RunResult = field(default_factory=RunResult)
    on_claimed: Callable[[], None] = lambda: None  # called when a batch has been claimed
    was_disk_full: bool = False  # the last batch ended because of it
    makes: ClassVar[bool] = True  # it takes tracks through all stages

    @cached_property
    def attempts(self) -> Attempts:
        return Attempts(
            self.recipe.config,
            self.workspace,
            self.store,
            self.reporter,
            self.clock,
            self.should_stop,
            self.result,
            worker=lambda: self.executor.where,
        )

    @cached_property
    def _generation(self) -> Generation:
        return Generation(
            recipe=self.recipe,
            store=self.store,
            outbox=self.outbox,
            executor=self.executor,
            judge=self.judge,
            attempts=self.attempts,
            reporter=self.reporter,
            clock=self.clock,
            should_stop=self.should_stop,
            set_aside=self._set_aside,
            finish=self._finish,
        )

    @property
    def is_busy(self) -> bool:
        """Whether batches are being processed in other threads."""
        return False

    @property
    def has_room(self) -> bool:
        """Whether the next call of `next_batch` can begin a batch."""
        return True

    @property
    def has_error(self) -> bool:
        """Whether the next call of `next_batch` raises what has ended a batch in another thread."""
        return False

    def workers(self) -> list[dict[str, Any]]:
        """What each worker does, for `status`: its engines, since when, and how many takes are done."""
        now, config = self.reporter.activity, self.recipe
        names: dict[str, str] = {
            Stage.EMBED: config.embedder.card.name,
            Stage.GENERATE: config.generator.card.name,
            Stage.EMBED_VARIATIONS: config.embedder.card.name,
        }
        rate = now.steps_per_s if now else None
        return [
            {
                "where": self.executor.where,
                "loaded": list(self.executor.loaded),
                "track": now.name if now else None,
                "stage": now.stage if now else None,
                "engine": names.get(now.stage) if now else None,
                "steps_per_s": None if rate is None else round(rate, 1),
                "step": now.step if now else "",
                "since": now.began_at if now else None,
                "done": now.done if now else 0.0,
                "total": now.total if now else 0.0,
                "stepped_at": now.stepped_at if now else None,
                "makes": self.makes,
            }
        ]

    def next_due(self) -> float | None:
        """When the next queued track may be processed, see `longest_wait_s`; None if none is queued."""
        due, now = self.store.next_due(self.folder), self.clock()
        longest_s = longest_wait_s(self.recipe.config)
        if due is None or due <= now + longest_s:
            return due
        log.warning(
            "the next try was due only at %s: the clock was set back, so it is due now", local_time(due)
        )
        self.store.end_waits(after=now + longest_s)
        return now

    def drain(self) -> bool:
        """Process all queued tracks that are due; False if there were none. Raises as `next_batch`."""
        worked = False
        while self.next_batch():
            worked = True
        return worked

    def next_batch(self) -> bool:
        """Process the next batch of the queue; False if nothing was due.

        The first time that the disk is full, what can be made again is removed and one track is tried.

        Raises:
            Stopped: it was asked to stop; unfinished tracks are queued again.
            FolderUnusable, EngineUnusable: the disk, a folder or an engine can't be used; the same.
        """
        try:
            worked = self.try_batch()
        except DiskFull:
            if self.was_disk_full:
                raise
            self.was_disk_full = True
            self.free_space()
            return self.next_batch()
        self.was_disk_full = False
        return worked

    def try_batch(self) -> bool:
        """As `next_batch`, but without another try after a full disk."""
        try:
            with log_facts(worker=lambda: self.executor.where):
                return self._claim_and_process()
        except sqlite3.Error as e:
            raise environment_error(e) or e from e
        finally:
            self.reporter.idle()

    def release_if_idle(self) -> None:
        """See `Executor`."""
        self.executor.release_if_idle()

    def close(self) -> None:
        """End the workers."""
        self.executor.close()

    def _claim_and_process(self) -> bool:
        due = self.next_due()
        if due is None or due > self.clock():
            return False
        check_outbox_mount(self.workspace.outbox, self.store)
        # Runners that share a generator have two batches together: one that it works on, and one that is
        # normalized or finished meanwhile.
        size = self._batch_size()
        size = min(size, max(1, 2 * size // self.n_sharing))
        # Small enough at the end of the queue that no worker is left without work.
        n_shares = 2 * self.n_parallel if self.n_parallel > 1 else 1
        tracks = self.store.due(size * n_shares, self.folder, now=self.clock())
        tracks = tracks[: max(1, min(size, len(tracks) // n_shares))]
        self._open_engines(tracks)
        claimed = self.store.claim(tracks)
        self.on_claimed()
        self.process(claimed)
        return bool(claimed)

    def _open_engines(self, tracks: Sequence[Track]) -> None:
        """Load the engines that the tracks need, before any track is claimed.

        Raises:
            EngineUnusable: one can't be loaded, which is no track's fault.
        """
        plans = [self.recipe.plan(track.sha256) for track in tracks]
        embedded = [key for plan in plans for key in (plan.embed_key, plan.vectors_key) if key]
        embeds = any(self.store.unit(key) is None for key in embedded)
        generates = any(self.store.unit(unit.key) is None for plan in plans for unit in plan.variations)
        if not (embeds or generates):
            return
        for n in range(1, LOAD_TRIES + 1):
            try:
                if generates:
                    self._run(tasks.open_generator)
                self._run(tasks.open_others, embeds, generates)
                return
            except WorkerLost as e:
                check_stop(self.should_stop)
                if n == LOAD_TRIES:
                    raise EngineUnusable(f"an engine can't be loaded: {e}") from e

    def process(self, tracks: Sequence[Track]) -> None:
        """Take claimed tracks through all stages, in this order."""
        steps = [self._find_results, self._normalize, self._embed, self._generation.run]
        with self.processing(tracks) as jobs:
            for step in steps:
                step([job for job in jobs if not job.over])

    @contextmanager
    def processing(self, tracks: Sequence[Track]) -> Iterator[list[Job]]:
        """Claimed tracks, of which what is unfinished is queued again after an error."""
        jobs = [
            Job(track, self.recipe.plan(track.sha256), self.workspace.scratch(track.sha256))
            for track in tracks
        ]
        try:
            yield jobs
        except BaseException as e:
            self.attempts.put_back(jobs)
            if (fault := environment_error(e)) and fault is not e:
                raise fault from e
            raise

    def _batch_size(self) -> int:
        """As many tracks as the configuration allows and the disk has space for; one after a full disk."""
        config = self.recipe.config
        reserve = config.disk.min_free_mb * 1e6
        fitting = count_that_fit(
            self.workspace.disks, each_bytes=self.recipe.result_bytes, reserve_bytes=reserve
        )
        return 1 if self.was_disk_full else min(config.generate.batch_tracks, fitting)

    def free_space(self) -> None:
        """Between two batches: remove what can be made again, and queue again what a full disk left running.

        Removed are normalized audio, and working copies whose source is still in its place.
        """
        self.workspace.drop_normalized()
        for track in [*self.store.tracks(TrackState.QUEUED), *self.store.tracks(TrackState.RUNNING)]:
            if any(self._is_in_place(file) for file in self.store.files_of(track.sha256)):
                self.workspace.scratch(track.sha256).clear()
        self.store.release_all(now=self.clock())

    def _is_in_place(self, file: SourceFile) -> bool:
        """Whether a source is unchanged at the path where it is recorded."""
        try:
            found = self.workspace.files_at(file.root).find(file.current_path)
        except OSError:
            return False
        return found is not None and found.identity == file.identity

    # -- existing results ------------------------------------------------------------------------

    def _find_results(self, jobs: Sequence[Job]) -> None:
        """Find results of earlier runs that the outbox still has, so that only the others are made."""
        for job in jobs:
            with self.attempts.guarded(job):
                check_stop(self.should_stop)
                self._find_results_of(job)

    def _find_results_of(self, job: Job) -> None:
        folder, wanted = job.track.folder, job.plan.keys
        recorded = {key: record for key in wanted if (record := self.store.unit(key)) is not None}
        files = {key: files_of(record) for key, record in recorded.items()}
        rejected = {one.file: one for _, *others in files.values() for one in others}
        found = self.outbox.find_intact(folder, {key: own for key, (own, *_) in files.items()} | rejected)
        present = {
            key: found[key]
            for key, (_, *others) in files.items()
            if key in found and all(found.get(one.file) == one for one in others)
        }
        is_complete = len(present) == len(wanted)
        if is_complete and self._is_published(job, found):
            job.embedding = recorded.pop(job.plan.embed_key)
            job.vectors = recorded.pop(job.plan.vectors_key, {})
            job.variations = recorded
            return
        if not is_complete and self.outbox.read_manifest(folder) is not None:
            self._working_copy(job)  # raises if the source is gone: then the published results stay
        self.outbox.remove_manifest(folder)
        self._set_aside(job, [one.sha256 for one in present.values()])
        self._adopt(job, recorded, present)

    def _set_aside(self, job: Job, stays: Collection[str]) -> None:
        """Copy results that a person has kept, before others take their names; but for those that stay."""
        kept = {one.sha256 for one in self.store.ratings(job.track.sha256) if one.kept}
        for copy in self.outbox.set_aside(job.track.folder, kept - set(stays)):
            log.info("%s: a result that was rated as kept is copied to %s", job.track.name, copy)

    def _is_published(self, job: Job, found: Mapping[str, Published]) -> bool:
        """Whether the manifest already lists exactly what is wanted: only the last steps are missing."""
        named = all(found[unit.key].file == unit.file for unit in job.plan.variations)
        return named and self.outbox.manifest_lists(job.track.folder, list(found.values()))

    def _adopt(self, job: Job, recorded: Mapping[str, Json], present: Mapping[str, Published]) -> None:
        """Take over results of earlier runs, renamed to what the current plan calls them."""
        if job.plan.embed_key in present:
            job.embedding = recorded[job.plan.embed_key]
        if job.plan.vectors_key in present:
            job.vectors = recorded[job.plan.vectors_key]
        names = {unit.key: unit.file for unit in job.plan.variations if unit.key in present}
        self.outbox.rename(job.track.folder, {present[key].file: file for key, file in names.items()})
        for key, file in names.items():
            job.variations[key] = {**recorded[key], "file": file}
            if recorded[key]["file"] != file:
                self._record(job, key, Stage.GENERATE, job.variations[key], seconds=0.0)

    # -- stages ----------------------------------------------------------------------------------

    def _normalize(self, jobs: Sequence[Job]) -> None:
        settings = self.recipe.config.normalize
        for job in jobs:
            key = job.plan.normalize_key
            job.normalized = self.store.unit(key) or {}
            needed = not job.embedding or job.missing
            if job.normalized and (not needed or job.scratch.load("normalized", key, settings.sample_rate)):
                continue
            with self.attempts.attempt(job, Stage.NORMALIZE):
                start = self.clock()
                path = self._working_copy(job)
                normalized, source = self._run(tasks.normalize, path, settings, limits_of(settings))
                job.scratch.save("normalized", key, normalized.audio)
                job.normalized = manifest.normalized_record(source, normalized)
                self._record(job, key, Stage.NORMALIZE, job.normalized, self.clock() - start)

    def _embed(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.embedding:
                continue
            with self.attempts.attempt(job, Stage.EMBED):
                start = self.clock()
                content, made_by, dim = self._run(tasks.embed, job.audio())
                published = self.outbox.publish(job.track.folder, EMBEDDING, content)
                job.embedding = manifest.embedding_record(published, made_by, dim, self.recipe.embedder)
                self._record(job, job.plan.embed_key, Stage.EMBED, job.embedding, self.clock() - start)

    def _embed_variations(self, job: Job, variations: Sequence[Json]) -> None:
        """Embed the published variations, unless the vectors of these very files are there already."""
        hashes = [record["sha256"] for record in variations]
        if job.vectors.get("of") == hashes:
            return
        self.attempts.end(job, AttemptOutcome.DONE)  # of the stage before
        with self.attempts.attempt(job, Stage.EMBED_VARIATIONS):
            start, vectors = self.clock(), []
            for n, record in enumerate(variations, 1):
                file = self.outbox.readable(job.track.folder, record["file"])
                vector, made_by, dim = self._run(tasks.embed_file, file)
                vectors.append(vector)
                self.reporter.step(n, len(variations), f"variation {n} of {len(variations)}")
            published = self.outbox.publish(job.track.folder, VECTORS, variations_file(vectors, dim))
            made = manifest.embedding_record(published, made_by, dim, self.recipe.embedder)
            job.vectors = {**made, "of": hashes}
            self._record(job, job.plan.vectors_key, Stage.EMBED_VARIATIONS, job.vectors, self.clock() - start)

    def _finish(self, job: Job) -> None:
        """Publish the last files, record the track as done, and archive its source, in this order."""
        folder, track = job.track.folder, job.track
        variations = [job.variations[unit.key] for unit in job.plan.variations]
        if job.plan.vectors_key:
            self._embed_variations(job, variations)
            if job.over:  # it has failed
                return
        takes = [take for record in variations for take in record.get("takes", ())]
        others = [*takes, *([job.vectors] if job.vectors else [])]
        files = [record["file"] for record in [*variations, *others] if "file" in record]
        self.outbox.keep_only(folder, {EMBEDDING, *files, *([PAGE] if self.gallery else [])})
        names = [file.display for file in self.store.files_of(track.sha256)]
        source = {"name": track.name, "names": names, "sha256": track.sha256, "bytes": track.bytes}
        made = manifest.manifest(
            source,
            job.normalized,
            job.embedding,
            variations,
            self.recipe,
            vectors=job.vectors,
            plan=job.plan,
            now=self.clock(),
        )
        self.outbox.publish_manifest(folder, made)
        if self.gallery:
            self.gallery.add(track, made, _if_there(job.scratch.source), self._pictures)
        with self.store.transaction():
            self.attempts.end(job, AttemptOutcome.DONE)
            self.store.finish(
                track.sha256,
                plan_key=job.plan.key,
                recipe_key=self.recipe.key,
                source=job.normalized["source"],
                now=self.clock(),
            )
        job.over = True
        self.attempts.archive(track, None)
        job.scratch.clear()
        self.result.done.add(track.sha256)
        self.result.faulty |= {f"{folder}/{one['file']}" for one in variations if "failed" in one}
        self.reporter.finished(track.name, f"{len(variations)} variations in {folder}")
        if self.gallery:
            self.gallery.refresh()

    # -- helpers ---------------------------------------------------------------------------------

    def _pictures(self, source: Path | None, results: list[Path | bytes]) -> list[Picture]:
        """For a page of the gallery; none if a sound can't be decoded, which is no reason to fail a track."""
        try:
            found: list[Picture] = self._run(tasks.pictures, source, *results)
            return found
        except (BadAudio, WorkerLost) as e:
            log.warning("a page has no waveforms: %s", e)
            return []

    def _run(self, task: Task, *args: Any) -> Any:
        return result_of(self.executor, task, *args, should_stop=self.should_stop)

    def _working_copy(self, job: Job) -> Path:
        """The track's bytes in the state folder, copied from a source and checked against the hash."""
        target, sha256 = job.scratch.source, job.track.sha256
        if target.exists() and copying.hash_file(target) == sha256:
            return target
        read_error: OSError | None = None
        sources = self.store.files_of(sha256)
        for file in sources:
            try:
                if self._copied(job, file):
                    return target
            except OSError as e:
                if environment_error(e):
                    raise
                read_error = e
        if read_error is not None:
            raise read_error
        inbox = self.workspace.inbox_files
        if any(file.root == inbox.root for file in sources) and inbox.is_away():
            raise SourceAway("can't be read while the inbox is missing")
        raise SourceGone("was removed or changed since it was taken in: put it in the inbox again")

    def _copied(self, job: Job, source: SourceFile) -> bool:
        files, incoming = self.workspace.files_at(source.root), self.workspace.incoming()
        try:
            follow = self.recipe.config.intake.follow_symlinks
            if files.copy_in(source.current_path, incoming, follow=follow) != job.track.sha256:
                return False
            job.scratch.adopt(incoming)
        except (BadAudio, copying.FileChanged):
            return False
        finally:
            incoming.unlink(missing_ok=True)
        return True

    def _record(self, job: Job, key: str, stage: Stage, record: dict[str, Any], seconds: float) -> None:
        self.store.finish_unit(
            key, sha256=job.track.sha256, stage=stage, result=record, seconds=seconds, now=self.clock()
        )


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None
