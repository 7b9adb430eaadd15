"""The harness itself: the fault injector counts all operations of the program, and hits the intended one."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import KILLED, Fault, ForkServer, Kind, Mode, Operation, new_home
from invariants import Case


@pytest.fixture
def undisturbed(fork_server: ForkServer, tmp_path: Path) -> list[Operation]:
    return fork_server.run(new_home(tmp_path / "home", tracks=1), "once").trace


@pytest.mark.parametrize(
    ("call", "ending"),
    [
        ("pwrite", "pipeline.db-wal"),  # SQLite's commits
        ("fdatasync", "pipeline.db-wal"),
        ("write", "/normalized.part"),
        ("write", ".wav.part"),
        ("fsync", ".wav.part"),
        ("fsync", "/variations"),  # the folder, after the rename
        ("rename", ".wav.part"),
        ("rename", ".manifest.json.part"),
        ("create", ".wav.part"),
        ("mkdir", "/variations"),
        ("unlink", "/source"),
        ("rmdir", ""),
    ],
)
def test_every_kind_of_operation_is_seen(undisturbed: list[Operation], call: str, ending: str) -> None:
    assert [op for op in undisturbed if op.n and op.call == call and op.path.endswith(ending)]


def test_operations_are_numbered_from_1_without_gaps(undisturbed: list[Operation]) -> None:
    assert sorted(op.n for op in undisturbed if op.n) == list(range(1, len(undisturbed) + 1))


@pytest.mark.parametrize(("mode", "happened"), [(Mode.KILL_BEFORE, False), (Mode.KILL_AFTER, True)])
def test_a_kill_comes_right_before_or_after_its_operation(
    fork_server: ForkServer, tmp_path: Path, undisturbed: list[Operation], mode: Mode, happened: bool
) -> None:
    made = next(op for op in undisturbed if op.call == "create" and op.path.endswith("/state/lock"))
    home = new_home(tmp_path / "home-2", tracks=1)
    run = fork_server.run(home, "once", fault=Fault(mode, made.n))
    assert run.code == KILLED
    assert [op.n for op in run.trace] == list(range(1, made.n + 1))
    assert (home.folder / "state" / "lock").exists() is happened


def test_a_torn_write_leaves_half(
    fork_server: ForkServer, tmp_path: Path, undisturbed: list[Operation]
) -> None:
    wav = next(op for op in undisturbed if op.call == "write" and op.path.endswith(".wav.part"))
    home = new_home(tmp_path / "torn", tracks=1)
    run = fork_server.run(home, "once", fault=Fault(Mode.KILL_TORN, wav.n))
    assert (run.code, run.trace[-1].outcome, run.trace[-1].call) == (KILLED, "killed torn", "write")
    torn, whole = Path(run.trace[-1].path).stat().st_size, 2 * 22050 * 2 * 3
    assert 0.4 * whole < torn < 0.6 * whole


def test_a_full_disk_refuses_what_grows_and_nothing_else(fork_server: ForkServer, tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", tracks=1)
    run = fork_server.run(home, "once", fault=Fault.full_disk(1, sticky=True))
    refused = {op.call for op in run.trace if op.outcome == "failed"}
    assert "create" in refused
    assert refused.isdisjoint({"unlink", "rmdir"})


def test_only_the_one_operation_fails(fork_server: ForkServer, tmp_path: Path) -> None:
    home = new_home(tmp_path / "home", tracks=1)
    run = fork_server.run(home, "once", fault=Fault.broken_disk(40, sticky=False))
    assert [op.n for op in run.trace if op.outcome == "failed"] == [40]


def test_reads_are_counted_where_they_can_fail(
    fork_server: ForkServer, tmp_path: Path, one_track: Case
) -> None:
    run = fork_server.run(
        one_track.home(tmp_path / "home"), "once", fault=Fault(kinds=Kind.CHANGE | Kind.READ)
    )
    seen = {op.call for op in run.trace}
    assert {"read", "pread", "open", "opendir"} <= seen
