"""Two daemons and a run of cron at the same time: one works, the others end with 3."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import Zygote
from home_folder import Home
from invariants import Case, check_finished, check_redone

FILES = 6
LOCKED = 3
CHECK_EVERY_S = 0.05


@pytest.fixture(scope="module")
def case(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(zygote, tmp_path_factory.mktemp("case"), tracks=FILES)


def is_done(home: Home) -> bool:
    return len(list(home.outbox.glob("*/manifest.json"))) == FILES and not list(home.inbox.glob("*.wav"))


@pytest.mark.parametrize("verbs", [("once", "watch", "watch"), ("watch", "once", "watch")])
def test_of_three_started_at_once_one_works(
    zygote: Zygote, case: Case, tmp_path: Path, verbs: tuple[str, ...]
) -> None:
    home = case.home(tmp_path / "home")

    lives = [zygote.start(home, verb) for verb in verbs]
    while not is_done(home) and any(life.wait(CHECK_EVERY_S) is None for life in lives):
        pass
    for life, verb in zip(lives, verbs, strict=True):
        if verb == "watch" and life.wait(0) is None:  # the one that works; the others have given up
            life.signal(signal.SIGTERM)

    assert sorted(life.end() for life in lives) == [0, LOCKED, LOCKED]
    [worker] = [life for life in lives if life.code == 0]
    for life in lives:
        assert life is worker or f"another instance (process {worker.process})" in life.out
    check_finished(home, case.reference, lives)
    assert check_redone(home, case.reference, lives) == 0
