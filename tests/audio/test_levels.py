"""Resampling keeps length and level; trimming cuts silence, offsets and fades change nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.audio import fade, remove_offset, resample, trim_silence
from pipeline.errors import BadAudio
from pipeline.records import Audio


def tone(rate: int, seconds: float) -> Audio:
    t = np.arange(round(rate * seconds)) / rate
    return Audio(np.stack([0.5 * np.sin(2 * np.pi * 440 * t)] * 2).astype(np.float32), rate)


@pytest.mark.parametrize(
    ("before", "after"), [(44100, 32000), (44100, 48000), (8000, 44100), (192000, 32000)]
)
def test_resampling_keeps_length_level_and_pitch(before: int, after: int) -> None:
    audio, expected = resample(tone(before, 2.0), after), tone(after, 2.0)
    assert audio.samples.shape == expected.samples.shape
    assert audio.samples.dtype == np.float32
    inner = slice(after // 10, -after // 10)  # away from the ends, where the filter sees nothing
    assert np.max(np.abs(audio.samples[:, inner] - expected.samples[:, inner])) < 1e-5


def test_resampling_to_the_same_rate_returns_the_same_audio() -> None:
    audio = tone(44100, 1.0)
    assert resample(audio, 44100) is audio


def test_silence_is_cut_at_both_ends_but_for_the_margin() -> None:
    sound = tone(44100, 1.0).samples
    hush = (1e-4 * np.random.default_rng(8).standard_normal((2, 44100))).astype(np.float32)  # -80 dBFS
    hush[0, 5000] = 0.005  # a lone click
    audio = trim_silence(Audio(np.concatenate([hush, sound, hush], axis=1), 44100), keep_s=0.05)
    keep = 2205
    assert np.array_equal(audio.samples, np.concatenate([hush[:, -keep:], sound, hush[:, :keep]], axis=1))


def test_a_pause_inside_and_a_sound_in_one_channel_stay() -> None:
    samples = np.zeros((2, 44100 * 14), dtype=np.float32)
    samples[0, 44100:46000] = 0.1
    samples[1, 44100 * 13 : 44100 * 13 + 2000] = 0.1  # more than 10 s later, in the other channel
    audio = trim_silence(Audio(samples, 44100), keep_s=0.0)
    assert audio.duration_s == pytest.approx(12.0 + 2000 / 44100, abs=0.021)


def test_sound_to_both_ends_is_left_as_it_is() -> None:
    audio = tone(44100, 1.005)
    assert np.array_equal(trim_silence(audio).samples, audio.samples)


@pytest.mark.parametrize("level", [0.0, 1e-4])
def test_silence_throughout_is_an_error(level: float) -> None:
    hush = (level * np.random.default_rng(9).standard_normal((1, 44100))).astype(np.float32)
    with pytest.raises(BadAudio, match="is silent: nothing in it is above -60 dBFS"):
        trim_silence(Audio(hush, 44100))


def test_a_constant_offset_is_removed_and_sound_without_one_is_left_as_it_is() -> None:
    sound = tone(44100, 1.0)
    assert remove_offset(sound) is sound
    shifted = sound.samples.copy()
    shifted[1] += 0.02
    assert np.max(np.abs(remove_offset(Audio(shifted, 44100)).samples - sound.samples)) < 1e-6


def test_fades_reach_their_length_pass_half_amplitude_in_the_middle_and_spare_the_rest() -> None:
    sound = Audio(np.ones((2, 40_000), np.float32), 10_000)
    faded = fade(sound, in_s=1.0, out_s=2.0).samples[1]
    assert faded[0] < 1e-6 and faded[-1] < 1e-6
    assert faded[[5_000, 30_000]] == pytest.approx(0.5, abs=1e-3)
    assert np.all(faded[10_000:20_000] == 1.0)
    assert np.all(np.diff(faded[:10_000]) >= 0) and np.all(np.diff(faded[20_000:]) <= 0)


def test_a_fade_longer_than_the_sound_spans_it_and_none_returns_the_same_audio() -> None:
    sound = Audio(np.ones((1, 1000), np.float32), 1000)
    assert fade(sound, out_s=5.0).samples[0, 500] == pytest.approx(0.5, abs=1e-2)
    assert fade(sound) is sound
