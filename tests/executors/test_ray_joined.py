"""A Ray cluster that is joined: its nodes, and what of this process stays as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worker_tasks
from executor_setup import cluster_at
from executor_setup import run as run_task
from home_folder import ROOT, Home, contents, run, write_music
from ray_setup import NEEDS_RAY, add_node, ray_head

from pipeline.app import App
from pipeline.errors import EngineUnusable
from pipeline.executors.ray import RayExecutor
from pipeline.executors.ray_nodes import Resources
from pipeline.executors.tasks import MadeTake

pytestmark = [pytest.mark.long, NEEDS_RAY]  # starts a cluster


@pytest.fixture(scope="module")
def several() -> Iterator[Any]:
    """A cluster to which nodes can be added."""
    with ray_head(PYTHONPATH=str(ROOT)) as made:
        yield made


def test_signal_handlers_stay_ours(several: Any) -> None:
    received = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in numbers}
    joined = cluster_at(several.address, Resources(1, 0))
    try:
        joined.connect()
        for number in numbers:
            os.kill(os.getpid(), number)
        assert received == list(numbers)
    finally:
        joined.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_files_are_sent_by_their_content_as_a_node_may_be_anywhere(several: Any, tmp_path: Path) -> None:
    (tmp_path / "song.txt").write_text("la")
    node = add_node(several, 1)
    joined = cluster_at(several.address, Resources(1, 0))
    try:
        [executor] = joined.ready()
        assert not executor.shares_disk
        [(copy, content)] = run_task(executor, worker_tasks.read, tmp_path / "song.txt")
        assert (copy.name, content) == ("song.txt", "la")
        assert copy != tmp_path / "song.txt"
        assert not copy.exists()
    finally:
        joined.close()
        several.remove_node(node)


def test_a_worker_has_a_gpu_of_its_own_and_others_normalize_beside_it(several: Any) -> None:
    node = add_node(several, 4, num_gpus=2)
    joined = cluster_at(several.address, Resources(1, 1), normalizes_ahead=True)
    try:
        executors, normalizers = joined.ready(), joined.normalizers()
        for executor in [*executors, *normalizers]:
            assert list(executor.run(worker_tasks.echo, 1, progress=print, should_stop=lambda: False)) == [1]
        assert sorted(executor.where for executor in executors) == [
            "node 127.0.0.1, GPU 0",
            "node 127.0.0.1, GPU 1",
        ]
        assert [executor.where for executor in normalizers] == ["node 127.0.0.1"] * 2
    finally:
        joined.close()
        several.remove_node(node)


def test_workers_beside_a_gpu_get_its_sounds_without_the_owner(
    several: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    isolated: None,
) -> None:
    """The same bytes as in the program itself, by nodes of which one has a GPU."""
    alone, home = Home(tmp_path / "alone"), Home(tmp_path / "home")
    for one in (alone, home):
        one.configure()
        for seed in range(3):
            write_music(one.inbox / f"{seed}.wav", seed=seed)
    assert run(capsys, monkeypatch, alone, "once").code == 0
    home.configure(device="cuda", executor={"kind": "ray", "address": several.address})
    monkeypatch.setattr(App, "_generates_on_gpu", True)
    received, get = [], RayExecutor._get

    def noted(self: RayExecutor, call: Any) -> Any:
        match found := get(self, call):
            case (_, (MadeTake(), sound), _):
                received.append(type(sound).__name__)
        return found

    monkeypatch.setattr(RayExecutor, "_get", noted)
    nodes = [add_node(several, 1, num_gpus=1), add_node(several, 2)]
    try:
        ended = run(capsys, monkeypatch, home, "once")
        assert ended.code == 0, ended.err
    finally:
        for node in nodes:
            several.remove_node(node)
    assert contents(home.outbox) == contents(alone.outbox)
    assert len(received) >= 6 and set(received) == {"ObjectRef"}  # more where takes are alike


def test_a_node_with_another_version_is_refused_before_it_works(several: Any, tmp_path: Path) -> None:
    package = tmp_path / "numpy-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    node = add_node(several, 3, env_vars={"PYTHONPATH": path})
    joined = cluster_at(several.address, Resources(3, 0))
    try:
        [executor] = joined.ready()
        with pytest.raises(EngineUnusable, match=r"has numpy 1\.0 instead of"):
            list(executor.run(worker_tasks.echo, 1, progress=print, should_stop=lambda: False))
        totals, facts = zip(*joined.nodes(), strict=True)
        assert sorted(map(str, totals)) == ["3 CPUs", "nothing for work"]
        [sentence] = joined.differences(facts)
        assert sentence.startswith("node 127.0.0.1 has numpy 1.0")
    finally:
        joined.close()
        several.remove_node(node)
