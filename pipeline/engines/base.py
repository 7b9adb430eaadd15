"""The two protocols every engine follows, and the card by which it is found.

A generator takes a list of requests, of one track or of many, because the variations of a batch
can share one pass over a model's weights. A result depends on its own request alone: never on
what else is in the list, and never on the order.

An engine is one module (or package) of `pipeline/engines/` with a module-level `ENGINE`, an
`EngineCard`. Its module must be cheap to import: heavy packages (torch, scipy) are
imported inside functions, so that `status` and `plan` answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from pipeline.errors import Stopped
from pipeline.records import Audio, Embedding, Failure, Variation, VariationRequest
from pipeline.weights.layout import TRANSFORMERS, Layout

UNFINISHED = "unfinished"  # folder of an engine's files that `gc` removes when they are old

StopFn = Callable[[], bool]  # true once the work should end; asked at least once a step


def check_stop(should_stop: StopFn, engine: str) -> None:
    """Raise Stopped if the work should end."""
    if should_stop():
        raise Stopped(f"{engine} was asked to stop.")


class ProgressFn(Protocol):
    """Told how far one request is: `done` of `total` steps of whatever the engine counts."""

    def __call__(self, request_id: str, done: int, total: int) -> None: ...


class Generator(Protocol):
    """Makes variations."""

    name: str
    version: str
    sample_rate: int  # Hz, of what it delivers

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        """Yield one result per request, as they finish, in any order.

        Raises:
            Stopped: soon after `should_stop` turned true; what was yielded before stays valid.
        """
        ...


class Embedder(Protocol):
    """Makes vectors."""

    name: str
    version: str
    dim: int

    def embed(self, audio: Audio, *, should_stop: StopFn) -> Embedding:
        """Embed one normalized track.

        Raises:
            Stopped: soon after `should_stop` turned true.
        """
        ...


class Params(BaseModel):
    """Base of an engine's per-variation parameters: closed, immutable, with ranges and defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class NoParams(Params):
    """For engines that take none."""


class EngineSection(Params):
    """Base of an engine's own section of the configuration, `generate.<engine>` or `embed.<engine>`.

    Every field has a default and a description.
    """

    model_config = ConfigDict(strict=True)


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is loaded with; everything that can differ per variation is in its Params."""

    sample_rate: int = 44100  # Hz: rate of the normalized audio, for engines that keep it
    model: str | None = None  # hub id or local folder, None for engines without weights
    revision: str | None = None  # hub commit, tag or branch; None: the default branch
    device: str = "cpu"  # "cpu", "cuda", "cuda:1"
    threads: int | None = None  # None: all cores
    cache_dir: Path | None = None  # the hub's cache; None: the library's own default
    state_dir: Path | None = None  # for files that save an engine work; None: it writes none
    sections: Mapping[str, EngineSection] = field(default_factory=dict)  # engines' own, by name


class Upkeep(Protocol):
    """What an engine may tell the commands without being loaded, beside its card."""

    def last_start(self, state_dir: Path) -> str | None:
        """What the last start found out, in one line for `doctor`; None if there was no start."""
        ...

    def check_params(self, params: Mapping[str, Any], settings: EngineSettings) -> None:
        """Check that this machine has what the parameters of a variation need.

        Raises:
            MissingPackage, MissingWeights: it does not.
        """
        ...


@dataclass(frozen=True)
class EngineCard:
    """What is known of an engine without loading it."""

    name: str
    stage: Literal["generate", "embed"]
    version: str  # raised whenever the same request would give other bits
    summary: str  # one line for `doctor` and the README
    params: type[Params]
    load: Callable[[EngineSettings], Generator] | Callable[[EngineSettings], Embedder]
    packages: tuple[str, ...] = ()  # importable names it needs
    install: str = "pip install -r requirements-core.txt"  # the command that brings them
    default_model: str | None = None  # a hub id; None: no weights needed
    layout: Layout = TRANSFORMERS  # the format of its models' folders
    companions: tuple[tuple[str, Layout], ...] = ()  # hub models it loads besides, if a request needs them
    license_of: Callable[[str | None], str] = lambda model: "the source's own"  # of what it makes
    section: type[EngineSection] | None = None  # its own section of the configuration
    upkeep: Upkeep | None = None
    rank: int = 0  # `auto` takes the usable engine of the highest rank; below 0: never

    def is_meant_by(self, engine: str) -> bool:
        """Whether the configuration's `engine`, a name or "auto", can mean this one."""
        return engine == self.name or (engine == "auto" and self.rank >= 0)
