"""Values that flow between the stages: immutable, without paths, clocks or database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError

Samples = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Audio:
    """Sound in memory."""

    samples: Samples  # float32, (channels, samples), nominally in [-1, 1]; may be a read-only memory map
    sample_rate: int  # Hz

    @property
    def channels(self) -> int:
        return int(self.samples.shape[0])

    @property
    def n_samples(self) -> int:
        return int(self.samples.shape[1])

    @property
    def duration_s(self) -> float:
        return self.n_samples / self.sample_rate

    def mono(self) -> Samples:
        """The mean of the channels, float32, (samples,)."""
        if self.channels == 1:
            return np.asarray(self.samples[0])
        return np.asarray(self.samples.mean(axis=0, dtype=np.float32))


@dataclass(frozen=True)
class SourceInfo:
    """What the input file was before anything was done to it."""

    duration_s: float
    sample_rate: int  # Hz
    channels: int
    codec: str  # "flac", "mp3", "aac", "pcm_s24le", ...: for people, not for decisions
    notes: tuple[str, ...] = ()  # what was missing, damaged or unusual and accepted nevertheless


@dataclass(frozen=True, eq=False)
class VariationRequest:
    """One variation to make. The result is a function of this value and the engine's version alone."""

    request_id: str  # the unit of work's key: unique, stable between runs
    track_id: str  # SHA-256 of the source's bytes: requests that share it share their audio
    audio: Audio  # the normalized source
    duration_s: float  # what is delivered is round(duration_s * generator.sample_rate) samples
    seed: int  # 0 <= seed < 2**63
    params: Mapping[str, Any] = field(default_factory=dict)  # the engine's own, checked and complete


@dataclass(frozen=True, eq=False)
class Variation:
    """What a generator made of one request."""

    request_id: str
    audio: Audio
    details: Mapping[str, Any] = field(
        default_factory=dict
    )  # JSON values for the manifest: join scores, tempo, ...


@dataclass(frozen=True)
class Failure:
    """Why one request of a batch has no result; the others go on."""

    request_id: str
    error: PipelineError


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors of one track."""

    track: Samples  # float32, (d,), unit length
    windows: Samples  # float32, (n, d), unit length each
    times_s: Samples  # float32, (n, 2): start and end of each window in the normalized audio
