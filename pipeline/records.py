"""Values that pass between the stages: immutable, without paths, clocks or database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Samples: TypeAlias = "NDArray[np.float32]"
SILENT_BELOW_DBFS = -80.0  # a variation with a lower peak counts as silent
UNIT_LENGTH_TOLERANCE = 1e-4  # of an embedding vector


class Stage(StrEnum):
    """The stages in their order; the values stand in the database."""

    NORMALIZE = "normalize"
    EMBED = "embed"
    GENERATE = "generate"


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
        import numpy as np

        if self.channels == 1:
            return np.asarray(self.samples[0])
        return np.asarray(self.samples.mean(axis=0, dtype=np.float32))


@dataclass(frozen=True)
class SourceInfo:
    """Properties of the input file, before any processing."""

    duration_s: float
    sample_rate: int  # Hz
    channels: int
    codec: str  # "flac", "mp3", "aac", "pcm_s24le", ...: shown to people, never decided on


@dataclass(frozen=True, eq=False)
class VariationRequest:
    """One variation to make. The result depends on this value and the engine's version alone."""

    request_id: str  # the unit of work's key: unique, stable between runs
    track_id: str  # SHA-256 of the source's bytes: requests that share it share their audio
    audio: Audio  # the normalized source
    duration_s: float  # the result has round(duration_s * generator.sample_rate) samples
    seed: int  # 0 <= seed < 2**63
    params: Mapping[str, Any] = field(default_factory=dict)  # the engine's parameters, checked and complete


@dataclass(frozen=True, eq=False)
class Variation:
    """The result of one request."""

    request_id: str
    audio: Audio
    details: Mapping[str, Any] = field(default_factory=dict)  # JSON values for the manifest


@dataclass(frozen=True, eq=False)
class Finished:
    """A variation ready to be written, with its measured levels."""

    audio: Audio
    peak_dbfs: float
    loudness_lufs: float
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """Why one request of a batch has no result; the other requests go on."""

    request_id: str
    error: PipelineError


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors of one track."""

    track: Samples  # float32, (d,), unit length
    windows: Samples  # float32, (n, d), unit length each
    times_s: Samples  # float32, (n, 2): start and end of each window in the normalized audio
