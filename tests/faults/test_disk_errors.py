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
from harness import TIMEOUT_S, Fault, ForkServer, Kind, ProgramRun
from home_folder import Home
from invariants import Case, check_finished, check_nothing_false, states, tracks

CHECK_EVERY_S = 0.1
BAD_USAGE = 2
EXIT_CODES = {0, 1, 4}  # all done (the fault had no effect), a failed track, an environment error

MakeFault = Callable[[int, bool], Fault]
FAULTS: dict[int, MakeFault] = {
    errno.ENOSPC: lambda k, sticky: Fault.full_disk(k, sticky=sticky),
    errno.EIO: lambda k, sticky: Fault.broken_disk(k, sticky=sticky),
}
KINDS = {errno.ENOSPC: Kind.SPACE, errno.EIO: Kind.CHANGE | Kind.READ}


@pytest.fixture(scope="module")
def case(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One track; three attempts, as by default."""
    return Case.of(
        fork_server, tmp_path_factory.mktemp("disk"), tracks=1, retry={"max_attempts": 3, "backoff_s": 0}
    )


@dataclass(frozen=True)
class Found:
    """The outcome of one fault."""

    code: int
    hit: bool
    failed: bool  # the track ended as failed, visibly, and was tried again by `retry`
    wrong: str | None


def run_with_fault(
    fork_server: ForkServer, case: Case, folder: Path, number: int, *, k: int, sticky: bool
) -> Found:
    """One run with the fault, then clean ones until all is done."""
    home, fault = case.home(folder), FAULTS[number](k, sticky)
    run, wrong, failed = fork_server.run(home, "once", fault=fault), None, False
    runs = [run]
    try:
        assert run.code in EXIT_CODES or unreadable_settings(run), f"exit code {run.code}\n{run.out}"
        check_nothing_false(home, case.reference)
        failed = "failed" in states(home).values()
        if number == errno.ENOSPC:
            assert not failed, f"a full disk failed a track:\n{run.out}"
            assert not any(n for _, n in tracks(home).values()), f"a full disk used up an attempt:\n{run.out}"
        if failed:
            assert run.code == 1, "a failed track, but no exit code for it"
        runs += recovered(fork_server, home, failed=failed)
        check_finished(home, case.reference, runs)
    except AssertionError as e:
        fault_at = next((op for op in run.trace if op.outcome == "failed"), None)
        wrong = f"{errno.errorcode[number]} at {k}{' on' if sticky else ''}: {str(e)[-900:]}\n  at {fault_at}"
    else:
        shutil.rmtree(folder)
    return Found(run.code or 0, run.fault_hit, failed, wrong)


def unreadable_settings(run: ProgramRun) -> bool:
    """The disk failed while the configuration was read: that is bad usage, and nothing was changed."""
    failed = [op.path for op in run.trace if op.outcome == "failed"]
    return run.code == BAD_USAGE and failed[0].endswith("settings.yaml")


def recovered(fork_server: ForkServer, home: Home, *, failed: bool) -> Iterable[ProgramRun]:
    if failed:
        yield fork_server.run(home, "retry")
    last = fork_server.run(home, "once")
    assert last.code == 0, f"the clean run ended with {last.code}:\n{last.out}"
    yield last


def n_operations(fork_server: ForkServer, case: Case, folder: Path, number: int) -> int:
    run = fork_server.run(case.home(folder), "once", fault=Fault(kinds=KINDS[number]))
    return max(op.n for op in run.trace)


def survey(
    fork_server: ForkServer, case: Case, tmp_path: Path, number: int, points: list[tuple[int, bool]]
) -> str:
    found = [
        run_with_fault(fork_server, case, tmp_path / f"{k}-{sticky}", number, k=k, sticky=sticky)
        for k, sticky in points
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
    fork_server: ForkServer, case: Case, tmp_path: Path, figures: list[str], number: int
) -> None:
    n, rng = n_operations(fork_server, case, tmp_path / "undisturbed", number), random.Random(number)
    points = [(k, sticky) for sticky in (False, True) for k in sorted(rng.sample(range(1, n + 1), 4))]
    figures.append(survey(fork_server, case, tmp_path, number, points))


@pytest.mark.torture
@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
def test_a_disk_error_at_every_operation_loses_nothing(
    fork_server: ForkServer, case: Case, tmp_path: Path, figures: list[str], number: int
) -> None:
    n = n_operations(fork_server, case, tmp_path / "undisturbed", number)
    points = [(k, sticky) for sticky in (False, True) for k in range(1, n + 2)]  # n + 1: a clean run
    figures.append(survey(fork_server, case, tmp_path, number, points))


# -- the daemon ----------------------------------------------------------------------------------------


def degraded(fork_server: ForkServer, home: Home) -> bool:
    run = fork_server.run(home, "status", "--json")
    assert run.code == 0, run.out
    return bool(json.loads(run.out).get("degraded"))


@pytest.mark.parametrize("ending", [
    "/source",
    ".wav",
    pytest.param(".npy", marks=pytest.mark.long),
    pytest.param(".npz", marks=pytest.mark.long),
    pytest.param("manifest.json", marks=pytest.mark.long),
])  # fmt: skip
def test_watch_waits_while_the_disk_is_full_and_continues_by_itself(
    fork_server: ForkServer, three_tracks: Case, tmp_path: Path, ending: str
) -> None:
    """The disk becomes full when such a file is made, and has space again once the file `full` is removed."""
    home, full = three_tracks.home(tmp_path / "home"), tmp_path / "full"
    at = operation_of(fork_server, three_tracks, tmp_path / "undisturbed", ending)
    full.touch()
    run = fork_server.start(home, "watch", fault=Fault.full_disk(at, sticky=True, gate=full))

    wait_for(run, lambda: run.fault_hit, "the disk never was full")
    wait_for(run, lambda: "no space left on device" in run.out, "the log does not report the full disk")
    assert "failed" not in states(home).values()
    full.unlink()
    wait_for(run, lambda: is_done(home, 3), "it does not continue")
    wait_for(run, lambda: not degraded(fork_server, home), "status still reports a full disk")
    run.signal(signal.SIGTERM)

    assert run.end() == 0, run.out
    assert all(attempts == 0 for _, attempts in tracks(home).values())
    check_finished(home, three_tracks.reference, [run])


@pytest.fixture(scope="module")
def three_tracks(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Case:
    sections = {"intake": {"settle_s": 0, "poll_s": 0.1, "rescan_s": 0.5}, "retry": {"max_attempts": 1}}
    return Case.of(fork_server, tmp_path_factory.mktemp("three"), tracks=3, **sections)


def operation_of(fork_server: ForkServer, case: Case, folder: Path, ending: str) -> int:
    """The number of the operation that makes such a file, or renames it into place, in an undisturbed run."""
    run = fork_server.run(case.home(folder), "once", fault=Fault(kinds=Kind.SPACE))
    n = [op.n for op in run.trace if op.n and (op.target or op.path).endswith(ending)]
    return n[len(n) // 2]


def is_done(home: Home, n: int) -> bool:
    return len(list(home.outbox.glob("*/manifest.json"))) == n and not list(home.inbox.glob("*.wav"))


def wait_for(run: ProgramRun, condition: Callable[[], bool], otherwise: str) -> None:
    for _ in range(round(TIMEOUT_S / 12 / CHECK_EVERY_S)):
        if condition():
            return
        if run.wait(CHECK_EVERY_S) is not None:
            raise AssertionError(f"it ended with {run.code}: {otherwise}\n{run.out}")
    run.signal(signal.SIGKILL)
    run.end()
    raise AssertionError(f"{otherwise}\n{run.out}")
