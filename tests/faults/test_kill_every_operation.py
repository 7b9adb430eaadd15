"""SIGKILL before, in the middle of and after every file operation of a run with one track, and of recovery.

The operations are those that change files: creating, writing, fsync, rename, link, unlink, mkdir,
truncate, SQLite's own among them, so the moments before and after every commit are there too.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import KILLED, Fault, ForkServer, Mode, ProgramRun
from invariants import Case, check_finished, check_redone

WRITES = ("write", "pwrite", "writev", "fwrite")
RECOVERED_EVERY = 30  # after a kill at one in 30 operations, the next run is killed at each of its own

Point = tuple[int, Mode]


@dataclass(frozen=True)
class Found:
    """The outcome of one sequence of kills."""

    runs: list[ProgramRun]
    redone: int
    wrong: str | None


def kill_points(run: ProgramRun) -> list[Point]:
    """Every point at which a run like this one can be killed; only writes can be torn."""
    counted = [op for op in run.trace if op.n]
    points = [(op.n, mode) for op in counted for mode in (Mode.KILL_BEFORE, Mode.KILL_AFTER)]
    return sorted([*points, *((op.n, Mode.KILL_TORN) for op in counted if op.call in WRITES)])


def kill_at(fork_server: ForkServer, case: Case, folder: Path, points: Sequence[Point]) -> Found:
    """One home: a run killed at each of the points in turn, then one that isn't."""
    home, runs, wrong, redone = case.home(folder), [], None, 0
    for k, mode in points:
        runs.append(fork_server.run(home, "once", fault=Fault(mode, k)))
        if runs[-1].code != KILLED:
            break  # it had fewer operations
    runs.append(fork_server.run(home, "once"))
    try:
        assert {run.code for run in runs} <= {0, KILLED}, runs[-1].out
        check_finished(home, case.reference, runs)
        redone = check_redone(home, case.reference, runs)
    except AssertionError as e:
        first = next((run.trace[-1] for run in runs if run.trace), None)
        wrong = f"{[(k, mode.name) for k, mode in points]}: {str(e)[:400]}; first run ended at {first}"
    else:
        shutil.rmtree(folder)
    return Found(runs, redone, wrong)


def survey(
    fork_server: ForkServer, case: Case, tmp_path: Path, ways: Sequence[Sequence[Point]], what: str
) -> str:
    found = [kill_at(fork_server, case, tmp_path / f"{n:04}", points) for n, points in enumerate(ways)]
    wrong = [one.wrong for one in found if one.wrong]
    assert not wrong, f"{len(wrong)} of {len(ways)} sequences of kills:\n" + "\n".join(wrong[:20])
    n_kills = sum(run.code == KILLED for one in found for run in one.runs)
    assert n_kills >= len(ways)
    redone = sum(one.redone for one in found)
    return f"{what}: {n_kills} kills, a complete recovery after each, {redone} units made again"


def run_without_faults(fork_server: ForkServer, case: Case, folder: Path) -> ProgramRun:
    return fork_server.run(case.home(folder), "once")


def kill_points_of_recovery(fork_server: ForkServer, case: Case, folder: Path, first: Point) -> list[Point]:
    """Every point at which the run after a first kill can be killed."""
    home = case.home(folder)
    fork_server.run(home, "once", fault=Fault(first[1], first[0]))
    return kill_points(fork_server.run(home, "once"))


def test_a_kill_at_some_operations_loses_nothing(
    fork_server: ForkServer, one_track: Case, tmp_path: Path, figures: list[str]
) -> None:
    points = kill_points(run_without_faults(fork_server, one_track, tmp_path / "undisturbed"))
    ways = [[point] for point in sorted(random.Random(4).sample(points, 12))]
    figures.append(survey(fork_server, one_track, tmp_path, ways, f"{len(ways)} of {len(points)} operations"))


@pytest.mark.long
def test_a_second_kill_during_recovery_loses_nothing(
    fork_server: ForkServer, one_track: Case, tmp_path: Path, figures: list[str]
) -> None:
    rng, ways = random.Random(5), []
    for first in rng.sample(
        kill_points(run_without_faults(fork_server, one_track, tmp_path / "undisturbed")), 8
    ):
        again = kill_points_of_recovery(fork_server, one_track, tmp_path / f"first {first}", first)
        ways += [[first, second] for second in rng.sample(again, 2)]
    figures.append(survey(fork_server, one_track, tmp_path, ways, "second kill during recovery"))


def test_status_answers_wherever_a_run_was_killed(
    fork_server: ForkServer, one_track: Case, tmp_path: Path
) -> None:
    last = max(
        k for k, _ in kill_points(run_without_faults(fork_server, one_track, tmp_path / "undisturbed"))
    )
    for k in range(1, last, 50):
        home = one_track.home(tmp_path / f"{k}")
        fork_server.run(home, "once", fault=Fault(Mode.KILL_AFTER, k))
        asked = fork_server.run(home, "status", "--json")
        assert asked.code == 0, f"killed after {k}: {asked.out}"


@pytest.mark.torture
def test_a_kill_at_every_operation_loses_nothing(
    fork_server: ForkServer, one_track: Case, tmp_path: Path, figures: list[str]
) -> None:
    points = kill_points(run_without_faults(fork_server, one_track, tmp_path / "undisturbed"))
    n = max(k for k, _ in points)
    what = f"before, in the middle of and after each of {n} operations"
    figures.append(survey(fork_server, one_track, tmp_path, [[point] for point in points], what))


@pytest.mark.torture
def test_a_kill_at_every_operation_of_many_recoveries_loses_nothing(
    fork_server: ForkServer, one_track: Case, tmp_path: Path, figures: list[str]
) -> None:
    """After a kill at one operation in 30, a kill at every operation of the next run, in a random mode."""
    rng, ways = random.Random(6), []
    points = kill_points(run_without_faults(fork_server, one_track, tmp_path / "undisturbed"))
    for first in [
        point for point in points if point[0] % RECOVERED_EVERY == 0 and point[1] is Mode.KILL_AFTER
    ]:
        again = kill_points_of_recovery(fork_server, one_track, tmp_path / f"first {first}", first)
        for k in sorted({k for k, _ in again}):
            ways.append([first, rng.choice([point for point in again if point[0] == k])])
    figures.append(
        survey(
            fork_server, one_track, tmp_path, ways, f"every operation of 1 in {RECOVERED_EVERY} recoveries"
        )
    )
