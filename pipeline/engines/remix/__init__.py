"""The weight-free generator: recomposes a track's own bars into a piece of the asked length.

Method, as in the Infinite Jukebox (Lamere 2012, after Jehan 2005) and in music retargeting (Wenner et al.
2013): find the beats and bars, measure how similar the contexts of every two beats are, search a path of
the asked length through the beats, and join its pieces on the beat. Each module names its method and
source. They build on `pipeline.music` and on each other in this order: `similarity`, `analysis`,
`lattice`, `path`, `render`, `generator`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from pipeline.engines.base import EngineCard, EngineSettings, Generator, Params

VERSION = "3"


class RemixParams(Params):
    """Parameters of one remix, beside its length and seed."""

    temperature: float = Field(
        default=0.8,
        ge=0.0,
        le=2.0,
        description="how far it strays from the original order; 0: only the joins the length needs",
    )
    crossfade_ms: float = Field(
        default=40.0,
        ge=5.0,
        le=500.0,
        description="length of the crossfade at a join, ending just before the beat or onset; "
        "at least 600 where the music has no beat",
    )
    min_segment_beats: int = Field(
        default=8,
        ge=1,
        le=64,
        description="least number of beats played between two joins (of half seconds where there is no beat)",
    )
    emphasis: Literal["balanced", "timbre", "harmony"] = Field(
        default="balanced", description="what matters most when two passages are compared for a join"
    )


# (similarity, temperature). From 0.9 to 0.7 more and more seeds start elsewhere than the track does, which a
# small change of the temperature decides; from there on there are more joins.
DIAL = ((1.0, 0.15), (0.9, 0.36), (0.7, 0.405), (0.6, 0.6), (0.0, 2.0))


def params_of_similarity(similarity: float) -> dict[str, Any]:
    """The parameters for a similarity to the source of 0 to 1: a temperature between the points of DIAL.

    At 1 it is the track's start with one late join, at 0.6 pieces from anywhere with few joins, and from 0.2
    on segments are shorter as well.
    """
    (above, low), (below, high) = next(pair for pair in pairwise(DIAL) if similarity >= pair[1][0])
    temperature = low + (high - low) * (above - similarity) / (above - below)
    return {"temperature": round(temperature, 3), "min_segment_beats": 8 if similarity > 0.2 else 4}


def _load(settings: EngineSettings) -> Generator:
    from pipeline.engines.remix.generator import RemixGenerator

    return RemixGenerator(settings.sample_rate)


ENGINE = EngineCard(
    name="remix",
    stage="generate",
    version=VERSION,
    summary="recomposes the track's own bars by self-similarity; no model, far faster than real time",
    params=RemixParams,
    load=_load,
    params_of_similarity=params_of_similarity,
    packages=("numpy", "scipy", "soxr"),
)
