"""When failed and crashed work is tried again, and when it is given up."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pipeline.config import Retry
from pipeline.store.schema import Track
from pipeline.store.store import Store

JITTER = 0.25  # of the wait, either way: tracks that failed together are not all tried again together


@dataclass(frozen=True)
class Crashed:
    """A track that was being worked on when the process died."""

    track: Track
    stage: str
    error: str
    given_up: bool


def backoff_s(sha256: str, attempts: int, settings: Retry) -> float:
    """The wait after the n-th failed attempt: doubled each time, with jitter that is the track's own."""
    share = int(hashlib.sha256(f"{sha256} {attempts}".encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    wait = min(settings.backoff_s * 2.0 ** (attempts - 1), settings.max_backoff_s)
    return wait * (1.0 + JITTER * (2.0 * share - 1.0))


def take_over(store: Store, settings: Retry, *, now: float) -> list[Crashed]:
    """Close what a killed instance left open, and count the crash as an attempt of what it worked on.

    When several tracks were under way nobody knows whose fault it was. So none of them is given up
    for that, and each is run alone before its last attempt: what kills the process alone is it.
    The first crash costs no wait, since it is mostly a power cut or somebody's `kill -9`; but the
    track goes behind all others, so that they get done whatever it does.
    """
    crashed = []
    with store.transaction():
        found = store.recover(now=now)
        for track, stage in found:
            attempts = track.attempts + 1
            if len(found) > 1:
                attempts = min(attempts, settings.max_attempts - 1)
            error = f"the program was killed or crashed during {stage}, {attempts} times in a row"
            if given_up := attempts >= settings.max_attempts:
                store.fail(track.sha256, stage=stage, error=error, now=now, retry_at=None)
            else:
                wait = backoff_s(track.sha256, attempts, settings) if attempts > 1 else 0.0
                solo = attempts >= settings.max_attempts - 1
                store.record_crash(
                    track.sha256, attempts=attempts, solo=solo, error=error, now=now, retry_at=now + wait
                )
            crashed.append(Crashed(track, stage, error, given_up))
    return crashed
