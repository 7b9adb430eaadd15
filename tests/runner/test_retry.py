"""When work is tried again: waits that grow and differ, and crashes that count."""

from __future__ import annotations

from pathlib import Path

import pytest
from runner_setup import Answers, Works

from pipeline.config import Retry
from pipeline.runner.retry import JITTER, backoff_s, take_over

SETTINGS = Retry(max_attempts=3, backoff_s=10.0, max_backoff_s=100.0)


def crash(works: Works, stage: str = "generate", *, limit: int = 8) -> list[str]:
    """Claim and begin as the runner does, then be gone; returns the hashes of what was under way."""
    tracks = works.store.claim(limit, now=works.now)
    for track in tracks:
        works.store.begin(track.sha256, stage, now=works.now)
    return [track.sha256 for track in tracks]


def test_waits_double_up_to_a_limit_give_or_take_a_quarter() -> None:
    for attempts, middle_s in ((1, 10.0), (2, 20.0), (3, 40.0), (4, 80.0), (5, 100.0), (500, 100.0)):
        waits = [backoff_s(f"{n}", attempts, SETTINGS) for n in range(200)]
        assert middle_s * (1 - JITTER) <= min(waits) < middle_s < max(waits) <= middle_s * (1 + JITTER)
    assert backoff_s("a", 1, SETTINGS) == backoff_s("a", 1, SETTINGS)


def test_what_kills_the_process_alone_fails_after_so_many_attempts(tmp_path: Path) -> None:
    works = Works.at(tmp_path, max_attempts=3)
    [sha256] = works.bring("a.wav")
    for n in (1, 2, 3):
        works.now += 1000
        assert crash(works) == [sha256]
        [found] = take_over(works.store, works.config.retry, now=works.now)
        assert (found.stage, found.given_up) == ("generate", n == 3)

    assert works.states([sha256]) == [("failed", 3)]
    assert "killed or crashed during generate" in (works.track(sha256).error or "")
    assert works.outcomes(sha256) == [("generate", "crashed")] * 3


def test_nobody_fails_for_a_crash_it_may_not_have_caused(tmp_path: Path) -> None:
    works = Works.at(tmp_path, max_attempts=3)
    hashes = works.bring("a.wav", "b.wav", "c.wav")
    for _ in range(2):
        works.now += 1000
        assert sorted(crash(works)) == sorted(hashes)  # together, since it is mostly no track's fault
        take_over(works.store, works.config.retry, now=works.now)
    works.now += 1000

    [alone] = crash(works)  # but not before the last attempt
    take_over(works.store, works.config.retry, now=works.now)

    assert works.states([alone]) == [("failed", 3)]
    others = [sha256 for sha256 in hashes if sha256 != alone]
    works.runner(Answers()).drain()
    assert works.states(others) == [("done", 0)] * 2


def test_with_a_single_attempt_a_track_is_still_not_blamed_for_its_batch(tmp_path: Path) -> None:
    works = Works.at(tmp_path, max_attempts=1)
    hashes = works.bring("a.wav", "b.wav")
    crash(works)
    assert not any(found.given_up for found in take_over(works.store, works.config.retry, now=works.now))

    [alone] = crash(works)
    assert [found.given_up for found in take_over(works.store, works.config.retry, now=works.now)] == [True]
    works.runner(Answers()).drain()
    assert sorted(works.states(hashes)) == [("done", 0), ("failed", 1)]
    assert works.track(alone).state == "failed"


def test_a_first_crash_costs_no_wait_but_its_place_in_the_queue(tmp_path: Path) -> None:
    works = Works.at(tmp_path, max_attempts=3)
    first, second = works.bring("a.wav", "b.wav")
    [crashed] = crash(works, limit=1)
    works.now += 1
    take_over(works.store, works.config.retry, now=works.now)

    claimed = [track.sha256 for track in works.store.claim(8, now=works.now)]
    assert claimed == [second if crashed == first else first, crashed]


def test_progress_forgives_earlier_crashes(tmp_path: Path) -> None:
    works = Works.at(tmp_path, max_attempts=3)
    [sha256] = works.bring("a.wav")
    for n in range(6):
        works.now += 1000
        crash(works)
        works.store.finish_unit(str(n), sha256=sha256, stage="generate", result={}, seconds=0, now=works.now)
        take_over(works.store, works.config.retry, now=works.now)
        assert works.states([sha256]) == [("queued", 1)]


@pytest.mark.parametrize("stage", ["normalize", "embed", "generate"])
def test_a_stop_is_no_attempt(tmp_path: Path, stage: str) -> None:
    works = Works.at(tmp_path, max_attempts=1)
    [sha256] = works.bring("a.wav")
    crash(works, stage)
    works.store.release_all(now=works.now)

    assert take_over(works.store, works.config.retry, now=works.now) == []
    assert works.states([sha256]) == [("queued", 0)]
    assert works.outcomes(sha256) == [(stage, "stopped")]
