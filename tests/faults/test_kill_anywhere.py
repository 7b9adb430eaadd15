"""SIGKILL at seeded random moments over a batch of 40 files, in `once` and in `watch`.

Half of the files are in the inbox at the start, the others are moved in between the kills. A batch is
over when a run has ended by itself with everything done; then the next batch begins in a new home,
until there were as many kills as asked for.
"""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import KILLED, TIMEOUT_S, ForkServer, ProgramRun
from home_folder import Home
from invariants import Case, check_finished, check_redone, kills

FILES = 40
LONGEST_RUN_S = 0.5  # of those that are killed; a whole batch takes several seconds
CHECK_EVERY_S = 0.05


@pytest.fixture(scope="module")
def batch(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(fork_server, tmp_path_factory.mktemp("batch"), tracks=FILES)


@dataclass
class Batch:
    """A home whose runs are killed until everything is done."""

    home: Home
    outside: list[Path]  # files that are not in the inbox yet
    runs: list[ProgramRun] = field(default_factory=list)

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


def killed_at_random(fork_server: ForkServer, batch: Batch, verb: str, rng: random.Random) -> ProgramRun:
    """A run that is killed after a random time, unless it ends by itself before."""
    run = fork_server.start(batch.home, verb)
    batch.runs.append(run)
    before = rng.uniform(0, LONGEST_RUN_S)
    for pause in (before * rng.random(), before / 2):
        if run.wait(pause) is None:
            batch.feed(rng.randrange(3))
    run.signal(signal.SIGKILL)
    run.end()
    return run


def ends_by_itself(fork_server: ForkServer, batch: Batch, verb: str) -> None:
    """A last run without faults: `once` ends, `watch` gets a signal when all is done."""
    batch.feed(len(batch.outside))
    run = fork_server.start(batch.home, verb)
    batch.runs.append(run)
    for _ in range(round(TIMEOUT_S / CHECK_EVERY_S)):
        if run.wait(CHECK_EVERY_S) is not None or is_over(batch.home):
            break
    if verb == "watch":
        run.signal(signal.SIGTERM)
    assert run.end() == 0, run.out


def is_over(home: Home) -> bool:
    """Judged by the files alone: to open the database would recover its log, which the program has to do."""
    return len(list(home.outbox.glob("*/manifest.json"))) == FILES and not list(home.inbox.glob("*.wav"))


def kill_until(
    fork_server: ForkServer, case: Case, folder: Path, verb: str, *, wanted: int, seed: int
) -> str:
    rng, made, batches, n_runs, redone = random.Random(seed), 0, 0, 0, 0
    while made < wanted:
        batches += 1
        batch = opened(case, folder_of(folder, batches), rng)
        while made + kills(batch.runs) < wanted and (batch.outside or not is_over(batch.home)):
            killed_at_random(fork_server, batch, verb, rng)
        ends_by_itself(fork_server, batch, verb)
        check_finished(batch.home, case.reference, batch.runs)
        redone += check_redone(batch.home, case.reference, batch.runs)
        made += kills(batch.runs)
        n_runs += len(batch.runs)
        assert {run.code for run in batch.runs} <= {0, KILLED}
        shutil.rmtree(batch.home.folder.parent)
    return (
        f"{verb}: {made} kills over {batches} batches of {FILES} files, {n_runs} runs: 0 lost, 0 published"
        f" twice, 0 torn, {redone} units made again"
    )


def folder_of(folder: Path, n: int) -> Path:
    made = folder / f"batch {n}"
    made.mkdir()
    return made


@pytest.mark.long
@pytest.mark.parametrize("verb", ["once", "watch"])
def test_50_kills_lose_nothing(
    fork_server: ForkServer, batch: Case, tmp_path: Path, figures: list[str], verb: str
) -> None:
    figures.append(kill_until(fork_server, batch, tmp_path, verb, wanted=50, seed=3))


@pytest.mark.torture
@pytest.mark.parametrize("verb", ["once", "watch"])
def test_500_kills_lose_nothing(
    fork_server: ForkServer, batch: Case, tmp_path: Path, figures: list[str], verb: str
) -> None:
    figures.append(kill_until(fork_server, batch, tmp_path, verb, wanted=500, seed=2026))
