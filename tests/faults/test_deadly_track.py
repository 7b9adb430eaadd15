"""A file that kills the process, as a bug in a decoder or an engine would: only that track fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, ForkServer, ProgramRun, new_home
from home_folder import Home, sha256_of
from invariants import Reference, check_finished, inputs_of

pytestmark = pytest.mark.long  # true processes

TRACKS, ATTEMPTS = 4, 3
NO_TRACK = "0" * 64


def deadly_home(folder: Path) -> Home:
    return new_home(
        folder,
        tracks=TRACKS,
        generate={"engine": "deadly"},
        retry={"max_attempts": ATTEMPTS, "backoff_s": 0},
    )


@pytest.fixture(scope="module")
def reference(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    home = deadly_home(tmp_path_factory.mktemp("undisturbed") / "home")
    inputs = inputs_of(home)
    run = fork_server.run(home, "once", deadly=f"generate:{NO_TRACK}")
    assert run.code == 0, run.out
    return Reference.of(home, inputs)


@pytest.mark.parametrize("stage", ["decode", "generate"])
def test_a_track_that_kills_the_process_fails_and_the_others_are_done(
    fork_server: ForkServer, reference: Reference, tmp_path: Path, figures: list[str], stage: str
) -> None:
    home = deadly_home(tmp_path / "home")
    deadly = sha256_of(home.inbox / "track 01.wav")

    runs: list[ProgramRun] = []
    while len(runs) < 3 * ATTEMPTS and (not runs or runs[-1].code == KILLED):
        runs.append(fork_server.run(home, "once", deadly=f"{stage}:{deadly}"))

    assert [run.code for run in runs] == [KILLED] * ATTEMPTS + [1], runs[-1].out
    check_finished(home, reference, runs, at_fault=[deadly])
    reason = (home.inbox / "failed" / "track 01.wav.error.txt").read_text()
    assert reason.startswith("track 01.wav")
    figures.append(f"a track that kills in {stage}: failed after {ATTEMPTS} kills, {TRACKS - 1} others done")


def test_watch_recovers_as_well(fork_server: ForkServer, reference: Reference, tmp_path: Path) -> None:
    home = deadly_home(tmp_path / "home")
    deadly = sha256_of(home.inbox / "track 03.wav")

    runs = [fork_server.run(home, "watch", deadly=f"generate:{deadly}") for _ in range(ATTEMPTS)]
    runs.append(fork_server.run(home, "once", deadly=f"generate:{deadly}"))

    assert [run.code for run in runs] == [KILLED] * ATTEMPTS + [1], runs[-1].out
    check_finished(home, reference, runs, at_fault=[deadly])
