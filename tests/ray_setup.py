"""A Ray cluster of several nodes on this machine."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

from pipeline.executors.ray_environment import LOCAL, QUIET

# Found, and not imported: it reads its environment when it is imported.
NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: requirements-ray.txt")
STORE_BYTES = 100 << 20


@contextmanager
def ray_head(**environment: str) -> Iterator[Any]:
    """A head without room for workers, in ray.cluster_utils.Cluster; its nodes inherit the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**QUIET, **LOCAL, **environment}.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        before = signal.getsignal(signal.SIGTERM)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES},
        )
        try:
            yield cluster
        finally:
            cluster.shutdown()
            signal.signal(signal.SIGTERM, before)


def add_node(cluster: Any, n_cpus: int = 1, store_bytes: int = STORE_BYTES, **options: Any) -> Any:
    return cluster.add_node(num_cpus=n_cpus, object_store_memory=store_bytes, **options)
