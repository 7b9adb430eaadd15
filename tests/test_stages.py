"""What `finish` makes of a generator's result under each setting of `output`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline import audio, stages
from pipeline.config import Output
from pipeline.records import Audio, Variation, VariationRequest

RATE, DURATION_S = 22050, 4.0


def music(seconds: float) -> Audio:
    """A chord that swells once a second, stereo."""
    t = np.arange(round(seconds * RATE)) / RATE
    chord = sum(np.sin(2 * np.pi * hz * t + phase) for phase, hz in enumerate((220.0, 277.2, 329.6)))
    return Audio(np.float32([0.05 * chord * (1.5 + np.sin(2 * np.pi * t))] * 2), RATE)


def finished(made: Audio, source_lufs: float = -20.0, **output: Any) -> tuple[Variation, float]:
    request = VariationRequest("r", "t", made, made.duration_s, 1)
    settings = Output.model_validate(output)
    return stages.finish(Variation("r", made), request, settings, source_lufs=source_lufs)


def test_the_default_is_one_gain_to_the_loudness_and_nothing_else() -> None:
    made = music(DURATION_S)
    variation, loudness = finished(made)
    gain = variation.audio.samples.max() / made.samples.max()
    assert np.allclose(variation.audio.samples, gain * made.samples, atol=1e-6)
    assert loudness == pytest.approx(-14.0, abs=0.01)
    assert audio.loudness_lufs(variation.audio) == pytest.approx(loudness, abs=0.01)


def test_the_loudness_can_be_that_of_the_source() -> None:
    variation, loudness = finished(music(DURATION_S), source_lufs=-23.5, loudness_lufs="source")
    assert loudness == pytest.approx(-23.5, abs=0.01)
    assert audio.loudness_lufs(variation.audio) == pytest.approx(-23.5, abs=0.01)


def test_the_source_s_loudness_is_that_of_the_file_before_any_gain() -> None:
    quiet = Audio(0.1 * music(DURATION_S).samples, RATE)
    settings = stages.Normalize.model_validate({"sample_rate": RATE})
    normalized = stages.normalize(quiet, settings)
    assert normalized.source_lufs == pytest.approx(audio.loudness_lufs(quiet), abs=0.01)
    assert normalized.levels.loudness_lufs == pytest.approx(audio.loudness_lufs(normalized.audio), abs=0.01)
    assert normalized.levels.true_peak_dbtp == pytest.approx(audio.true_peak_dbtp(normalized.audio), abs=0.01)


@pytest.mark.parametrize(
    ("output", "rate"),
    [({}, RATE), ({"sample_rate": 48000}, 48000), ({"format": "opus"}, 24000), ({"format": "mp3"}, RATE)],
)
def test_the_sample_rate_is_the_asked_one_or_one_that_the_format_has(output: Any, rate: int) -> None:
    made = finished(music(DURATION_S), **output)[0].audio
    assert (made.sample_rate, made.n_samples) == (rate, DURATION_S * rate)


def test_an_offset_is_removed_and_the_ends_are_faded() -> None:
    shifted = Audio(music(DURATION_S).samples + np.float32(0.01), RATE)
    made = finished(shifted, fade_in_s=0.5, fade_out_s=1.0)[0].audio
    assert np.max(np.abs(made.samples[:, [0, -1]])) < 1e-5
    assert abs(float(made.samples[:, RATE:-RATE].mean())) < 2e-3
