"""ENOSPC and EIO at the k-th file operation, once or from then on; a disk that fills while `watch` works.

A full disk refuses what needs space: new names, files that grow. Overwriting in place and removing
still work, as on ext4. A broken disk refuses everything, reads included.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import PATIENCE_S, Fault, Kind, Life, Zygote
from home_folder import Home
from invariants import Case, check_finished, check_nothing_false, states, tracks

CHECK_EVERY_S = 0.1
BAD_USAGE = 2
VISIBLE = {0, 1, 4}  # all done (the fault hit nothing that matters), failed with a message, the disk
TRIES = 3  # clean runs until all is done

MakeFault = Callable[[int, bool], Fault]
FAULTS: dict[int, MakeFault] = {
    errno.ENOSPC: lambda k, sticky: Fault.full_disk(k, sticky=sticky),
    errno.EIO: lambda k, sticky: Fault.broken_disk(k, sticky=sticky),
}
KINDS = {errno.ENOSPC: Kind.SPACE, errno.EIO: Kind.CHANGE | Kind.READ}


@pytest.fixture(scope="module")
def case(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One track; three attempts, as by default."""
    return Case.of(
        zygote, tmp_path_factory.mktemp("disk"), tracks=1, retry={"max_attempts": 3, "backoff_s": 0}
    )


@dataclass(frozen=True)
class Found:
    """The outcome of one fault."""

    code: int
    hit: bool
    failed: bool  # the track ended as failed, visibly, and was tried again by `retry`
    wrong: str | None


def suffer(zygote: Zygote, case: Case, folder: Path, number: int, *, k: int, sticky: bool) -> Found:
    """One life with the fault, then clean ones until all is done."""
    home, fault = case.home(folder), FAULTS[number](k, sticky)
    life, wrong, failed = zygote.run(home, "once", fault=fault), None, False
    lives = [life]
    try:
        assert life.code in VISIBLE or unreadable_settings(life), f"exit code {life.code}\n{life.out}"
        check_nothing_false(home, case.reference)
        failed = "failed" in states(home).values()
        if number == errno.ENOSPC:
            assert not failed, f"a full disk failed a track:\n{life.out}"
            assert not any(n for _, n in tracks(home).values()), (
                f"a full disk used up an attempt:\n{life.out}"
            )
        if failed:
            assert life.code == 1, "a failed track, but no exit code for it"
        lives += recovered(zygote, home, failed=failed)
        check_finished(home, case.reference, lives)
    except AssertionError as e:
        fault_at = next((op for op in life.trace if op.outcome == "failed"), None)
        wrong = f"{errno.errorcode[number]} at {k}{' on' if sticky else ''}: {str(e)[-900:]}\n  at {fault_at}"
    else:
        shutil.rmtree(folder)
    return Found(life.code or 0, life.fault_hit, failed, wrong)


def unreadable_settings(life: Life) -> bool:
    """The disk failed before there was a configuration: bad usage, nothing was touched."""
    failed = [op.path for op in life.trace if op.outcome == "failed"]
    return life.code == BAD_USAGE and failed[0].endswith("settings.yaml")


def recovered(zygote: Zygote, home: Home, *, failed: bool) -> Iterable[Life]:
    if failed:
        yield zygote.run(home, "retry")
    last = zygote.run(home, "once")
    assert last.code == 0, f"the clean run ended with {last.code}:\n{last.out}"
    yield last


def n_operations(zygote: Zygote, case: Case, folder: Path, number: int) -> int:
    life = zygote.run(case.home(folder), "once", fault=Fault(kinds=KINDS[number]))
    return max(op.n for op in life.trace)


def survey(zygote: Zygote, case: Case, tmp_path: Path, number: int, points: list[tuple[int, bool]]) -> str:
    found = [
        suffer(zygote, case, tmp_path / f"{k}-{sticky}", number, k=k, sticky=sticky) for k, sticky in points
    ]
    wrong = [one.wrong for one in found if one.wrong]
    assert not wrong, f"{len(wrong)} of {len(points)}:\n" + "\n".join(wrong[:20])
    codes = ", ".join(f"{n} × {code}" for code, n in sorted(Counter(one.code for one in found).items()))
    return (
        f"{errno.errorcode[number]}: {len(points)} faults ({sum(one.hit for one in found)} hit), exit codes"
        f" {codes}; {sum(one.failed for one in found)} visibly failed and done after `retry`; no false done"
    )


@pytest.mark.long
@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
def test_a_disk_error_at_some_operations_loses_nothing(
    zygote: Zygote, case: Case, tmp_path: Path, figures: list[str], number: int
) -> None:
    n, rng = n_operations(zygote, case, tmp_path / "calm", number), random.Random(number)
    points = [(k, sticky) for sticky in (False, True) for k in sorted(rng.sample(range(1, n + 1), 4))]
    figures.append(survey(zygote, case, tmp_path, number, points))


@pytest.mark.torture
@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
def test_a_disk_error_at_every_operation_loses_nothing(
    zygote: Zygote, case: Case, tmp_path: Path, figures: list[str], number: int
) -> None:
    n = n_operations(zygote, case, tmp_path / "calm", number)
    points = [(k, sticky) for sticky in (False, True) for k in range(1, n + 2)]  # n + 1: a clean run
    figures.append(survey(zygote, case, tmp_path, number, points))


# -- the daemon ----------------------------------------------------------------------------------------


def degraded(zygote: Zygote, home: Home) -> bool:
    life = zygote.run(home, "status", "--json")
    assert life.code == 0, life.out
    return bool(json.loads(life.out).get("degraded"))


@pytest.mark.parametrize("ending", [
    "/source",
    ".wav",
    pytest.param(".npy", marks=pytest.mark.long),
    pytest.param(".npz", marks=pytest.mark.long),
    pytest.param("manifest.json", marks=pytest.mark.long),
])  # fmt: skip
def test_watch_waits_while_the_disk_is_full_and_continues_by_itself(
    zygote: Zygote, three_tracks: Case, tmp_path: Path, ending: str
) -> None:
    """The disk becomes full about when such a file is made, and has space again when `full` is removed."""
    home, full = three_tracks.home(tmp_path / "home"), tmp_path / "full"
    at = operation_of(zygote, three_tracks, tmp_path / "calm", ending)
    full.touch()
    life = zygote.start(home, "watch", fault=Fault.full_disk(at, sticky=True, gate=full))

    wait_for(life, lambda: life.fault_hit, "the disk never was full")
    wait_for(life, lambda: "no space left on device" in life.out, "the log does not report the full disk")
    assert "failed" not in states(home).values()
    full.unlink()
    wait_for(life, lambda: is_done(home, 3), "it does not continue")
    wait_for(life, lambda: not degraded(zygote, home), "status still reports a full disk")
    life.signal(signal.SIGTERM)

    assert life.end() == 0, life.out
    assert all(attempts == 0 for _, attempts in tracks(home).values())
    check_finished(home, three_tracks.reference, [life])


@pytest.fixture(scope="module")
def three_tracks(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Case:
    sections = {"intake": {"settle_s": 0, "poll_s": 0.1, "rescan_s": 0.5}, "retry": {"max_attempts": 1}}
    return Case.of(zygote, tmp_path_factory.mktemp("three"), tracks=3, **sections)


def operation_of(zygote: Zygote, case: Case, folder: Path, ending: str) -> int:
    """Which operation of a calm life renames the second such file into place, or makes it."""
    life = zygote.run(case.home(folder), "once", fault=Fault(kinds=Kind.SPACE))
    n = [op.n for op in life.trace if op.n and (op.target or op.path).endswith(ending)]
    return n[len(n) // 2]


def is_done(home: Home, n: int) -> bool:
    return len(list(home.outbox.glob("*/manifest.json"))) == n and not list(home.inbox.glob("*.wav"))


def wait_for(life: Life, condition: Callable[[], bool], otherwise: str) -> None:
    for _ in range(round(PATIENCE_S / 12 / CHECK_EVERY_S)):
        if condition():
            return
        if life.wait(CHECK_EVERY_S) is not None:
            raise AssertionError(f"it ended with {life.code}: {otherwise}\n{life.out}")
    life.signal(signal.SIGKILL)
    life.end()
    raise AssertionError(f"{otherwise}\n{life.out}")
