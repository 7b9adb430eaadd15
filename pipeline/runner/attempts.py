"""Tracks in processing, and the policy for failures: whose fault an error is, and what is tried again."""

from __future__ import annotations

import errno
import logging
import sqlite3
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Config, Output
from pipeline.engines.base import check_stop
from pipeline.errors import (
    BadAudio,
    EngineFailure,
    FolderUnusable,
    PipelineError,
    SourceAway,
    SourceGone,
)
from pipeline.executors.tasks import TakeRequest
from pipeline.fs.disk import environment_error
from pipeline.intake.archive import archive_files
from pipeline.intake.ingest import recheck_time
from pipeline.logs import log_facts
from pipeline.plan import Take, TrackPlan, VariationUnit
from pipeline.progress import Reporter
from pipeline.records import Audio, Stage
from pipeline.runner.making import Source, take_request
from pipeline.runner.retry import MISSING_INBOX_PAUSE_S, backoff_s
from pipeline.runner.takes import TakeChoice
from pipeline.store.schema import AttemptOutcome, Track
from pipeline.store.store import Store
from pipeline.workspace import Scratch, Workspace

log = logging.getLogger("pipeline")

RESULT_CHECK = "outbox"  # recorded as the stage of a failure while existing results are checked


@dataclass
class Job:
    """One track, its plan, and what is finished of it."""

    track: Track
    plan: TrackPlan
    scratch: Scratch
    normalized: dict[str, Any] = field(default_factory=dict)  # the record of the finished unit, or empty
    embedding: dict[str, Any] = field(default_factory=dict)  # likewise
    variations: dict[str, dict[str, Any]] = field(default_factory=dict)  # finished units' records, by key
    vectors: dict[str, Any] = field(default_factory=dict)  # of the variations: the record, or empty
    choices: list[TakeChoice] = field(
        default_factory=list
    )  # of its variations, once they are being generated
    attempt: int | None = None  # id of the open attempt
    began: float = 0.0  # when it began
    sound_s: float = 0.0  # length of the takes made in it
    stage: str = RESULT_CHECK  # the stage that runs now
    over: bool = False  # done, failed or queued again

    @property
    def missing(self) -> list[VariationUnit]:
        return [unit for unit in self.plan.variations if unit.key not in self.variations]

    def audio(self, key: str | None = None) -> Audio:
        """The normalized audio, or a variation's source by its key, mapped from the state folder."""
        loaded = self.stored(key or self.plan.normalize_key)
        if loaded is None:
            raise EngineFailure("the normalized audio has disappeared from the state folder")
        return loaded

    def stored(self, key: str) -> Audio | None:
        return self.scratch.load("normalized", key, self.normalized["sample_rate"])

    def request(self, unit: VariationUnit, take: Take, source: Audio, output: Output) -> TakeRequest:
        length_s, of_source = unit.length_s(source), self.normalized["source"]
        sound = Source(self.track.sha256, unit.source, source, of_source["loudness_lufs"])
        return take_request(take, sound, length_s, output, unit.gates)


@dataclass
class RunResult:
    """The tracks that a run has finished and those that have failed for good, by hash."""

    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    faulty: set[str] = field(default_factory=set)  # published files that fail their gates
    postponed_until: float | None = None  # the next try is due then, too late for this run to wait for

    def forget_tracks(self) -> None:
        """For a run that never ends, which would collect them for ever."""
        self.done.clear()
        self.failed.clear()
        self.faulty.clear()


@dataclass
class Attempts:
    """Begins, ends and counts the attempts of claimed tracks."""

    config: Config
    workspace: Workspace
    store: Store
    reporter: Reporter
    clock: Callable[[], float]
    should_stop: Callable[[], bool]
    result: RunResult
    worker: Callable[[], str]  # where the tasks run

    @contextmanager
    def guarded(self, job: Job) -> Iterator[None]:
        """Turn an error into a failure of this track, unless it is an environment error: that is raised."""
        with log_facts(track=job.track.name), self._guarded(job):
            yield

    @contextmanager
    def _guarded(self, job: Job) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            if (fault := environment_error(e)) and not self._is_of_one_folder(e):
                raise fault from e
            if isinstance(e, sqlite3.Error):
                raise
            self.fail(job, e)

    def _is_of_one_folder(self, error: Exception) -> bool:
        """Whether access was denied to this track's folder only: the working folders can be written."""
        if not isinstance(error, OSError) or error.errno not in (errno.EACCES, errno.EPERM):
            return False
        try:
            self.workspace.prepare()
        except FolderUnusable:
            return False
        return True

    @contextmanager
    def attempt(self, job: Job, stage: Stage) -> Iterator[None]:
        """Record what happens within as one attempt at the stage."""
        with self.guarded(job):
            self.begin(job, stage)
            self.reporter.stage([job.track.name], stage)
            yield
            self.end(job, AttemptOutcome.DONE)

    def begin(self, job: Job, stage: Stage) -> None:
        check_stop(self.should_stop)
        job.stage, job.began, job.sound_s = stage, self.clock(), 0.0
        job.attempt = self.store.begin_attempt(job.track.sha256, stage, now=job.began, worker=self.worker())

    def end(self, job: Job, outcome: AttemptOutcome, *, error: Exception | None = None) -> None:
        if job.attempt is not None:
            trace = None if error is None else "".join(traceback.format_exception(error))
            text = None if error is None else error_text(error)
            now = self.clock()
            self.store.end_attempt(
                job.attempt,
                outcome=outcome,
                now=now,
                error=text,
                cause=None if error is None else error_cause(error),
                traceback=trace,
                sound_s=job.sound_s,
                # It may have been started by the first task, or have died.
                worker=self.worker() if outcome == AttemptOutcome.DONE else None,
            )
            job.attempt = None
            if outcome == AttemptOutcome.DONE:
                self.reporter.stage_done(
                    job.track.name, job.stage, attempt=job.track.attempts + 1, seconds=now - job.began
                )

    def fail(self, job: Job, error: Exception) -> None:
        """Count a failed attempt, which is final if the error is permanent or no more attempts are allowed.

        An error that may pass because the source is still being written, or because the inbox is
        missing, is not counted.
        """
        if job.over or self._wait_for_complete_file(job, error):
            return
        if isinstance(error, SourceAway):
            self._put_off(job, error, until=self.clock() + MISSING_INBOX_PAUSE_S)
            log.info("%s: %s", job.track.name, error_text(error))
            return
        track, text, now = job.track, error_text(error), self.clock()
        current = self.store.track(track.sha256)  # units finished since the claim reset the count
        attempts = (current or track).attempts + 1
        permanent = isinstance(error, PipelineError) and error.permanent
        final = permanent or attempts >= self.config.retry.max_attempts
        wait_s = backoff_s(track.sha256, attempts, self.config.retry)
        log.debug("%s: %s failed", track.name, job.stage, exc_info=error)
        with self.store.transaction():
            self.end(job, AttemptOutcome.FAILED, error=error)
            self.store.fail(
                track.sha256, stage=job.stage, error=text, now=now, retry_at=None if final else now + wait_s
            )
        job.over = True
        if final:
            self._give_up(job, error, text)
        else:
            log.warning(
                "%s: %s failed, will be tried again in %.0f s: %s", track.name, job.stage, wait_s, text,
                extra={"stage": job.stage, "attempt": attempts, "seconds": now - job.began},
            )  # fmt: skip

    def _give_up(self, job: Job, error: Exception, text: str) -> None:
        track = job.track
        self.result.failed.add(track.sha256)
        with log_facts(stage=job.stage):
            self.reporter.failed(track.name, text)
        self.archive(track, f"{track.name}{' ' if isinstance(error, BadAudio) else ': '}{text}")
        job.scratch.clear()

    def archive(self, track: Track, error: str | None) -> None:
        """Archive the track's files; `error`: why it failed."""
        files = self.store.files_of(track.sha256)
        archive_files(self.store, files, self.workspace.inbox_files, self.config.intake, error=error)

    def _wait_for_complete_file(self, job: Job, error: Exception) -> bool:
        """Whether the bytes that can't be used may be the beginning of a file that is still being written."""
        if not isinstance(error, BadAudio) or isinstance(error, SourceGone) or job.stage != Stage.NORMALIZE:
            return False
        track = job.track
        until = recheck_time(self.store, track.sha256, self.config.intake, now=self.clock())
        if until is None:
            return False
        if until == -float("inf"):
            with self.store.transaction():
                self.end(job, AttemptOutcome.STOPPED, error=error)
                self.store.forget(track.sha256)
            job.over = True
            job.scratch.clear()
            log.info("%s: has changed or disappeared since it was read; its earlier bytes: %s",
                     track.name, error_text(error))  # fmt: skip
        else:
            self._put_off(job, error, until=until)
            log.info("%s: %s; the file is new, so it will be read again", track.name, error_text(error))
        return True

    def _put_off(self, job: Job, error: Exception, *, until: float) -> None:
        """Queue the track again for a later time without counting an attempt."""
        with self.store.transaction():
            self.end(job, AttemptOutcome.STOPPED, error=error)
            self.store.release(job.track.sha256, not_before=until)
        job.over = True

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Queue tracks again that are not over, after a stop or an environment error.

        If the database can't be written, `put_back_all` or the next start does it.
        """
        with suppress(sqlite3.Error):
            self.store.reopen()
            with self.store.transaction():
                for job in jobs:
                    if not job.over:
                        self.end(job, AttemptOutcome.STOPPED)
                        self.store.release(job.track.sha256)

    def put_back_all(self) -> None:
        """Queue all running tracks again. Only when no batch is being processed."""
        with suppress(sqlite3.Error):
            self.store.reopen()
            self.store.release_all(now=self.clock())


def error_cause(error: Exception) -> str:
    """A word for the kind of error, of which there are few."""
    return type(error).__name__ if isinstance(error, PipelineError) else "unexpected"


def error_text(error: Exception) -> str:
    """One line for people; an error that this program does not raise itself is named by its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineError) else f"{type(error).__name__}: {text}"
