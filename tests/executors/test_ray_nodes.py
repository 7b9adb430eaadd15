"""What a worker asks of a node of a Ray cluster, and which versions a node must have; without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from executor_setup import ENGINES

from pipeline.app import App
from pipeline.config import Config
from pipeline.errors import MissingPackage
from pipeline.executors import process, ray_cluster
from pipeline.executors.process import THREADS
from pipeline.executors.ray_cluster import RayCluster
from pipeline.executors.ray_nodes import Facts, Resources, differences
from pipeline.executors.versions import versions
from pipeline.workspace import Workspace

LOCAL, NAMED = {"kind": "ray"}, {"kind": "ray", "address": "head:6379"}


@pytest.fixture
def cluster_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the cluster of a configuration on a machine of four cores."""
    monkeypatch.setattr(process, "n_cores", lambda: 4)
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)

    def make(executor: dict[str, Any], *, models: bool, **settings: Any) -> RayCluster:
        monkeypatch.setattr(App, "_uses_models", models)
        config = Config.model_validate({"executor": executor, **settings})
        return App(tmp_path, config, None, None, Workspace.of(tmp_path, config.folders)).ray_cluster(ENGINES)

    return make


def threads_of(cluster: RayCluster) -> set[str | None]:
    return {cluster.environment[name] for name in THREADS}


def test_a_worker_without_a_model_takes_one_core_and_one_with_a_model_all_or_a_gpu(cluster_of: Any) -> None:
    assert cluster_of(LOCAL, models=False).resources == Resources(1, 0)
    assert cluster_of(LOCAL, models=True).resources == Resources(4, 0)
    assert cluster_of(LOCAL, models=True, threads=2).resources == Resources(2, 0)
    assert cluster_of(LOCAL, models=True, device="cuda").resources == Resources(1, 1)
    given = {**LOCAL, "resources_per_worker": {"cpu": 3, "gpu": 0.5}}
    assert cluster_of(given, models=True, device="cuda").resources == Resources(3, 0.5)


def test_a_generator_on_a_gpu_leaves_the_cores_to_workers_beside_it(
    cluster_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(App, "_generates_on_gpu", True)
    cluster = cluster_of(NAMED, models=True, device="cuda")
    assert (cluster.resources, cluster.on_gpu, cluster.normalizes_ahead) == (Resources(0, 1), True, False)
    given = {**NAMED, "resources_per_worker": {"cpu": 2, "gpu": 1}}
    assert cluster_of(given, models=True, device="cuda").resources == Resources(2, 1)


def test_models_have_the_threads_of_a_worker_process_and_others_those_of_their_share(cluster_of: Any) -> None:
    assert threads_of(cluster_of(LOCAL, models=True)) == {None}
    assert threads_of(cluster_of(NAMED, models=True)) == {"4"}
    assert threads_of(cluster_of(NAMED, models=True, threads=2)) == {"2"}
    assert threads_of(cluster_of(LOCAL, models=False)) == {"1"}
    share = {**LOCAL, "resources_per_worker": {"cpu": 2.5}}
    assert threads_of(cluster_of(share, models=False)) == {"2"}


def test_a_node_has_room_for_as_many_workers_as_fit_by_every_resource() -> None:
    node = {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}
    assert Resources(1, 0).times_in(node) == 8
    assert Resources(3, 0).times_in(node) == 2
    assert Resources(1, 1).times_in(node) == 2
    assert Resources(0.1, 0).times_in({"CPU": 0.3}) == 3
    assert Resources(1, 1).times_in({"CPU": 8.0}) == 0


def test_other_versions_are_refused_with_what_to_install_where() -> None:
    ours = versions(["scipy"])
    assert set(ours) == {"Python", "instrumental-variations", "numpy", "scipy"}
    same = Facts("1", "10.0.0.4", (), dict(ours))
    other = Facts("2", "10.0.0.5", (), ours | {"numpy": "1.0", "Python": "3.10"})
    [sentence] = differences([same, other], ours)
    assert sentence == (
        f"node 10.0.0.5 has Python 3.10 instead of {ours['Python']}, numpy 1.0 instead of {ours['numpy']}:"
        f" install there the same Python and `pip install numpy=={ours['numpy']}`"
    )


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    cluster_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage) as caught:
        cluster_of(LOCAL, models=False).ready()
    assert str(caught.value) == 'executor: ray needs ray: pip install ".[ray]"'
