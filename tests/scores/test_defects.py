"""What is wrong with a sound by itself: silence, clipping, offset, collapse, level."""

from __future__ import annotations

import numpy as np
import pytest
from tunes import RATE, changed, joined, noise, play, silence, tone

from pipeline.records import Audio
from pipeline.scores import Scores, analyse_source, score
from pipeline.scores.defects import HOP, N_FFT, PART_FRAMES, PARTS, RANGE_HZ, Defects, find_defects


def defects(audio: Audio) -> Defects:
    return find_defects(audio, audio.mono())


def test_music_has_no_defects() -> None:
    found = defects(play())
    assert (found.clipped_share, found.noise_share, found.stuck_share) == (0, 0, 0)
    assert found.silent_share < 0.02
    assert found.dc_offset < 0.01


def test_noise_is_flat_and_its_entropy_is_high() -> None:
    found = defects(noise())
    assert found.noise_share == 1.0
    assert found.flatness is not None and found.flatness > 0.9
    assert found.entropy is not None and found.entropy > 0.95


def test_a_held_tone_is_stuck_and_its_entropy_is_low() -> None:
    found = defects(tone())
    assert found.stuck_share == 1.0
    assert found.noise_share == 0.0
    assert found.entropy is not None and found.entropy < 0.2


def test_a_piece_that_ends_in_a_held_tone_is_stuck_from_there_on() -> None:
    assert defects(joined(play(), tone(16.0))).stuck_share == pytest.approx(0.5, abs=0.05)


def test_a_beat_that_repeats_every_second_is_not_stuck() -> None:
    assert defects(play(bars=(0,) * 8, bpm=240.0)).stuck_share == 0.0


def test_silence_is_measured_in_all_and_at_a_stretch() -> None:
    found = defects(joined(play(), silence(4.0), play(), silence(1.0)))
    assert found.silent_share == pytest.approx(5.0 / 37.0, abs=0.01)
    assert found.silent_longest_s == pytest.approx(4.0, abs=0.1)


def test_silence_has_no_spectrum() -> None:
    found = defects(silence())
    assert found.silent_share == 1.0
    assert (found.flatness, found.entropy, found.noise_share, found.stuck_share) == (None, None, 0.0, 0.0)


def test_clipping_is_found_after_the_level_was_lowered() -> None:
    clipped = changed(play(), gain=4.0)
    assert defects(clipped).clipped_share > 0.005
    assert defects(changed(clipped, gain=0.3)).clipped_share == defects(clipped).clipped_share


def test_the_offset_of_the_channel_that_is_furthest_off_counts() -> None:
    samples = np.concatenate([play().samples, play().samples - 0.05])
    assert defects(Audio(samples, RATE)).dc_offset == pytest.approx(0.05, abs=0.01)


@pytest.mark.long  # importing librosa compiles its functions
def test_flatness_is_librosa_s() -> None:
    """Within 1e-6 of librosa.feature.spectral_flatness of the power averaged over one second."""
    import librosa

    step = PARTS * PART_FRAMES * HOP
    samples = np.random.default_rng(2).standard_normal(step + N_FFT - HOP).astype(np.float32)
    found = defects(Audio(samples[None], RATE))
    power = np.abs(librosa.stft(samples, n_fft=N_FFT, hop_length=HOP, center=False)) ** 2
    hz = librosa.fft_frequencies(sr=RATE, n_fft=N_FFT)
    mean = power.mean(axis=1, keepdims=True)[(hz >= RANGE_HZ[0]) & (hz <= RANGE_HZ[1])]
    expected = librosa.feature.spectral_flatness(S=mean, power=1.0, amin=1e-20)
    assert found.flatness == pytest.approx(float(expected.item()), abs=1e-6)


def test_levels_are_those_of_the_file() -> None:
    source = analyse_source(play())
    loud, quiet = score(source, play()), score(source, changed(play(), gain=0.5))
    assert quiet.loudness_lufs == pytest.approx(loud.loudness_lufs - 6.02, abs=0.01)
    assert quiet.true_peak_dbtp == pytest.approx(loud.true_peak_dbtp - 6.02, abs=0.01)


def test_json_has_no_value_where_a_measure_does_not_apply() -> None:
    facts: dict[str, object] = _silent().as_json()
    assert (facts["loudness_lufs"], facts["true_peak_dbtp"], facts["key"]) == (None, None, None)


def _silent() -> Scores:
    return score(analyse_source(play()), silence())
