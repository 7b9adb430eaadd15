"""Executors for tests, and what they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.engines import cards
from pipeline.engines.base import EngineSettings
from pipeline.engines.loading import EngineChoices
from pipeline.engines.selection import Choice
from pipeline.executors.base import Executor, Task
from pipeline.executors.ray_cluster import RayCluster, thread_variables
from pipeline.executors.ray_nodes import Resources

ENGINES = (
    (Choice(cards()["descriptors"], None, None, "test"), EngineSettings()),
    (Choice(cards()["remix"], None, None, "test"), EngineSettings()),
    None,
)


def with_threads(threads: int) -> EngineChoices:
    """The same engines with other settings."""
    (embedder, settings), generator, rater = ENGINES
    return (embedder, replace(settings, threads=threads)), generator, rater


def cluster_at(address: str, resources: Resources, **more: Any) -> RayCluster:
    return RayCluster(address, None, resources, thread_variables(1), ENGINES, idle_s=60, **more)


def run(executor: Executor, task: Task, *args: Any, stop: bool = False) -> list[Any]:
    """All results of a task."""
    return list(executor.run(task, *args, progress=lambda *_: None, should_stop=lambda: stop))
