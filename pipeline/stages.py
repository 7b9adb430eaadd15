"""The stages as functions of values: no paths, no clock, no database.

normalize → embed → generate, of which the last two are the engines' own methods; `finish` checks and
levels every variation before it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.config import Normalize, Output
from pipeline.errors import BadAudio, EngineFailure
from pipeline.records import SILENT_BELOW_DBFS, Audio, Variation, VariationRequest

if TYPE_CHECKING:
    from pipeline.audio import Levels

NORMALIZE_VERSION = "3"  # raised when the same file would get other normalized samples or another record
OUTPUT_VERSION = "3"  # raised when the same variation would be written as different bytes


@dataclass(frozen=True, eq=False)
class Normalized:
    """A source as every engine receives it."""

    audio: Audio
    levels: Levels
    source_lufs: float  # loudness of the source file, without silence at its ends


def normalize(decoded: Audio, settings: Normalize) -> Normalized:
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
    levels = audio.levels(trimmed)
    gain_db = audio.gain_to(levels, target_lufs=settings.loudness_lufs, ceiling_dbtp=settings.true_peak_dbtp)
    return Normalized(audio.amplify(trimmed, gain_db), levels.amplified(gain_db), levels.loudness_lufs)


def finish(
    variation: Variation, request: VariationRequest, settings: Output, *, source_lufs: float
) -> tuple[Variation, float]:
    """Check a generator's result and give it its final form; returns it and its loudness in LUFS.

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
    shaped = audio.remove_offset(audio.resample(made, rate))
    shaped = audio.fade(shaped, in_s=settings.fade_in_s, out_s=settings.fade_out_s)
    leveled, loudness = _leveled(shaped, settings, source_lufs)
    if not np.isfinite(loudness):
        raise EngineFailure("the engine made sound that is too quiet to measure")
    return replace(variation, audio=leveled), loudness


def _leveled(shaped: Audio, settings: Output, source_lufs: float) -> tuple[Audio, float]:
    """The sound at the asked loudness, and its loudness in LUFS."""
    from pipeline import audio
    from pipeline.audio.limiter import limit_to_loudness

    target_lufs = source_lufs if settings.loudness_lufs == "source" else settings.loudness_lufs
    if settings.limiter:
        limited = limit_to_loudness(shaped, target_lufs=target_lufs, ceiling_dbtp=settings.true_peak_dbtp)
        return limited, audio.loudness_lufs(limited)
    levels = audio.levels(shaped)
    gain_db = audio.gain_to(levels, target_lufs=target_lufs, ceiling_dbtp=settings.true_peak_dbtp)
    return audio.amplify(shaped, gain_db), levels.amplified(gain_db).loudness_lufs
