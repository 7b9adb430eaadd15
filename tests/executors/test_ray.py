"""Tasks in actors on Ray: what comes back, and what a stop and the loss of an actor, node or owner do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worker_tasks
from executor_setup import ENGINES, cluster_at, run, with_threads
from home_folder import ROOT, Home
from ray_setup import NEEDS_RAY

from pipeline.errors import EngineUnusable, Stopped
from pipeline.executors import ray_cluster
from pipeline.executors.base import WorkerAway, WorkerLost
from pipeline.executors.process import THREADS
from pipeline.executors.ray import RayExecutor
from pipeline.executors.ray_cluster import RayCluster, thread_variables
from pipeline.executors.ray_environment import AUTO
from pipeline.executors.ray_nodes import Resources

SECRET = "a key of the owner's"
pytestmark = [pytest.mark.long, NEEDS_RAY]  # starts clusters


@pytest.fixture(scope="module")
def local() -> Iterator[RayCluster]:
    """A cluster of this machine alone, in which several actors have room on any machine."""
    made = cluster_at(AUTO, Resources(cpu=0.25, gpu=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        made.connect()
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    yield made
    made.close()


@pytest.fixture
def executor(local: RayCluster) -> RayExecutor:
    return local.ready()[0]


# -- tasks -----------------------------------------------------------------------------------------


def test_the_processes_of_a_local_cluster_do_not_get_the_keys_of_buckets(executor: RayExecutor) -> None:
    [environment] = run(executor, worker_tasks.variables)
    assert "PATH" in environment
    assert SECRET not in environment.values()


def test_arrays_are_sent_by_value(executor: RayExecutor, tmp_path: Path) -> None:
    np.save(tmp_path / "sound.npy", np.arange(12, dtype=np.float32).reshape(2, 6))
    whole = np.load(tmp_path / "sound.npy", mmap_mode="r")
    [(values, file), (part, none)] = run(executor, worker_tasks.describe, whole, whole[:, 2:5])
    assert (values, file) == (whole.tolist(), None)
    assert (part, none) == ([[2, 3, 4], [8, 9, 10]], None)


def test_one_actor_runs_all_tasks_and_keeps_its_engines(executor: RayExecutor) -> None:
    [first], [second] = run(executor, worker_tasks.process_id), run(executor, worker_tasks.process_id)
    assert first == second != os.getpid()
    engine = run(executor, worker_tasks.embedder_of)
    executor.use(ENGINES, idle_s=60)
    assert run(executor, worker_tasks.embedder_of) == engine
    assert engine[0][0] == "descriptors"
    assert executor.where == "node 127.0.0.1"


def test_a_node_is_checked_again_for_changed_engines(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise EngineUnusable("another torch")

    assert run(executor, worker_tasks.echo, 1) == [1]
    with monkeypatch.context() as patch:
        patch.setattr(executor, "check", refuse)
        assert run(executor, worker_tasks.echo, 2) == [2]
        executor.use(with_threads(2), idle_s=60)
        assert executor.loaded == []
        with pytest.raises(EngineUnusable, match="another torch"):
            run(executor, worker_tasks.echo, 3)
    assert run(executor, worker_tasks.echo, 4) == [4]


def test_an_idle_actor_ends_and_the_next_task_starts_another(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    [before] = run(executor, worker_tasks.process_id)
    now = executor.clock()
    monkeypatch.setattr(executor, "clock", lambda: now + 59)
    executor.release_if_idle()
    assert run(executor, worker_tasks.process_id) == [before]
    monkeypatch.setattr(executor, "clock", lambda: now + 120)
    executor.release_if_idle()
    assert executor.facts is None
    assert run(executor, worker_tasks.process_id) != [before]


def test_a_death_is_reported_and_the_next_task_has_a_new_actor(executor: RayExecutor) -> None:
    [before] = run(executor, worker_tasks.process_id)
    results = executor.run(
        worker_tasks.die, signal.SIGKILL, progress=lambda *_: None, should_stop=lambda: False
    )
    assert next(results) == "begun"
    with pytest.raises(WorkerLost, match="has died: "):
        next(results)
    assert run(executor, worker_tasks.process_id) != [before]


# -- actors ----------------------------------------------------------------------------------------


def test_several_actors_share_no_cache_of_compiled_code_and_have_their_threads(local: RayCluster) -> None:
    first, second, third = local.ready()[:3]
    for name in THREADS:
        expected = os.environ.get(name, "1")
        assert run(second, worker_tasks.variable, name) == [expected]
    [n_threads] = run(second, worker_tasks.blas_threads)  # numpy's among them, which Ray itself has loaded
    assert set(n_threads) == {int(os.environ.get("OPENBLAS_NUM_THREADS", "1"))}
    assert run(second, worker_tasks.variable, "HOME") == [os.environ["HOME"]]
    another = cluster_at(AUTO, Resources(cpu=0.25, gpu=0))  # of another owner
    another._thread = local._thread
    [fourth, *_] = another.ready()
    caches = [run(one, worker_tasks.variable, "NUMBA_CACHE_DIR")[0] for one in (first, second, third, fourth)]
    assert len(set(caches)) == 4
    fourth.close()
    first.environment = thread_variables(None)
    first.close()
    with pytest.raises(KeyError):  # not what Ray has set: the library's own number, as in other processes
        run(first, worker_tasks.variable, "NUMBA_NUM_THREADS")


def test_without_a_free_place_no_track_is_to_blame(local: RayCluster) -> None:
    assert all(run(one, worker_tasks.process_id) for one in local.ready())
    one_more = RayExecutor(ENGINES, 60, Resources(0.25, 0), {}, lambda _: None, place_patience_s=0.5)
    with pytest.raises(WorkerAway, match=r"no free 0\.25 CPUs"):
        run(one_more, worker_tasks.process_id)
    with pytest.raises(Stopped):
        run(one_more, worker_tasks.process_id, stop=True)


def test_what_a_killed_owner_has_left_is_removed_at_the_next_start(tmp_path: Path, monkeypatch: Any) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, mine, other = (tmp_path / f"ray-of-{process}-x" for process in (ended.pid, os.getpid(), "nobody"))
    for folder in (left, mine, other):
        folder.mkdir()
    monkeypatch.setattr(ray_cluster, "TMP", tmp_path)
    ray_cluster._remove_folders_of_killed_owners()
    assert sorted(tmp_path.iterdir()) == sorted([mine, other])


def test_no_socket_listens_beyond_this_machine(local: RayCluster) -> None:
    run(local.ready()[0], worker_tasks.process_id)
    listening = listening_addresses(processes_below(os.getpid()))
    assert len(listening) > 3
    assert set(listening) == {"127.0.0.1"}


def test_a_node_without_what_a_worker_needs_is_an_error_that_says_so(local: RayCluster) -> None:
    greedy = cluster_at(AUTO, Resources(cpu=1000, gpu=1))
    greedy._thread = local._thread
    with pytest.raises(EngineUnusable, match="no node of the cluster has the 1000 CPUs and 1 GPU that a"):
        greedy.ready()


def processes_below(process: int) -> set[int]:
    """A process and all that it has started, and they."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening_addresses(processes: set[int]) -> list[str]:
    """The address on which each of the processes' sockets listens."""
    sockets = set()
    for process in processes:
        with suppress(OSError):
            for link in Path(f"/proc/{process}/fd").iterdir():
                with suppress(OSError):
                    sockets.add(str(link.readlink()))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found.append(_address(local.partition(":")[0]))
    return found


def _address(digits: str) -> str:
    """An address of /proc/net/tcp: IPv4, also mapped into IPv6, as people write it."""
    is_mapped = digits.startswith("0000000000000000FFFF0000")
    if len(digits) > 8 and not is_mapped:
        return digits
    return ".".join(str(byte) for byte in reversed(bytes.fromhex(digits[-8:])))


def test_another_package_may_import_ray_before_it_is_used(home: Home) -> None:
    home.configure(executor={"kind": "ray"})
    program = """
import sys
from pathlib import Path
from pipeline.app import App
app = App.open(Path(sys.argv[1]), Path(sys.argv[2]))
import ray
cluster = app.ray_cluster(app.engine_choices)
cluster.connect()
cluster.close()
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, home.folder, home.folder / "settings.yaml"],
        env={name: text for name, text in os.environ.items() if not name.startswith("RAY_")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
