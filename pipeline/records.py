"""Values that pass between the stages: immutable, without paths, clocks or database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.music.beats import Beats

Samples: TypeAlias = "NDArray[np.float32]"
SILENT_BELOW_DBFS = -80.0  # a variation with a lower peak counts as silent
UNIT_LENGTH_TOLERANCE = 1e-4  # of an embedding vector
MAX_CANCELLED = (
    0.1  # share of a sound; six pieces of music have up to 0.002, antiphase stereo has 0.9 and more
)
CANCELLATION_RATE_HZ, CANCELLATION_BLOCK = 11025, 8192  # samples


class Stage(StrEnum):
    """The stages in their order; the values stand in the database."""

    NORMALIZE = "normalize"
    EMBED = "embed"
    GENERATE = "generate"
    EMBED_VARIATIONS = "embed-variations"


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

    @cached_property
    def mono_channels(self) -> Samples:
        """The channels whose mean is the mono signal.

        These are all channels, or the strongest alone where the mean would cancel more than MAX_CANCELLED
        of the sound: in antiphase stereo, or with instruments in antiphase.
        """
        if self.channels == 1:
            return self.samples
        cancelled, strongest = _cancellation(self.samples, self.sample_rate)
        return self.samples[strongest : strongest + 1] if cancelled > MAX_CANCELLED else self.samples

    def mono(self) -> Samples:
        """The mean of `mono_channels`, float32, (samples,)."""
        import numpy as np

        channels = self.mono_channels
        return np.asarray(channels[0] if len(channels) == 1 else channels.mean(axis=0, dtype=np.float32))


def cut(samples: Samples, start: int, stop: int) -> Samples:
    """Samples from `start` to `stop`, (channels, stop - start); zeros outside of the sound."""
    import numpy as np

    n = samples.shape[1]
    inside = samples[:, min(max(start, 0), n) : min(max(stop, 0), n)]
    if inside.shape[1] == stop - start:
        return inside
    before = min(max(-start, 0), stop - start)
    return np.pad(inside, ((0, 0), (before, stop - start - before - inside.shape[1])))


def _cancellation(samples: Samples, sample_rate: int) -> tuple[float, int]:
    """Share of the sound that the channels' mean cancels, 0 to 1, and the strongest channel.

    Measured in third octaves from 43 Hz to 5.5 kHz in blocks of 0.75 s. A band is weighted by the root of its
    power, and counts as cancelled if the mean has less than a tenth of the channels' average power. (The mean
    of uncorrelated channels has a half.)
    """
    import numpy as np

    step = max(1, sample_rate // CANCELLATION_RATE_HZ)  # a coarser rate is enough and quicker
    size = CANCELLATION_BLOCK * step
    edges = np.round(CANCELLATION_BLOCK / 256 * 2 ** (np.arange(21) / 3)).astype(int)  # bins
    levels, cancelled = np.zeros(len(samples)), 0.0
    for start in range(0, samples.shape[1], size):
        block = samples[:, start : start + size]
        block = np.pad(block, ((0, 0), (0, size - block.shape[1])))
        spectra = np.fft.rfft(block.reshape(len(block), -1, step).mean(axis=2))
        powers = np.add.reduceat(np.abs(spectra) ** 2, edges, axis=1)
        mean_power = np.add.reduceat(np.abs(spectra.mean(axis=0)) ** 2, edges)
        roots = np.sqrt(powers)
        levels += roots.sum(axis=1)
        cancelled += float(roots[:, mean_power < 0.1 * powers.mean(axis=0)].sum())
    return cancelled / max(float(levels.sum()), 1e-12), int(levels.argmax())


@dataclass(frozen=True)
class SourceInfo:
    """Properties of the input file, before any processing."""

    duration_s: float
    sample_rate: int  # Hz
    channels: int
    codec: str  # "flac", "mp3", "aac", "pcm_s24le", ...: for people, not for decisions
    notes: tuple[str, ...] = ()  # what was missing, damaged or unusual and accepted nevertheless


@dataclass(frozen=True)
class MadeBy:
    """The engine that made a result."""

    name: str
    version: str


@dataclass(frozen=True, eq=False)
class VariationRequest:
    """One variation to make. The result depends on this value and the engine's version alone."""

    request_id: str  # the unit of work's key: unique, stable between runs
    track_id: str  # SHA-256 of the source's bytes
    audio: Audio  # the normalized source, in the key and tempo that the variation asks for
    duration_s: float  # the result has round(duration_s * generator.sample_rate) samples
    seed: int  # 0 <= seed < 2**63
    params: Mapping[str, Any] = field(default_factory=dict)  # the engine's parameters, checked and complete
    prepared: Any = None  # what the engine's `prepare` has made of the above; None: it was not called


@dataclass(frozen=True, eq=False)
class Variation:
    """The result of one request."""

    request_id: str
    audio: Audio
    details: Mapping[str, Any] = field(default_factory=dict)  # JSON values for the manifest
    # Where it is made of the source's own passages: its beats, which are the source's, as is its key.
    own_beats: Beats | None = None


@dataclass(frozen=True)
class Failure:
    """Why one request of a batch has no result; the other requests go on."""

    request_id: str
    error: Exception


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors of one track."""

    track: Samples  # float32, (d,), unit length
    windows: Samples  # float32, (n, d), unit length each
    times_s: Samples  # float32, (n, 2): start and end of each window in the normalized audio
