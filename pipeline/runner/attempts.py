"""Whose failure it is, what is tried again, and what becomes of the track: the policy of the runner."""

from __future__ import annotations

import errno
import logging
import sqlite3
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Config
from pipeline.errors import (
    BadAudio,
    EngineFailure,
    FolderUnusable,
    PipelineError,
    SourceAway,
    SourceGone,
    Stopped,
)
from pipeline.fs.disk import environment_error
from pipeline.intake.archive import archive_files
from pipeline.intake.ingest import recheck_time
from pipeline.plan import TrackPlan, VariationUnit
from pipeline.progress import Reporter
from pipeline.records import Audio, VariationRequest
from pipeline.runner.retry import backoff_s
from pipeline.stages import STAGES
from pipeline.store.schema import AttemptOutcome, Track
from pipeline.store.store import Store
from pipeline.workspace import Scratch, Workspace

log = logging.getLogger("pipeline")

AWAY_S = 30.0  # between tries at a source whose inbox isn't there


@dataclass
class Job:
    """A claimed track on its way through the stages."""

    track: Track
    plan: TrackPlan
    scratch: Scratch
    normalized: dict[str, Any] = field(default_factory=dict)  # the records of what is finished
    embedding: dict[str, Any] = field(default_factory=dict)
    variations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by unit key
    attempt: int | None = None  # the open attempt's id
    stage: str = "outbox"  # where it was looked what is there already
    over: bool = False  # done, failed or queued again

    @property
    def missing(self) -> list[VariationUnit]:
        return [unit for unit in self.plan.variations if unit.key not in self.variations]

    def audio(self) -> Audio:
        """The normalized audio, mapped from the state folder."""
        loaded = self.scratch.load_normalized(self.plan.normalize_key, self.normalized["sample_rate"])
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
class Attempts:
    """Begins, ends and counts the attempts of claimed tracks."""

    config: Config
    workspace: Workspace
    store: Store
    reporter: Reporter
    clock: Callable[[], float]
    should_stop: Callable[[], bool]
    outcome: Outcome = field(default_factory=Outcome)

    @contextmanager
    def guarded(self, job: Job) -> Iterator[None]:
        """What goes wrong with one track is that track's failure; what is the machine's fault is raised."""
        try:
            yield
        except Stopped:
            raise
        except Exception as e:
            if (fault := environment_error(e)) and not self._is_tracks_own(e):
                raise fault from e
            if isinstance(e, sqlite3.Error):
                raise
            self.fail(job, e)

    def _is_tracks_own(self, error: Exception) -> bool:
        """Whether just this track's folder is closed, and the others are not."""
        if not isinstance(error, OSError) or error.errno not in (errno.EACCES, errno.EPERM):
            return False
        try:
            self.workspace.prepare()
        except FolderUnusable:
            return False
        return True

    @contextmanager
    def attempt(self, job: Job, stage: str) -> Iterator[None]:
        with self.guarded(job):
            self.begin(job, stage)
            self.reporter.stage(job.track.name, stage)
            yield
            self.end(job, "done")

    def check_stop(self) -> None:
        if self.should_stop():
            raise Stopped("asked to stop")

    def begin(self, job: Job, stage: str) -> None:
        self.check_stop()
        job.stage = stage
        job.attempt = self.store.begin_attempt(job.track.sha256, stage, now=self.clock())

    def end(self, job: Job, outcome: str, *, error: Exception | None = None) -> None:
        if job.attempt is not None:
            trace = None if error is None else "".join(traceback.format_exception(error))
            text = None if error is None else words(error)
            self.store.end_attempt(
                job.attempt, outcome=AttemptOutcome(outcome), now=self.clock(), error=text, traceback=trace
            )
            job.attempt = None

    def fail(self, job: Job, error: Exception) -> None:
        """Count a failed attempt; final if the error is permanent or it was the last one allowed."""
        if job.over or self._wait_for_the_rest(job, error) or self._wait_for_the_inbox(job, error):
            return
        track, text, now = job.track, words(error), self.clock()
        current = self.store.track(track.sha256)  # units finished meanwhile have forgiven earlier attempts
        attempts = (current or track).attempts + 1
        permanent = isinstance(error, PipelineError) and error.permanent
        final = permanent or attempts >= self.config.retry.max_attempts
        wait = backoff_s(track.sha256, attempts, self.config.retry)
        log.debug("%s: %s failed", track.name, job.stage, exc_info=error)
        with self.store.transaction():
            self.end(job, "failed", error=error)
            self.store.fail(
                track.sha256, stage=job.stage, error=text, now=now, retry_at=None if final else now + wait
            )
        job.over = True
        if final:
            self._give_up(job, error, text)
        else:
            log.warning("%s: %s failed, is tried again in %.0f s: %s", track.name, job.stage, wait, text)

    def _give_up(self, job: Job, error: Exception, text: str) -> None:
        track = job.track
        self.outcome.failed += 1
        self.reporter.failed(track.name, text)
        sentence = f"{track.name} {text}" if isinstance(error, BadAudio) else f"{track.name}: {text}"
        files = self.store.files_of(track.sha256)
        archive_files(self.store, files, self.workspace.inbox, self.config.intake, error=sentence)
        job.scratch.clear()

    def _wait_for_the_rest(self, job: Job, error: Exception) -> bool:
        """Whether bytes that can't be used may be the beginning of a file that is still being written."""
        if not isinstance(error, BadAudio) or isinstance(error, SourceGone) or job.stage != STAGES[0]:
            return False
        track = job.track
        until = recheck_time(self.store, track.sha256, self.config.intake, now=self.clock())
        if until is None:
            return False
        with self.store.transaction():
            self.end(job, "stopped", error=error)
            if until == -float("inf"):
                self.store.forget(track.sha256)
            else:
                self.store.release(track.sha256, not_before=until)
        job.over = True
        if until == -float("inf"):
            log.info("%s: gone or changed by now; the bytes taken in %s", track.name, words(error))
            job.scratch.clear()
        else:
            log.info("%s: %s; it is new, so it is looked at again", track.name, words(error))
        return True

    def _wait_for_the_inbox(self, job: Job, error: Exception) -> bool:
        if not isinstance(error, SourceAway):
            return False
        with self.store.transaction():
            self.end(job, "stopped", error=error)
            self.store.release(job.track.sha256, not_before=self.clock() + AWAY_S)
        job.over = True
        log.info("%s: %s", job.track.name, words(error))
        return True

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Queue again what a stop or the machine's failure left; the next start does it if this can't."""
        try:
            for job in jobs:
                if not job.over:
                    self.end(job, "stopped")
                    self.store.release(job.track.sha256)
        except sqlite3.Error:
            with suppress(sqlite3.Error):
                self.store.reopen()
                self.store.release_all(now=self.clock())


def words(error: Exception) -> str:
    """One line for people; errors of other people's code are named by their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineError) else f"{type(error).__name__}: {text}"
