"""The stages as functions of values: no paths, no clock, no database.

normalize → embed → generate, and the finish that every variation gets before it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import audio
from pipeline.config import Normalize, Output
from pipeline.engines.base import Embedder, StopFn
from pipeline.errors import BadAudio, EngineFailure
from pipeline.records import Audio, Embedding, Variation, VariationRequest

STAGES = ("normalize", "embed", "generate")  # their order
NORMALIZE_VERSION = "2"  # raised when the same bytes would be normalized to other samples
OUTPUT_VERSION = "2"  # raised when the same variation would be written as other bytes
SILENT_BELOW_DBFS = -80.0  # a variation whose peak is lower has nothing in it
UNIT_LENGTH_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Finished:
    """A variation ready to be written, with what was measured of it."""

    audio: Audio
    peak_dbfs: float
    loudness_lufs: float
    details: Mapping[str, Any]


def normalize(decoded: Audio, settings: Normalize) -> Audio:
    """Trim silence and set the loudness; `decoded` is already at `settings.sample_rate`.

    Raises:
        BadAudio: it is silent, or too short once its silence is gone.
    """
    trimmed = decoded
    if settings.trim_silence:
        trimmed = audio.trim_silence(decoded, threshold_dbfs=settings.trim_below_dbfs)
        if trimmed.duration_s < settings.min_duration_s:
            raise BadAudio(
                f"is {trimmed.duration_s:.2f} s long without its silence: at least"
                f" {settings.min_duration_s:g} s are needed"
            )
    return audio.to_loudness(
        trimmed, target_lufs=settings.loudness_lufs, ceiling_dbtp=settings.true_peak_dbtp
    )


def embed(normalized: Audio, embedder: Embedder, *, should_stop: StopFn) -> Embedding:
    """Embed a normalized track and check what came back.

    Raises:
        EngineFailure: the vectors are not finite, not of unit length or not of the engine's size.
    """
    result = embedder.embed(normalized, should_stop=should_stop)
    vectors = np.vstack([result.track[None], result.windows])
    if vectors.shape[1] != embedder.dim or len(result.times_s) != len(result.windows):
        raise EngineFailure(f"{embedder.name} returned vectors of the wrong size")
    if not np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=UNIT_LENGTH_TOLERANCE):
        raise EngineFailure(f"{embedder.name} returned vectors that are not of unit length")
    return result


def finish(variation: Variation, request: VariationRequest, settings: Output) -> Finished:
    """Check a generator's result and bring it to the asked loudness.

    Raises:
        EngineFailure: it is not what was asked for: length, NaN or infinity, silence.
    """
    made = variation.audio
    expected = round(request.duration_s * made.sample_rate)
    if made.n_samples != expected:
        raise EngineFailure(f"the engine made {made.n_samples} samples where {expected} were asked for")
    if not np.isfinite(made.samples).all():
        raise EngineFailure("the engine made samples that are not finite")
    if audio.peak_dbfs(made) < SILENT_BELOW_DBFS:
        raise EngineFailure("the engine made silence")
    leveled = audio.to_loudness(
        made, target_lufs=settings.loudness_lufs, ceiling_dbtp=settings.true_peak_dbtp
    )
    loudness = audio.loudness_lufs(leveled)
    if not np.isfinite(loudness):
        raise EngineFailure("the engine made something too quiet to measure")
    return Finished(leveled, audio.peak_dbfs(leveled), loudness, variation.details)
