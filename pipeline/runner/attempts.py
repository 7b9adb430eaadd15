"""The policy for failures: whose fault an error is, what is tried again, and when a track is given up."""

from __future__ import annotations

import errno
import logging
import sqlite3
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from pipeline.config import Retry
from pipeline.errors import BadAudio, FolderUnusable, PipelineError, SourceAway, SourceGone, Stopped
from pipeline.fs.disk import environment_error
from pipeline.progress import Reporter
from pipeline.records import Stage
from pipeline.runner.job import Job
from pipeline.runner.retry import backoff_s
from pipeline.store.schema import AttemptOutcome, Track
from pipeline.store.store import Store
from pipeline.workspace import Workspace

log = logging.getLogger("pipeline")

MISSING_INBOX_PAUSE_S = 30.0  # between tries to read a source whose inbox is missing
NO_SUCH_FILE = -float("inf")  # from `recheck_time`: no file has these bytes any more


@dataclass
class RunResult:
    """The tracks that a run has finished and those that have failed for good, by hash."""

    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    postponed_until: float | None = None  # the next try is due then, too late for this run to wait for


@dataclass
class Attempts:
    """Begins, ends and counts the attempts of claimed tracks."""

    retry: Retry
    workspace: Workspace
    store: Store
    reporter: Reporter
    clock: Callable[[], float]
    should_stop: Callable[[], bool]
    archive: Callable[[Track, str | None], None]  # the track's files; the text is why it failed
    recheck_time: Callable[[str], float | None]  # see `pipeline.intake.ingest.recheck_time`
    result: RunResult = field(default_factory=RunResult)

    @contextmanager
    def guarded(self, job: Job) -> Iterator[None]:
        """Turn an error into a failure of this track, unless it is an environment error: that is raised."""
        try:
            yield
        except Stopped:
            raise
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
            self.reporter.stage(job.track.name, stage)
            yield
            self.end(job, AttemptOutcome.DONE)

    def check_stop(self) -> None:
        if self.should_stop():
            raise Stopped("asked to stop")

    def begin(self, job: Job, stage: Stage) -> None:
        self.check_stop()
        job.stage = stage
        job.attempt = self.store.begin_attempt(job.track.sha256, stage, now=self.clock())

    def end(self, job: Job, outcome: AttemptOutcome, *, error: Exception | None = None) -> None:
        if job.attempt is not None:
            trace = None if error is None else "".join(traceback.format_exception(error))
            text = None if error is None else error_text(error)
            self.store.end_attempt(
                job.attempt, outcome=outcome, now=self.clock(), error=text, traceback=trace
            )
            job.attempt = None

    def fail(self, job: Job, error: Exception) -> None:
        """Count a failed attempt, which is final if the error is permanent or no more attempts are allowed.

        An error that may pass because the source is still being written, or because the inbox is
        missing, is not counted.
        """
        if job.over or self._wait_for_complete_file(job, error) or self._wait_for_inbox(job, error):
            return
        track, text, now = job.track, error_text(error), self.clock()
        current = self.store.track(track.sha256)  # units finished since the claim reset the count
        attempts = (current or track).attempts + 1
        permanent = isinstance(error, PipelineError) and error.permanent
        final = permanent or attempts >= self.retry.max_attempts
        wait_s = backoff_s(track.sha256, attempts, self.retry)
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
                "%s: %s failed, will be tried again in %.0f s: %s", track.name, job.stage, wait_s, text
            )

    def _give_up(self, job: Job, error: Exception, text: str) -> None:
        track = job.track
        self.result.failed.add(track.sha256)
        self.reporter.failed(track.name, text)
        self.archive(
            track, f"{track.name} {text}" if isinstance(error, BadAudio) else f"{track.name}: {text}"
        )
        job.scratch.clear()

    def _wait_for_complete_file(self, job: Job, error: Exception) -> bool:
        """Whether the bytes that can't be used may be the beginning of a file that is still being written."""
        if not isinstance(error, BadAudio) or isinstance(error, SourceGone) or job.stage != Stage.NORMALIZE:
            return False
        track = job.track
        until = self.recheck_time(track.sha256)
        if until is None:
            return False
        if until == NO_SUCH_FILE:
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

    def _wait_for_inbox(self, job: Job, error: Exception) -> bool:
        """Whether the source can't be read only because the whole inbox is missing."""
        if not isinstance(error, SourceAway):
            return False
        self._put_off(job, error, until=self.clock() + MISSING_INBOX_PAUSE_S)
        log.info("%s: %s", job.track.name, error_text(error))
        return True

    def _put_off(self, job: Job, error: Exception, *, until: float) -> None:
        """Queue the track again for a later time without counting an attempt."""
        with self.store.transaction():
            self.end(job, AttemptOutcome.STOPPED, error=error)
            self.store.release(job.track.sha256, not_before=until)
        job.over = True

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Queue unfinished tracks again after a stop or an environment error.

        If the database can't be written, the next start does it.
        """
        try:
            for job in jobs:
                if not job.over:
                    self.end(job, AttemptOutcome.STOPPED)
                    self.store.release(job.track.sha256)
        except sqlite3.Error:
            with suppress(sqlite3.Error):
                self.store.reopen()
                self.store.release_all(now=self.clock())


def error_text(error: Exception) -> str:
    """One line for people; an error that this program does not raise itself is named by its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineError) else f"{type(error).__name__}: {text}"
