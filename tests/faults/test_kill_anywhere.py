"""SIGKILL at seeded random moments over a batch of 40 files, in `once` and in `watch`.

Half of the files lie in the inbox at the start, the others are moved in while the program lives and
dies. A batch is over when a life has ended by itself with everything done; then there is a new home,
until there were as many kills as asked for.
"""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import KILLED, PATIENCE_S, Life, Zygote
from home_folder import Home
from invariants import Case, check_finished, check_redone, kills

FILES = 40
LONGEST_LIFE_S = 0.5  # of those that are killed; a whole batch takes several seconds
CHECK_EVERY_S = 0.05


@pytest.fixture(scope="module")
def batch(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(zygote, tmp_path_factory.mktemp("batch"), tracks=FILES)


@dataclass
class Batch:
    """One home on its way through kills."""

    home: Home
    outside: list[Path]  # files that are not in the inbox yet
    lives: list[Life] = field(default_factory=list)

    def feed(self, n: int) -> None:
        """Move the next files in, whole, as one rename each."""
        for path in [self.outside.pop() for _ in range(min(n, len(self.outside)))]:
            path.rename(self.home.inbox / path.name)


def opened(case: Case, folder: Path, rng: random.Random) -> Batch:
    home = case.home(folder / "home")
    outside = folder / "outside"
    outside.mkdir()
    later = rng.sample(sorted(home.inbox.iterdir()), FILES // 2)
    return Batch(home, [path.rename(outside / path.name) for path in later])


def killed_at_random(zygote: Zygote, batch: Batch, verb: str, rng: random.Random) -> Life:
    """A life that is killed after a random time, unless it ends by itself before."""
    life = zygote.start(batch.home, verb)
    batch.lives.append(life)
    before = rng.uniform(0, LONGEST_LIFE_S)
    for pause in (before * rng.random(), before / 2):
        if life.wait(pause) is None:
            batch.feed(rng.randrange(3))
    life.signal(signal.SIGKILL)
    life.end()
    return life


def ends_by_itself(zygote: Zygote, batch: Batch, verb: str) -> None:
    """A last life without faults: `once` ends, `watch` gets a signal when all is done."""
    batch.feed(len(batch.outside))
    life = zygote.start(batch.home, verb)
    batch.lives.append(life)
    for _ in range(round(PATIENCE_S / CHECK_EVERY_S)):
        if life.wait(CHECK_EVERY_S) is not None or is_over(batch.home):
            break
    if verb == "watch":
        life.signal(signal.SIGTERM)
    assert life.end() == 0, life.out


def is_over(home: Home) -> bool:
    """By the files alone: opening the database here would do the recovery that is the program's to do."""
    return len(list(home.outbox.glob("*/manifest.json"))) == FILES and not list(home.inbox.glob("*.wav"))


def survive(zygote: Zygote, case: Case, folder: Path, verb: str, *, wanted: int, seed: int) -> str:
    rng, made, batches, n_lives, redone = random.Random(seed), 0, 0, 0, 0
    while made < wanted:
        batches += 1
        batch = opened(case, folder_of(folder, batches), rng)
        while made + kills(batch.lives) < wanted and (batch.outside or not is_over(batch.home)):
            killed_at_random(zygote, batch, verb, rng)
        ends_by_itself(zygote, batch, verb)
        check_finished(batch.home, case.reference, batch.lives)
        redone += check_redone(batch.home, case.reference, batch.lives)
        made += kills(batch.lives)
        n_lives += len(batch.lives)
        assert {life.code for life in batch.lives} <= {0, KILLED}
        shutil.rmtree(batch.home.folder.parent)
    return (
        f"{verb}: {made} kills over {batches} batches of {FILES} files, {n_lives} lives: 0 lost, 0 published"
        f" twice, 0 torn, {redone} units made again"
    )


def folder_of(folder: Path, n: int) -> Path:
    made = folder / f"batch {n}"
    made.mkdir()
    return made


@pytest.mark.long
@pytest.mark.parametrize("verb", ["once", "watch"])
def test_50_kills_lose_nothing(
    zygote: Zygote, batch: Case, tmp_path: Path, figures: list[str], verb: str
) -> None:
    figures.append(survive(zygote, batch, tmp_path, verb, wanted=50, seed=3))


@pytest.mark.torture
@pytest.mark.parametrize("verb", ["once", "watch"])
def test_500_kills_lose_nothing(
    zygote: Zygote, batch: Case, tmp_path: Path, figures: list[str], verb: str
) -> None:
    figures.append(survive(zygote, batch, tmp_path, verb, wanted=500, seed=2026))
