"""Two daemons and a run of cron at the same time: one works, the others end with 3."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import ForkServer
from home_folder import Home
from invariants import Case, check_finished, check_redone

pytestmark = pytest.mark.long  # true processes

FILES = 6
LOCKED = 3
CHECK_EVERY_S = 0.05


@pytest.fixture(scope="module")
def case(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(fork_server, tmp_path_factory.mktemp("case"), tracks=FILES)


def is_done(home: Home) -> bool:
    return len(list(home.outbox.glob("*/manifest.json"))) == FILES and not list(home.inbox.glob("*.wav"))


@pytest.mark.parametrize("verbs", [("once", "watch", "watch"), ("watch", "once", "watch")])
def test_of_three_started_at_once_one_works(
    fork_server: ForkServer, case: Case, tmp_path: Path, verbs: tuple[str, ...]
) -> None:
    home = case.home(tmp_path / "home")

    runs = [fork_server.start(home, verb) for verb in verbs]
    while not is_done(home) and any(run.wait(CHECK_EVERY_S) is None for run in runs):
        pass
    for run, verb in zip(runs, verbs, strict=True):
        if verb == "watch" and run.wait(0) is None:  # the one that works; the others have given up
            run.signal(signal.SIGTERM)

    assert sorted(run.end() for run in runs) == [0, LOCKED, LOCKED]
    [worker] = [run for run in runs if run.code == 0]
    for run in runs:
        assert run is worker or f"another instance (process {worker.pid})" in run.out
    check_finished(home, case.reference, runs)
    assert check_redone(home, case.reference, runs) == 0
