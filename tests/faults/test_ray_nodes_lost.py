"""The program on a Ray cluster of several nodes: nodes that are lost or join, and owners that are killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from drive import AT_ONCE, Child, counts, log_of, start, wait_until
from home_folder import Home, contents
from invariants import check_database, check_no_leftovers
from ray_setup import NEEDS_RAY, add_node, ray_head
from test_workers import SITE, fill

from pipeline.workspace import DONE

pytestmark = [pytest.mark.long, NEEDS_RAY]  # true processes
TRACKS = [f"{n}.wav" for n in range(10)]  # so many that there is work left when a node has joined


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Its nodes know the engines of drive.py."""
    with ray_head(**SITE) as made:
        yield made


def configure(home: Home, executor: Any) -> None:
    home.configure(
        {"name": "one"},
        executor=executor,
        intake={"settle_s": 0},
        generate={"engine": "paced"},
        retry={"max_attempts": 3, "backoff_s": 0},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What becomes of the tracks in the program's own process."""
    home = Home(tmp_path_factory.mktemp("undisturbed"))
    configure(home, "inline")
    fill(home, TRACKS)
    assert home.in_child("once", env={**SITE, **AT_ONCE}).code == 0
    return contents(home.outbox)


def check_done(home: Home, undisturbed: dict[str, str]) -> None:
    """All tracks are done, once and whole, with the bytes of an undisturbed run."""
    assert counts(home) == {"queued": 0, "running": 0, "done": len(TRACKS), "failed": 0}
    assert contents(home.outbox) == undisturbed
    assert sorted(path.name for path in (home.inbox / DONE).iterdir()) == TRACKS
    store = home.store()
    for track in store.tracks():
        ends = [(attempt.stage, attempt.outcome) for attempt in store.attempts(track.sha256)]
        assert ends.count(("generate", "done")) == 1
        assert "failed" not in {outcome for _, outcome in ends}
    store.close()
    check_database(home)
    check_no_leftovers(home)


def generating(home: Home, since: float = 0.0) -> int:
    """How many tracks are in the generate stage now, and got there after a point of time."""
    if not counts(home):
        return 0
    store = home.store()
    found = [
        attempt for attempt in store.attempts() if attempt.stage == "generate" and attempt.started_at > since
    ]
    store.close()
    return len(found)


def wait_for_two(home: Home, child: Child, since: float = 0.0) -> None:
    wait_until(lambda: generating(home, since) == 2, "two nodes make variations", child=child)


def test_a_lost_node_loses_nothing_and_one_that_joins_is_used(
    cluster: Any, home: Home, undisturbed: dict[str, str]
) -> None:
    configure(home, {"kind": "ray", "address": cluster.address})
    fill(home, TRACKS)
    nodes = [add_node(cluster), add_node(cluster)]
    with start(home, "once", env=SITE) as child:
        wait_for_two(home, child)
        cluster.remove_node(nodes[0], allow_graceful=False)
        wait_until(lambda: generating(home) == 1, "its track is queued again", child=child)
        nodes[0] = add_node(cluster)
        wait_for_two(home, child)
        assert child.ended() == 0, child.text()
    for node in nodes:
        cluster.remove_node(node)
    assert "is lost; the tracks are queued again" in log_of(home)
    assert "Raylet is terminated" not in child.text()
    check_done(home, undisturbed)


def test_a_killed_owner_loses_nothing_and_the_next_one_goes_on(
    cluster: Any, home: Home, undisturbed: dict[str, str]
) -> None:
    configure(home, {"kind": "ray", "address": cluster.address})
    fill(home, TRACKS)
    nodes = [add_node(cluster), add_node(cluster)]
    with start(home, "once", env=SITE) as child:
        wait_for_two(home, child)
        child.send(signal.SIGKILL)
        child.process.wait()
    with start(home, "watch", env=SITE) as child:
        wait_for_two(home, child, since=time.time())
        child.send(signal.SIGTERM)
        assert child.ended() == 0, child.text()
    assert counts(home)["running"] == 0
    with start(home, "once", env={**SITE, **AT_ONCE}) as child:
        assert child.ended() == 0, child.text()
    for node in nodes:
        cluster.remove_node(node)
    check_done(home, undisturbed)


def test_a_cluster_that_is_not_there_is_said_so(home: Home) -> None:
    configure(home, {"kind": "ray", "address": "127.0.0.1:9"})
    fill(home, TRACKS[:1])
    ended = home.in_child("once", env=SITE)
    assert ended.code == 2
    assert "the Ray cluster (executor.address: 127.0.0.1:9) can't be used" in ended.err
    assert counts(home)["queued"] == 1
