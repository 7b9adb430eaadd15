"""The limiter reaches the loudness under the ceiling, and changes nothing but the level around peaks."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.audio import loudness_lufs, to_loudness, true_peak_dbtp
from pipeline.audio.limiter import limit_to_loudness
from pipeline.records import Audio

RATE = 44100


def drums_over_a_chord(seconds: float = 4.0) -> Audio:
    """Noise bursts 12 dB above a quiet chord, twice a second: one gain leaves it at about -19 LUFS."""
    t = np.arange(round(seconds * RATE)) / RATE
    chord = 0.05 * sum(np.sin(2 * np.pi * hz * t) for hz in (220.0, 277.2, 329.6))
    noise = np.random.default_rng(3).standard_normal((2, t.size))
    return Audio((chord + 0.2 * noise * np.exp(-(t % 0.5) / 0.02)).astype(np.float32), RATE)


def test_it_reaches_the_loudness_under_the_ceiling_where_a_gain_does_not() -> None:
    sound = drums_over_a_chord()
    assert loudness_lufs(to_loudness(sound)) < -16
    limited = limit_to_loudness(sound, target_lufs=-14.0, ceiling_dbtp=-1.0)
    assert loudness_lufs(limited) == pytest.approx(-14.0, abs=0.1)
    assert true_peak_dbtp(limited) <= -1.0


def test_sound_that_has_the_loudness_already_is_limited_too() -> None:
    sound = drums_over_a_chord()
    limited = limit_to_loudness(sound, target_lufs=loudness_lufs(sound) + 0.05, ceiling_dbtp=-12.0)
    assert true_peak_dbtp(limited) <= -12.0


def test_peaks_between_the_samples_are_limited_too() -> None:
    """A sine at a quarter of the rate, 45 degrees off, peaks 3 dB above its samples (BS.1770-4, Annex 2)."""
    wave = np.sin(0.5 * np.pi * np.arange(2 * RATE) + 0.25 * np.pi, dtype=np.float32)[None]
    limited = limit_to_loudness(Audio(0.1 * wave, RATE), target_lufs=0.0, ceiling_dbtp=-1.0)
    assert -1.3 <= true_peak_dbtp(limited) <= -1.0


def test_sound_with_headroom_gets_the_gain_alone() -> None:
    wave = 0.01 * np.sin(np.arange(2 * RATE, dtype=np.float32) / 20)[None]
    plain = to_loudness(Audio(wave, RATE), target_lufs=-20.0)
    limited = limit_to_loudness(Audio(wave, RATE), target_lufs=-20.0, ceiling_dbtp=-1.0)
    assert np.max(np.abs(limited.samples / plain.samples.max() - plain.samples / plain.samples.max())) < 1e-5


def test_both_channels_get_the_same_smooth_gain() -> None:
    sound = drums_over_a_chord()
    limited = limit_to_loudness(sound, target_lufs=-14.0, ceiling_dbtp=-1.0)
    clear = np.min(np.abs(sound.samples), axis=0) > 0.02
    gains = limited.samples[:, clear] / sound.samples[:, clear]
    assert np.max(np.abs(gains[0] / gains[1] - 1)) < 1e-4
    steps = np.abs(np.diff(20 * np.log10(gains[0]))) / np.diff(np.flatnonzero(clear))
    assert np.max(steps) < 0.1  # dB a sample


def test_the_gain_of_a_loop_runs_from_its_end_into_its_start() -> None:
    sound = drums_over_a_chord(2.0)  # a burst at the start, none at the end
    limited = limit_to_loudness(sound, target_lufs=-14.0, ceiling_dbtp=-1.0, is_loop=True)
    gains = limited.samples[0, [-1, 0]] / sound.samples[0, [-1, 0]]
    assert gains[0] == pytest.approx(gains[1], rel=0.02)
    plain = limit_to_loudness(sound, target_lufs=-14.0, ceiling_dbtp=-1.0)
    assert plain.samples[0, -1] / sound.samples[0, -1] > 1.1 * gains[0]
