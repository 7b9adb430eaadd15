"""When failed and crashed work is tried again, and when it is given up."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import replace

from pipeline.config import Config, Retry
from pipeline.intake.settling import PATIENCE
from pipeline.store.schema import AttemptOutcome, Track
from pipeline.store.store import Store

log = logging.getLogger("pipeline")

JITTER = 0.25  # of the wait, either way, so that tracks that failed together are not all retried together
MISSING_INBOX_PAUSE_S = 30.0  # between tries to read a source whose inbox is missing


def backoff_s(sha256: str, attempts: int, settings: Retry) -> float:
    """The wait after the n-th failed attempt: doubled each time, with jitter derived from the hash."""
    share = int(hashlib.sha256(f"{sha256} {attempts}".encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    wait = min(settings.backoff_s * 2.0 ** (attempts - 1), settings.max_backoff_s)
    return wait * (1.0 + JITTER * (2.0 * share - 1.0))


def longest_wait_s(config: Config) -> float:
    """The longest wait that this program sets; a longer one ends now, as the clock was set back."""
    settle_s = 2 * PATIENCE * config.intake.settle_s
    return max((1 + JITTER) * config.retry.max_backoff_s, MISSING_INBOX_PAUSE_S, settle_s)


def recover_crashed(store: Store, config: Config, *, now: float) -> list[Track]:
    """Close the attempts that a killed instance left open, and count the crash as a failed attempt.

    With workers it is not counted, since a track that kills a process kills a worker; but the track goes to
    the end of the queue, and after a second crash in a row it is a batch of its own. Inline, if several
    tracks were being processed, nobody knows which one caused the crash. So none of them is given up for
    it, and each runs alone before its last attempt: if a track kills the process while it runs alone, that
    track is the cause. The first crash costs no wait, since most often it is a power cut or a `kill -9`;
    but the track goes to the end of the queue, so that the other tracks are finished whatever it does.

    Returns:
        The tracks that are given up.
    """
    given_up, settings = [], config.retry
    with store.transaction():
        found = store.recover(now=now)
        if config.executor.kind != "inline":
            for track, stage in found:
                _put_last(store, track, stage, now=now)
            return []
        for track, stage in found:
            attempts = track.attempts + 1
            if len(found) > 1:
                attempts = min(attempts, settings.max_attempts - 1)
            error = f"the program was killed or crashed during {stage}, {attempts} times in a row"
            is_last = attempts >= settings.max_attempts
            log.info("%s: %s, %s", track.name, error, "is given up" if is_last else "will be tried again")
            if is_last:
                store.fail(track.sha256, stage=stage, error=error, now=now, retry_at=None)
                given_up.append(replace(track, error=error))
            else:
                wait = backoff_s(track.sha256, attempts, settings) if attempts > 1 else 0.0
                solo = attempts >= settings.max_attempts - 1
                store.record_crash(
                    track.sha256, attempts=attempts, solo=solo, error=error, now=now, retry_at=now + wait
                )
    return given_up


def _put_last(store: Store, track: Track, stage: str, *, now: float) -> None:
    """Queue an interrupted track behind all others; after a second time in a row, as a batch of its own."""
    outcomes = [attempt.outcome for attempt in store.attempts(track.sha256)]
    was_crashed_twice = outcomes[-2:] == [AttemptOutcome.CRASHED] * 2
    store.record_crash(
        track.sha256,
        attempts=track.attempts,
        solo=was_crashed_twice,
        error=f"the program was killed during {stage}",
        now=now,
        retry_at=now,
    )


def local_time(when: float) -> str:
    """Seconds since 1970 as date and time of this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
