"""Engines in worker processes: owners and workers that are killed, stops, and arrivals during the work."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from drive import BESIDE, IMPORTS, Child, counts, log_of, start, status, wait_until
from harness import ProgramRun
from home_folder import Home, contents, write_music
from invariants import check_database, check_no_leftovers

from pipeline.workspace import DONE

pytestmark = pytest.mark.long  # true processes
TRACKS = [f"{n}.wav" for n in range(6)]
SITE = {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "site"), str(Path(__file__).parent), IMPORTS])
}


def configure(home: Home, *, engine: str = "remix", workers: int = 2) -> None:
    home.configure(
        executor={"kind": "process", "workers": workers},
        intake={"settle_s": 0, "rescan_s": 0.5},
        generate={"engine": engine, **({} if engine == "remix" else {"variations": [{"name": "one"}]})},
        retry={"max_attempts": 3, "backoff_s": 0},
    )


def fill(home: Home, names: list[str] = TRACKS) -> None:
    for name in names:
        write_music(home.inbox / name, seed=int(name[0]), seconds=8.0)


def workers_of(owner: Child | ProgramRun) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == owner.pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def _stages(home: Home, name: str) -> list[str]:
    """The stages of a track that were begun."""
    if "queued" not in counts(home):
        return []
    store = home.store()
    try:
        found = [track for track in store.tracks() if track.name == name]
        return [attempt.stage for track in found for attempt in store.attempts(track.sha256)]
    finally:
        store.close()


def is_running(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What becomes of the tracks in the program's own process."""
    home = Home(tmp_path_factory.mktemp("undisturbed"))
    home.configure(generate={"engine": "remix"})
    fill(home)
    assert home.in_child("once").code == 0
    return contents(home.outbox)


def check_done(home: Home, undisturbed: dict[str, str]) -> None:
    """All tracks are done, once and whole, with the bytes of an undisturbed run."""
    assert counts(home) == {"queued": 0, "running": 0, "done": len(TRACKS), "failed": 0}
    assert contents(home.outbox) == undisturbed
    assert sorted(path.name for path in (home.inbox / DONE).iterdir()) == TRACKS
    check_database(home)
    check_no_leftovers(home)


def test_processes_give_the_same_bytes_as_the_program_alone(home: Home, undisturbed: dict[str, str]) -> None:
    configure(home)
    fill(home)
    with start(home, "once") as child:
        assert child.ended() == 0, child.text()
    check_done(home, undisturbed)


def kill_at_random(home: Home, rng: random.Random, env: dict[str, str] | None) -> str:
    """Start a run, and kill it or one of its workers after a while; returns which."""
    victim = rng.choice(["owner", "worker"])
    with start(home, "once", env=env) as child:
        wait_until(lambda: workers_of(child) or not child.is_alive(), "it works", child=child)
        time.sleep(rng.uniform(0, 2.5))
        workers = workers_of(child)
        if victim == "owner" or not workers:
            victim = "owner"
            child.send(signal.SIGKILL)
        else:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
            time.sleep(rng.uniform(0, 1))
            child.send(signal.SIGTERM)
        child.ended()
    wait_until(lambda: not any(map(is_running, workers)), "the workers have ended")
    return victim


def kill_until_done(
    home: Home,
    undisturbed: dict[str, str],
    *,
    kills: int,
    seed: int,
    workers: int = 2,
    env: dict[str, str] | None = None,
) -> str:
    configure(home, workers=workers)
    fill(home)
    rng, killed = random.Random(seed), Counter[str]()
    for _ in range(kills):
        killed[kill_at_random(home, rng, env)] += 1
        if not killed["worker"]:
            store = home.store()
            assert {track.attempts for track in store.tracks()} <= {0}
            store.close()
        if counts(home).get("done") == len(TRACKS):
            for name in TRACKS:
                assert home.in_child("requeue", name, "--stage", "generate").code == 0
    with start(home, "once", env=env) as child:
        assert child.ended() == 0, child.text()
    check_done(home, undisturbed)
    return f"processes: {dict(killed)} killed: 0 lost, 0 twice, 0 torn"


def test_killed_owners_cost_no_track_an_attempt(home: Home, undisturbed: dict[str, str]) -> None:
    configure(home)
    fill(home)
    for pause_s in (0.3, 1.0, 1.7, 2.4):
        with start(home, "once") as child:
            wait_until(lambda c=child: workers_of(c) or not c.is_alive(), "it works", child=child)
            time.sleep(pause_s)
            child.send(signal.SIGKILL)
            child.process.wait()
        store = home.store()
        assert {track.attempts for track in store.tracks()} <= {0}
        store.close()
    with start(home, "once") as child:
        assert child.ended() == 0, child.text()
    check_done(home, undisturbed)


def test_10_kills_of_owners_and_workers_lose_nothing(
    home: Home, undisturbed: dict[str, str], figures: list[str]
) -> None:
    figures.append(kill_until_done(home, undisturbed, kills=10, seed=5))


def test_kills_of_generators_and_of_workers_beside_them_lose_nothing(
    home: Home, undisturbed: dict[str, str], figures: list[str]
) -> None:
    env = {**SITE, **BESIDE}
    figures.append(kill_until_done(home, undisturbed, kills=10, seed=9, workers=1, env=env))
    store = home.store()
    made = [one for track in store.tracks() for one in store.attempts(track.sha256) if one.outcome == "done"]
    store.close()
    assert all(one.worker and " beside process " in one.worker for one in made)


@pytest.mark.torture
def test_60_kills_of_owners_and_workers_lose_nothing(
    home: Home, undisturbed: dict[str, str], figures: list[str]
) -> None:
    figures.append(kill_until_done(home, undisturbed, kills=60, seed=6))


def test_killed_workers_are_replaced_and_their_tracks_made(home: Home, undisturbed: dict[str, str]) -> None:
    configure(home)
    fill(home)
    with start(home, "once") as child:
        wait_until(lambda: counts(home).get("done", 0) > 0, "a track is done", child=child)
        for worker in workers_of(child):
            os.kill(worker, signal.SIGKILL)
        assert child.ended() == 0, child.text()
    assert "was ended by SIGKILL" in log_of(home)
    check_done(home, undisturbed)


def test_a_file_that_arrives_while_a_worker_is_busy_is_queued_and_normalized(home: Home) -> None:
    configure(home, engine="paced", workers=1)
    fill(home, ["0.wav"])
    with start(home, "watch", env={**SITE, "PACE_S": "1"}) as child:
        wait_until(lambda: _stages(home, "0.wav")[-1:] == ["generate"], "it generates", child=child)
        fill(home, ["1.wav"])
        wait_until(lambda: _stages(home, "1.wav") == ["normalize"], "the second is normalized", child=child)
        wait_until(lambda: counts(home)["queued"] == 1, "it waits for the engine", child=child)
        [busy, other] = status(home)["workers"]
        assert (busy["track"], busy["stage"], busy["engine"]) == ("0.wav", "generate", "paced")
        assert other["stage"] is None
        assert busy["where"] in [f"process {process}" for process in workers_of(child)]
        child.send(signal.SIGTERM)
        assert child.ended() == 0


def test_a_worker_that_ignores_a_stop_ends_with_the_owner(home: Home, tmp_path: Path) -> None:
    configure(home, engine="stuck", workers=1)
    fill(home, ["0.wav"])
    with start(home, "watch", env={**SITE, "STUCK_AT": str(tmp_path / "stuck")}) as child:
        wait_until((tmp_path / "stuck").exists, "it is stuck", child=child)
        [worker] = workers_of(child)
        child.send(signal.SIGTERM)
        assert child.ended() == 0
    wait_until(lambda: not is_running(worker), "the worker has ended")
    store = home.store()
    assert [(track.state, track.attempts) for track in store.tracks()] == [("queued", 0)]
    store.close()
