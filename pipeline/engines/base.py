"""The three protocols of engines, and the card by which an engine is found.

To add an engine, add one module (or package) to `pipeline/engines/`. It defines `ENGINE`, an
`EngineCard`, whose `load` returns an object with the methods of `Generator`, `Embedder` or `Rater`. The card
is read by all commands, so importing the module must be fast: heavy packages (torch, scipy)
are imported inside functions.

A generator takes a list of requests, of one track or of many, because the variations of a batch
can share one pass over the weights of a model. A result must depend on its own request alone: not
on the other requests in the list, and not on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from pipeline.errors import Stopped
from pipeline.records import Audio, Embedding, Failure, Samples, Variation, VariationRequest
from pipeline.weights.layout import TRANSFORMERS, Layout

UNFINISHED = "unfinished"  # folder of an engine's files that `gc` removes when they are old

StopFn = Callable[[], bool]  # true once the work should end; asked at least once a step
# Takes the progress of one request: its id, and how many steps of how many are done, whatever a step is.
ProgressFn = Callable[[str, int, int], None]


def check_stop(should_stop: StopFn) -> None:
    """Raise Stopped if the work should end."""
    if should_stop():
        raise Stopped("asked to stop")


class Generator(Protocol):
    """Makes variations."""

    name: str
    version: str
    sample_rate: int  # of the variations, Hz

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        """Yield one result per request, in the order in which they are finished.

        Raises:
            Stopped: soon after `should_stop` returned true; results yielded before stay valid.
        """
        ...


class Embedder(Protocol):
    """Makes vectors."""

    name: str
    version: str
    dim: int  # of the vectors

    def embed(self, audio: Audio, *, should_stop: StopFn) -> Embedding:
        """Embed one normalized track.

        Raises:
            Stopped: soon after `should_stop` returned true.
        """
        ...


@runtime_checkable
class TextEmbedder(Embedder, Protocol):
    """An embedder whose vectors of sound and of texts can be compared."""

    def embed_texts(self, texts: Sequence[str]) -> Samples:
        """Vectors of texts, (texts, dim), float32, unit length."""
        ...


class Rater(Protocol):
    """Rates sound as listeners would."""

    name: str
    version: str

    def rate(self, audio: Audio, *, should_stop: StopFn) -> Mapping[str, float]:
        """Ratings of one sound by the names of their axes, 1 (worst) to 10 each.

        Raises:
            Stopped: soon after `should_stop` returned true.
        """
        ...


Engine = Generator | Embedder | Rater
StageName = Literal["embed", "generate", "judge"]  # a section of the configuration with an engine


class Params(BaseModel):
    """Base of an engine's parameters of one variation. Every field has a range and a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class EngineSection(Params):
    """Base of an engine's own section of the configuration, such as `generate.<engine>`.

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
    state_dir: Path | None = None  # for files that save an engine work; None: it writes none
    bucket_dir: Path | None = None  # in a bucket, for unfinished work where there is no `state_dir`
    sections: Mapping[str, EngineSection] = field(default_factory=dict)  # engines' own, by name


class Upkeep(Protocol):
    """What an engine can do for the commands without being loaded, beside its card."""

    def last_start(self, state_dir: Path) -> str | None:
        """What the last start found out, in one line for `doctor`; None if there was no start."""
        ...

    def check_params(self, params: Mapping[str, Any]) -> None:
        """Check that this machine has what the parameters of a variation need.

        Raises:
            MissingPackage, MissingWeights: it does not.
        """
        ...


@dataclass(frozen=True)
class EngineCard:
    """Facts about an engine that are known without loading it."""

    name: str
    stage: StageName
    version: str  # to be raised whenever the same request would give other bits
    summary: str  # one line for `doctor` and the README
    params: type[Params]
    load: Callable[[EngineSettings], Engine]
    packages: tuple[str, ...] = ()  # importable names it needs
    install: str = "pip install -r requirements-core.txt"  # the command that brings them
    default_model: str | None = None  # a hub id; None: no weights needed
    layout: Layout = TRANSFORMERS  # the format of its models' folders
    companions: tuple[str, ...] = ()  # more hub models that it may load, in transformers' format
    license_of: Callable[[str | None], str] = lambda model: "the source's own"  # of the results
    # The parameters by which a result is so similar to its source, 0 to 1: a generator's part of the dial
    # `similarity`. None: it has none.
    params_of_similarity: Callable[[float], dict[str, Any]] | None = None
    # Does the work on requests that needs no loaded engine, in workers beside a generator on a GPU, and
    # returns what is to stand in `prepared`, by request. None: there is no such work.
    prepare: Callable[[Sequence[VariationRequest], StopFn], Mapping[str, Any]] | None = None
    section: type[EngineSection] | None = None  # its own section of the configuration
    upkeep: Upkeep | None = None
    rank: int = 0  # `auto` takes the usable engine of the highest rank, and none below 0

    def is_meant_by(self, engine: str) -> bool:
        """Whether the configuration's `engine`, a name or "auto", can mean this one."""
        return engine == self.name or (engine == "auto" and self.rank >= 0)
