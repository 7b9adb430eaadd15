"""A file that kills the process, as a bug in a decoder or an engine would: only that track fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Life, Zygote, new_home
from home_folder import Home, sha256_of
from invariants import Reference, check_finished, inputs_of

TRACKS, ATTEMPTS = 4, 3
NOBODY = "0" * 64


def deadly_home(folder: Path) -> Home:
    return new_home(
        folder,
        tracks=TRACKS,
        generate={"engine": "deadly"},
        retry={"max_attempts": ATTEMPTS, "backoff_s": 0},
    )


@pytest.fixture(scope="module")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    home = deadly_home(tmp_path_factory.mktemp("calm") / "home")
    inputs = inputs_of(home)
    life = zygote.run(home, "once", deadly=f"generate:{NOBODY}")
    assert life.code == 0, life.out
    return Reference.of(home, inputs)


@pytest.mark.parametrize("stage", ["decode", "generate"])
def test_the_track_that_kills_fails_and_the_others_get_done(
    zygote: Zygote, reference: Reference, tmp_path: Path, figures: list[str], stage: str
) -> None:
    home = deadly_home(tmp_path / "home")
    deadly = sha256_of(home.inbox / "track 01.wav")

    lives: list[Life] = []
    while len(lives) < 3 * ATTEMPTS and (not lives or lives[-1].code == KILLED):
        lives.append(zygote.run(home, "once", deadly=f"{stage}:{deadly}"))

    assert [life.code for life in lives] == [KILLED] * ATTEMPTS + [1], lives[-1].out
    check_finished(home, reference, lives, at_fault=[deadly])
    reason = (home.inbox / "failed" / "track 01.wav.error.txt").read_text()
    assert reason.startswith("track 01.wav")
    figures.append(
        f"a track that kills in {stage}: failed after {ATTEMPTS} restarts, {TRACKS - 1} others done"
    )


def test_watch_recovers_as_well(zygote: Zygote, reference: Reference, tmp_path: Path) -> None:
    home = deadly_home(tmp_path / "home")
    deadly = sha256_of(home.inbox / "track 03.wav")

    lives = [zygote.run(home, "watch", deadly=f"generate:{deadly}") for _ in range(ATTEMPTS)]
    lives.append(zygote.run(home, "once", deadly=f"generate:{deadly}"))

    assert [life.code for life in lives] == [KILLED] * ATTEMPTS + [1], lives[-1].out
    check_finished(home, reference, lives, at_fault=[deadly])
