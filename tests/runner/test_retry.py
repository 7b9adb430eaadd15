"""When work is tried again: growing waits with jitter, and crashes that count as attempts."""

from __future__ import annotations

from pathlib import Path

import pytest
from runner_setup import RunnerSetup, StubGenerator
from stored_tracks import claim_due

from pipeline.config import Executor, Retry
from pipeline.runner.retry import JITTER, backoff_s, recover_crashed
from pipeline.store.schema import Track

SETTINGS = Retry(max_attempts=3, backoff_s=10.0, max_backoff_s=100.0)


def recover(setup: RunnerSetup) -> list[str]:
    """Recover from a crash; returns the hashes of the tracks that are given up."""
    given_up = recover_crashed(setup.store, setup.config, now=setup.now)
    return [track.sha256 for track in given_up]


def crash(setup: RunnerSetup, stage: str = "generate", *, limit: int = 8) -> list[str]:
    """Claim tracks and begin attempts as the runner does, and never end them; returns the tracks' hashes."""
    tracks = claim_due(setup.store, limit, now=setup.now)
    for track in tracks:
        setup.store.begin_attempt(track.sha256, stage, now=setup.now)
    return [track.sha256 for track in tracks]


def test_waits_double_up_to_a_limit_with_a_jitter_of_a_quarter() -> None:
    for attempts, middle_s in ((1, 10.0), (2, 20.0), (3, 40.0), (4, 80.0), (5, 100.0), (500, 100.0)):
        waits = [backoff_s(f"{n}", attempts, SETTINGS) for n in range(200)]
        assert middle_s * (1 - JITTER) <= min(waits) < middle_s < max(waits) <= middle_s * (1 + JITTER)
    assert backoff_s("a", 1, SETTINGS) == backoff_s("a", 1, SETTINGS)


def test_a_track_that_kills_the_process_alone_fails_after_the_last_attempt(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=3)
    [sha256] = setup.add_tracks("a.wav")
    for n in (1, 2, 3):
        setup.now += 1000
        assert crash(setup) == [sha256]
        assert recover(setup) == ([sha256] if n == 3 else [])

    assert setup.states([sha256]) == [("failed", 3)]
    assert "killed or crashed during generate" in (setup.track(sha256).error or "")
    assert setup.outcomes(sha256) == [("generate", "crashed")] * 3


def test_no_track_fails_for_a_crash_that_another_may_have_caused(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=3)
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav")
    for _ in range(2):
        setup.now += 1000
        assert sorted(crash(setup)) == sorted(hashes)  # together, since most crashes are no track's fault
        recover(setup)
    setup.now += 1000

    [alone] = crash(setup)  # alone, for its last attempt
    recover(setup)

    assert setup.states([alone]) == [("failed", 3)]
    others = [sha256 for sha256 in hashes if sha256 != alone]
    setup.runner(StubGenerator()).drain()
    assert setup.states(others) == [("done", 0)] * 2


def test_with_a_single_attempt_a_track_is_still_not_blamed_for_its_batch(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=1)
    hashes = setup.add_tracks("a.wav", "b.wav")
    crash(setup)
    assert recover(setup) == []

    [alone] = crash(setup)
    assert recover(setup) == [alone]
    setup.runner(StubGenerator()).drain()
    assert sorted(setup.states(hashes)) == [("done", 0), ("failed", 1)]
    assert setup.track(alone).state == "failed"


def test_a_track_of_a_first_crash_is_due_at_once_but_behind_the_others(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=3)
    first, second = setup.add_tracks("a.wav", "b.wav")
    [crashed] = crash(setup, limit=1)
    setup.now += 1
    recover(setup)

    claimed = [track.sha256 for track in claim_due(setup.store, 8, now=setup.now)]
    assert claimed == [second if crashed == first else first, crashed]


def test_progress_resets_the_count_of_crashes(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=3)
    [sha256] = setup.add_tracks("a.wav")
    for n in range(6):
        setup.now += 1000
        crash(setup)
        setup.store.finish_unit(str(n), sha256=sha256, stage="generate", result={}, seconds=0, now=setup.now)
        recover(setup)
        assert setup.states([sha256]) == [("queued", 1)]


@pytest.mark.parametrize("stage", ["normalize", "embed", "generate"])
def test_a_stop_does_not_count_as_an_attempt(tmp_path: Path, stage: str) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=1)
    [sha256] = setup.add_tracks("a.wav")
    crash(setup, stage)
    setup.store.release_all(now=setup.now)

    assert recover(setup) == []
    assert setup.states([sha256]) == [("queued", 0)]
    assert setup.outcomes(sha256) == [(stage, "stopped")]


def test_with_workers_a_kill_of_the_program_is_not_counted_and_the_track_goes_last(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=2)
    setup.config = setup.config.model_copy(update={"executor": Executor()})
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav")

    def due() -> list[Track]:
        return setup.store.due(3, setup.workspace.input_folder, now=setup.now)

    first, second, third = (track.sha256 for track in due())
    assert crash(setup, limit=2) == [first, second]
    setup.now += 1
    assert recover(setup) == []
    assert setup.states(hashes) == [("queued", 0)] * 3
    assert due()[0].sha256 == third
    assert not any(track.solo for track in due())

    crash(setup, limit=3)
    setup.now += 1
    assert recover(setup) == []
    assert [setup.track(sha256).solo for sha256 in (first, second, third)] == [True, True, False]
    assert setup.states(hashes) == [("queued", 0)] * 3
