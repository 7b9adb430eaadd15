"""The stages as functions of values: no paths, no clock, no database.

normalize → embed → generate, of which the last two are the engines' own methods; `finish` checks and
levels every variation before it is written.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import Normalize, Output
from pipeline.errors import BadAudio, EngineFailure
from pipeline.records import SILENT_BELOW_DBFS, Audio, Variation, VariationRequest

NORMALIZE_VERSION = "2"  # raised when the same file would be normalized to different samples
OUTPUT_VERSION = "3"  # raised when the same variation would be written as different bytes


def normalize(decoded: Audio, settings: Normalize) -> Audio:
    """Trim silence and set the loudness of audio decoded at `settings.sample_rate`.

    Raises:
        BadAudio: it is silent, or too short without its silence.
    """
    from pipeline import audio

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


def finish(variation: Variation, request: VariationRequest, settings: Output) -> tuple[Variation, float]:
    """Check a generator's result and set its loudness; returns both, the loudness as measured in LUFS.

    Raises:
        EngineFailure: it has the wrong length, samples that are not finite, or no sound.
    """
    import numpy as np

    from pipeline import audio

    made = variation.audio
    expected = round(request.duration_s * made.sample_rate)
    if made.n_samples != expected:
        raise EngineFailure(f"the engine made {made.n_samples} samples instead of {expected}")
    if not np.isfinite(made.samples).all():
        raise EngineFailure("the engine made samples that are not finite")
    if audio.peak_dbfs(made) < SILENT_BELOW_DBFS:
        raise EngineFailure("the engine made silence")
    rate = audio.nearest_rate(settings.format, settings.sample_rate or made.sample_rate)
    made = audio.resample(made, rate)
    leveled = audio.to_loudness(
        made, target_lufs=settings.loudness_lufs, ceiling_dbtp=settings.true_peak_dbtp
    )
    loudness = audio.loudness_lufs(leveled)
    if not np.isfinite(loudness):
        raise EngineFailure("the engine made sound that is too quiet to measure")
    return replace(variation, audio=leveled), loudness
