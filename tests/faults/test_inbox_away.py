"""The inbox itself disappears and returns while `watch` runs: nothing is lost, and work continues."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from drive import counts, is_idle, log_of, start, status, stop, wait_until
from home_folder import NEAR, Home
from writers import INTAKE, SETTLE_S, encoded

pytestmark = pytest.mark.long  # true processes


def put(home: Home, name: str, seed: int) -> Path:
    """Drop a whole file in by one rename."""
    made = home.folder / "made.tmp"
    made.write_bytes(encoded("wav", seed))
    return made.replace(home.inbox / name)


def is_degraded(home: Home) -> bool:
    return bool(status(home).get("degraded"))


def rows(home: Home) -> tuple[int, int]:
    """Tracks, and files by content: what must never get fewer."""
    store = home.store()
    tracks = store.tracks()
    files = sum(len(store.files_of(track.sha256)) for track in tracks)
    store.close()
    return len(tracks), files


def away_and_back(home: Home, way: str) -> None:
    """Take the inbox away, wait until the program reports it, and bring one back."""
    away = home.folder / "inbox away"
    before = rows(home)
    if way == "removed":
        shutil.rmtree(home.inbox)
    else:
        home.inbox.rename(away)
    if way == "replaced":
        home.inbox.mkdir()
    else:
        wait_until(lambda: is_degraded(home), "status shows that the inbox is away", tries=60)
        assert rows(home) == before
        if way == "removed":
            home.inbox.mkdir()
        else:
            away.rename(home.inbox)


@pytest.mark.parametrize(("way", "watch"), [
    ("moved away", "events"),
    pytest.param("replaced", "events", marks=pytest.mark.long),
    pytest.param("removed", "events", marks=pytest.mark.torture),
    pytest.param("moved away", "polling", marks=pytest.mark.torture),
    pytest.param("removed", "polling", marks=pytest.mark.torture),
    pytest.param("replaced", "polling", marks=pytest.mark.torture),
])  # fmt: skip
def test_work_continues_after_the_inbox_disappears_and_returns(home: Home, way: str, watch: str) -> None:
    rescan_s = 1.5 if way == "replaced" else 3600  # so that only the check of the folder itself can find it
    home.configure(NEAR, intake={**INTAKE, "watch": watch, "rescan_s": rescan_s})
    with start(home, "watch") as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        put(home, "before.wav", 1)
        wait_until(lambda: is_idle(home, done=1), "the first one is done", child=child)
        away_and_back(home, way)
        put(home, "after.wav", 2)
        wait_until(lambda: is_idle(home, done=2), "the second one is done", child=child)
        wait_until(lambda: not is_degraded(home), "status reports no condition", tries=60, child=child)
        put(home, "later.wav", 3)
        wait_until(lambda: is_idle(home, done=3), "the third one is done", child=child)
        assert stop(child) == 0
    assert rows(home) == (3, 3)
    assert counts(home)["failed"] == 0


@pytest.mark.long
def test_what_finishes_while_the_inbox_is_away_is_archived_when_it_is_back(home: Home) -> None:
    home.configure(
        {"name": "only"}, intake=INTAKE, embed={"engine": "free-vectors"}, generate={"engine": "paced"}
    )
    with start(home, "watch", engines=True) as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        path = put(home, "long.wav", 1)
        wait_until(lambda: "generate" in log_of(home).partition("long.wav: queued")[2], "it is generating")
        home.inbox.rename(home.folder / "away")
        wait_until(lambda: is_idle(home, done=1), "it is done without its inbox", child=child)
        (home.folder / "away").rename(home.inbox)
        wait_until(lambda: not path.exists(), "its source is archived", child=child)
        assert stop(child) == 0
    assert [p.name for p in (home.inbox / "done").iterdir()] == ["long.wav"]
    assert rows(home) == (1, 1)


@pytest.mark.torture
def test_the_inbox_is_away_for_a_minute_with_a_queue_behind_it(home: Home) -> None:
    """The queue is processed from the working copies meanwhile; the sources are archived afterwards."""
    home.configure(
        {"name": "only"},
        intake={"settle_s": SETTLE_S},
        embed={"engine": "free-vectors"},
        generate={"engine": "paced", "duration_s": 1},
    )
    with start(home, "watch", engines=True, env={"PACE_S": "0.02"}) as child:
        wait_until(lambda: counts(home), "the program is up", child=child)
        for i in range(40):
            put(home, f"{i}.wav", i)
        wait_until(lambda: sum(counts(home).values()) == 40, "all are taken in", child=child)
        home.inbox.rename(home.folder / "away")
        assert counts(home)["done"] < 40
        wait_until(lambda: is_degraded(home), "status shows that the inbox is away", tries=120)
        time.sleep(60)
        assert rows(home) == (40, 40)
        assert counts(home)["done"] == 40
        assert is_degraded(home)
        (home.folder / "away").rename(home.inbox)
        put(home, "after.wav", 1000)
        wait_until(lambda: is_idle(home, done=41), "all are done", child=child)
        wait_until(lambda: len(list((home.inbox / "done").iterdir())) == 41, "all are archived", child=child)
        wait_until(lambda: not is_degraded(home), "status reports no condition", tries=60, child=child)
        assert stop(child) == 0
    assert counts(home) == {"queued": 0, "running": 0, "done": 41, "failed": 0}
