"""The weight-free generator: recomposes a track's own bars into a piece of the asked length.

Method, as in the Infinite Jukebox (Lamere 2012, after Jehan 2005) and in music retargeting (Wenner et al.
2013): find the beats and bars, measure how similar the contexts of every two beats are, search a path of
the asked length through the beats, and join its pieces on the beat. Each module names its method and
source. They build on `pipeline.music` and on each other in this order: `similarity`, `analysis`,
`lattice`, `path`, `render`, `generator`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pipeline.engines.base import EngineCard, EngineSettings, Generator, Params

VERSION = "2"


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


def params_of_similarity(similarity: float) -> dict[str, Any]:
    """The parameters for a similarity to the source of 0 to 1.

    From 1 to 0.8 the temperature rises from 0.15, which gives the track's start with one late join, to 0.6:
    pieces from anywhere, with few joins. From there to 0 it rises to 2, with ever shorter segments.
    """
    close = 0.15 + 2.25 * (1.0 - similarity)
    temperature = close if similarity > 0.8 else 0.6 + 1.75 * (0.8 - similarity)
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
