"""The nodes of a Ray cluster: what a worker asks of one, and what is installed there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engines.loading import EngineChoices
from pipeline.errors import EngineUnusable
from pipeline.executors.versions import PROGRAM, PYTHON, versions


@dataclass(frozen=True)
class Resources:
    """What one worker takes of a node, or what a node has in all."""

    cpu: float
    gpu: float

    def __str__(self) -> str:
        parts = [f"{n:g} {name}{'s' * (n != 1)}" for n, name in ((self.cpu, "CPU"), (self.gpu, "GPU")) if n]
        return " and ".join(parts) or "nothing for work"

    def times_in(self, total: Mapping[str, float]) -> int:
        """How many workers a node with these resources of Ray has room for."""
        asked = {"CPU": self.cpu, "GPU": self.gpu}
        return min(int(total.get(name, 0.0) / n + 1e-9) for name, n in asked.items() if n)


@dataclass(frozen=True)
class Facts:
    """A process on a node: where it runs, and with which versions."""

    node_id: str  # Ray's
    address: str
    gpus: tuple[str, ...]  # that the process has for itself
    versions: Mapping[str, str]

    @property
    def where(self) -> str:
        return ", ".join([f"node {self.address}", *(f"GPU {gpu}" for gpu in self.gpus)])


def living_nodes() -> list[dict[str, Any]]:
    """The nodes that are there now, as Ray describes them.

    Raises:
        EngineUnusable: the cluster does not answer.
    """
    import ray

    try:
        return [node for node in ray.nodes() if node["Alive"]]
    except Exception as e:
        raise EngineUnusable(f"the Ray cluster does not answer: {' '.join(str(e).split())}") from e


def packages_of(engines: EngineChoices) -> list[str]:
    """The packages that the engines need."""
    return sorted({name for wanted in engines if wanted for name in wanted[0].card.packages})


def facts_of_this_process(packages: Iterable[str]) -> Facts:
    """Called in processes of Ray. `packages`: of the engines."""
    import ray

    context = ray.get_runtime_context()
    gpus = tuple(context.get_accelerator_ids().get("GPU", ()))
    return Facts(context.get_node_id(), ray.util.get_node_ip_address(), gpus, versions(packages))


def differences(facts: Sequence[Facts], ours: Mapping[str, str]) -> Iterator[str]:
    """For each node with other versions than the owner's, a sentence that says what to install there."""
    for one in facts:
        other = {name: have for name, have in one.versions.items() if have != ours[name]}
        if not other:
            continue
        what = ", ".join(f"{name} {have} instead of {ours[name]}" for name, have in other.items())
        pins = [f"{name}=={ours[name]}" for name in other if name not in (PYTHON, PROGRAM)]
        todo = [f"the same {name}" for name in (PYTHON, PROGRAM) if name in other]
        todo += [f"`pip install {' '.join(pins)}`"] if pins else []
        yield f"node {one.address} has {what}: install there {' and '.join(todo)}"
