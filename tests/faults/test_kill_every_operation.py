"""SIGKILL before, in the middle of and after every file operation of one track's life, and of its recovery.

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
from harness import KILLED, Fault, Life, Mode, Zygote
from invariants import Case, check_finished, check_redone

WRITES = ("write", "pwrite", "writev", "fwrite")
RECOVERED_EVERY = 30  # of the operations: in the life after dying there, the program dies at each once more

Point = tuple[int, Mode]


@dataclass(frozen=True)
class Found:
    """The outcome of one way of dying."""

    lives: list[Life]
    redone: int
    wrong: str | None


def all_points(life: Life) -> list[Point]:
    """Every way to die in a life like this one; torn are only writes."""
    counted = [op for op in life.trace if op.n]
    points = [(op.n, mode) for op in counted for mode in (Mode.KILL_BEFORE, Mode.KILL_AFTER)]
    return sorted([*points, *((op.n, Mode.KILL_TORN) for op in counted if op.call in WRITES)])


def die_at(zygote: Zygote, case: Case, folder: Path, points: Sequence[Point]) -> Found:
    """One home: a life killed at each of the points in turn, then one that isn't."""
    home, lives, wrong, redone = case.home(folder), [], None, 0
    for k, mode in points:
        lives.append(zygote.run(home, "once", fault=Fault(mode, k)))
        if lives[-1].code != KILLED:
            break  # it had fewer operations
    lives.append(zygote.run(home, "once"))
    try:
        assert {life.code for life in lives} <= {0, KILLED}, lives[-1].out
        check_finished(home, case.reference, lives)
        redone = check_redone(home, case.reference, lives)
    except AssertionError as e:
        first = next((life.trace[-1] for life in lives if life.trace), None)
        wrong = f"{[(k, mode.name) for k, mode in points]}: {str(e)[:400]}; first life ended at {first}"
    else:
        shutil.rmtree(folder)
    return Found(lives, redone, wrong)


def survey(zygote: Zygote, case: Case, tmp_path: Path, ways: Sequence[Sequence[Point]], what: str) -> str:
    found = [die_at(zygote, case, tmp_path / f"{n:04}", points) for n, points in enumerate(ways)]
    wrong = [one.wrong for one in found if one.wrong]
    assert not wrong, f"{len(wrong)} of {len(ways)} ways to die:\n" + "\n".join(wrong[:20])
    died = sum(life.code == KILLED for one in found for life in one.lives)
    assert died >= len(ways)
    return f"{what}: {died} kills, each way completed, {sum(one.redone for one in found)} units made again"


def calm_life(zygote: Zygote, case: Case, folder: Path) -> Life:
    return zygote.run(case.home(folder), "once")


def recovery_points(zygote: Zygote, case: Case, folder: Path, first: Point) -> list[Point]:
    """Every way to die in the life after a first death."""
    home = case.home(folder)
    zygote.run(home, "once", fault=Fault(first[1], first[0]))
    return all_points(zygote.run(home, "once"))


def test_dying_at_some_operations_loses_nothing(
    zygote: Zygote, one_track: Case, tmp_path: Path, figures: list[str]
) -> None:
    points = all_points(calm_life(zygote, one_track, tmp_path / "calm"))
    ways = [[point] for point in sorted(random.Random(4).sample(points, 12))]
    figures.append(survey(zygote, one_track, tmp_path, ways, f"{len(ways)} of {len(points)} operations"))


@pytest.mark.long
def test_dying_again_during_recovery_loses_nothing(
    zygote: Zygote, one_track: Case, tmp_path: Path, figures: list[str]
) -> None:
    rng, ways = random.Random(5), []
    for first in rng.sample(all_points(calm_life(zygote, one_track, tmp_path / "calm")), 8):
        again = recovery_points(zygote, one_track, tmp_path / f"first {first}", first)
        ways += [[first, second] for second in rng.sample(again, 2)]
    figures.append(survey(zygote, one_track, tmp_path, ways, "second kill during recovery"))


def test_status_answers_wherever_a_run_was_killed(zygote: Zygote, one_track: Case, tmp_path: Path) -> None:
    last = max(k for k, _ in all_points(calm_life(zygote, one_track, tmp_path / "calm")))
    for k in range(1, last, 50):
        home = one_track.home(tmp_path / f"{k}")
        zygote.run(home, "once", fault=Fault(Mode.KILL_AFTER, k))
        asked = zygote.run(home, "status", "--json")
        assert asked.code == 0, f"killed after {k}: {asked.out}"


@pytest.mark.torture
def test_dying_at_every_operation_loses_nothing(
    zygote: Zygote, one_track: Case, tmp_path: Path, figures: list[str]
) -> None:
    points = all_points(calm_life(zygote, one_track, tmp_path / "calm"))
    n = max(k for k, _ in points)
    what = f"before, in the middle of and after each of {n} operations"
    figures.append(survey(zygote, one_track, tmp_path, [[point] for point in points], what))


@pytest.mark.torture
def test_dying_at_every_operation_of_many_recoveries_loses_nothing(
    zygote: Zygote, one_track: Case, tmp_path: Path, figures: list[str]
) -> None:
    """First one operation in 30; in the life after it every operation, in one of the ways to die there."""
    rng, ways = random.Random(6), []
    points = all_points(calm_life(zygote, one_track, tmp_path / "calm"))
    for first in [
        point for point in points if point[0] % RECOVERED_EVERY == 0 and point[1] is Mode.KILL_AFTER
    ]:
        again = recovery_points(zygote, one_track, tmp_path / f"first {first}", first)
        for k in sorted({k for k, _ in again}):
            ways.append([first, rng.choice([point for point in again if point[0] == k])])
    figures.append(
        survey(zygote, one_track, tmp_path, ways, f"every operation of 1 in {RECOVERED_EVERY} recoveries")
    )
