"""Loudness against the standards' values, peaks against known signals, ceilings against other meters."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import soundfile
import soxr
from scipy.signal import firwin, resample_poly

from pipeline.audio import loudness_lufs, peak_dbfs, to_loudness, true_peak_dbtp, write_wav
from pipeline.records import Audio, Samples


def sine(hz: float, rate: int, seconds: float, level_db: float = 0.0) -> Samples:
    t = np.arange(round(seconds * rate)) / rate
    return (10 ** (level_db / 20) * np.sin(2 * np.pi * hz * t)).astype(np.float32)


@pytest.mark.parametrize("rate", [22050, 32000, 44100, 48000, 96000])
def test_a_full_scale_sine_in_one_channel_reads_3_lufs_below_zero(rate: int) -> None:
    """BS.1770-4, Annex 1: 997 Hz at 0 dBFS in one channel is -3.01 LKFS.

    The filters are bilinear images of those at 48 kHz, which costs up to 0.03 LU elsewhere.
    """
    left = sine(997, rate, 5)
    assert loudness_lufs(Audio(left[np.newaxis], rate)) == pytest.approx(
        -3.01, abs=0.01 if rate in (44100, 48000) else 0.035
    )
    assert loudness_lufs(Audio(np.stack([left, 0 * left]), rate)) == pytest.approx(
        -3.01, abs=0.01 if rate in (44100, 48000) else 0.035
    )


def stereo_steps(*steps: tuple[float, float]) -> Audio:
    """A 1 kHz sine in both channels: (dBFS, seconds) after one another, at 48 kHz."""
    left = np.concatenate([sine(1000, 48000, seconds, level) for level, seconds in steps])
    return Audio(np.stack([left, left]), 48000)


@pytest.mark.parametrize(
    ("case", "audio", "expected"),
    [
        (1, stereo_steps((-23, 20)), -23.0),
        (2, stereo_steps((-33, 20)), -33.0),
        (3, stereo_steps((-36, 10), (-23, 60), (-36, 10)), -23.0),
        (4, stereo_steps((-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)), -23.0),
        (5, stereo_steps((-26, 20), (-20, 20.1), (-26, 20)), -23.0),
    ],
)
def test_ebu_tech_3341_cases(case: int, audio: Audio, expected: float) -> None:
    """EBU Tech 3341, table 1, minimum requirements, tolerance as stated there: 0.1 LU."""
    assert loudness_lufs(audio) == pytest.approx(expected, abs=0.1), case


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.4, 0.449, 0.46, 3.33])
def test_reading_in_pieces_equals_pyloudnorm_on_the_whole(rate: int, seconds: float) -> None:
    from pyloudnorm import Meter

    generator = np.random.default_rng(3)
    noise = (0.1 * generator.standard_normal((2, math.ceil(seconds * rate)))).astype(np.float32)
    noise[:, : len(noise[0]) // 3] *= 0.01  # for the gate
    reference = Meter(rate, filter_class="DeMan").integrated_loudness(noise.T.astype(np.float64))
    assert loudness_lufs(Audio(noise, rate)) == pytest.approx(reference, abs=1e-6)


def test_silence_and_nothing_have_no_loudness() -> None:
    for samples in (
        np.zeros((2, 44100), np.float32),
        np.zeros((1, 10), np.float32),
        np.zeros((1, 0), np.float32),
    ):
        audio = Audio(samples, 44100)
        assert loudness_lufs(audio) == true_peak_dbtp(audio) == peak_dbfs(audio) == -math.inf
        assert to_loudness(audio) is audio


def test_a_short_note_is_as_loud_as_the_same_note_held() -> None:
    held = loudness_lufs(Audio(sine(1000, 48000, 2.0)[np.newaxis], 48000))
    short = loudness_lufs(Audio(sine(1000, 48000, 0.1)[np.newaxis], 48000))
    assert short == pytest.approx(held, abs=0.2)


def test_true_peak_is_measured_between_the_samples() -> None:
    """A sine of a quarter of the sample rate, sampled at 45 degrees, peaks 3.01 dB above its samples."""
    samples = (0.5 * np.sin(np.pi / 2 * np.arange(44100) + np.pi / 4)).astype(np.float32)
    audio = Audio(samples[np.newaxis], 44100)
    assert peak_dbfs(audio) == pytest.approx(-9.03, abs=0.01)
    inner = Audio(audio.samples * np.hanning(44100).astype(np.float32), 44100)  # no step at the ends to ring
    assert true_peak_dbtp(inner) == pytest.approx(
        -6.02, abs=0.1
    )  # the standard's filter reads up to 0.2 dB more


def test_true_peak_is_the_same_wherever_a_block_ends() -> None:
    click = np.zeros(200_000, dtype=np.float32)
    click[100:102] = 0.5
    here = true_peak_dbtp(Audio(click[np.newaxis], 44100))
    for shift in (65_400, 65_434, 65_460, 131_000, 199_700):
        moved = true_peak_dbtp(Audio(np.roll(click, shift)[np.newaxis], 44100))
        assert moved == pytest.approx(here, abs=0.001)


@pytest.mark.parametrize("rate", [44100, 48000, 96000, 192000])
def test_a_tone_peaks_at_its_amplitude_at_every_rate(rate: int) -> None:
    tone = sine(997, rate, 1.0, -6.0) * np.hanning(rate).astype(np.float32)
    assert true_peak_dbtp(Audio(tone[np.newaxis], rate)) == pytest.approx(-6.0, abs=0.03)


def _hard_signals() -> dict[str, Samples]:
    generator = np.random.default_rng(4)
    n = 44100 * 3
    t = np.arange(n) / 44100
    return {
        "white noise": generator.standard_normal((2, n)),
        "random bits": np.sign(generator.standard_normal((1, n))),
        "square 50": np.sign(np.sin(2 * np.pi * 50.01 * t))[np.newaxis],
        "square 1000": np.sign(np.sin(2 * np.pi * 1000.3 * t))[np.newaxis],
        "square 8000": np.sign(np.sin(2 * np.pi * 8000.7 * t))[np.newaxis],
        "quarter rate": np.sin(np.pi / 2 * np.arange(n) + np.pi / 4)[np.newaxis],
        "near Nyquist": np.sin(2 * np.pi * 21500 * t)[np.newaxis],
    }


@pytest.mark.parametrize("name", sorted(_hard_signals()))
def test_the_ceiling_holds_for_the_written_file(name: str) -> None:
    loud, written = _normalized((0.3 * _hard_signals()[name]).astype(np.float32))
    assert true_peak_dbtp(written) <= -1.0
    assert -1.2 < true_peak_dbtp(loud) < -1.05  # and no more is lost than the margin


@pytest.mark.parametrize("name", ["square 50", "square 1000", "white noise"])
def test_the_ceiling_holds_on_other_meters(name: str) -> None:
    """At 4 times the rate by scipy's polyphase filter and by libsoxr, with signals up to 15 kHz.

    Near the Nyquist frequency every oversampler gives another value.
    """
    low_pass = firwin(255, 15_000, fs=44100)
    signal = np.stack([np.convolve(row, low_pass, mode="same") for row in _hard_signals()[name]])
    _, written = _normalized((0.3 * signal).astype(np.float32))
    ceiling = 10 ** (-1 / 20)
    assert np.max(np.abs(resample_poly(written.samples, 4, 1, axis=1))) <= ceiling
    for quality in ("HQ", "VHQ"):
        assert np.max(np.abs(soxr.resample(written.samples.T, 1, 4, quality))) <= ceiling


def _normalized(samples: Samples) -> tuple[Audio, Audio]:
    """The samples, as loud as the ceiling allows, and the same after a 16-bit file."""
    loud = to_loudness(Audio(samples, 44100), target_lufs=20.0)
    file = io.BytesIO()
    write_wav(file, loud, bit_depth=16, tags={})
    file.seek(0)
    return loud, Audio(soundfile.read(file, dtype="float32", always_2d=True)[0].T, 44100)


def test_the_target_is_reached_by_one_gain_where_there_is_room() -> None:
    generator = np.random.default_rng(5)
    quiet = Audio((0.01 * generator.standard_normal((2, 44100 * 3))).astype(np.float32), 44100)
    loud = to_loudness(quiet, target_lufs=-20.0)
    assert loudness_lufs(loud) == pytest.approx(-20.0, abs=1e-3)
    gain = loud.samples / quiet.samples
    assert np.ptp(gain) / np.mean(gain) < 1e-6
    assert to_loudness(loud, target_lufs=-30.0).samples.std() < loud.samples.std()


def test_hiss_below_the_gate_is_not_amplified() -> None:
    hiss = Audio((1e-5 * np.random.default_rng(6).standard_normal((1, 44100))).astype(np.float32), 44100)
    assert to_loudness(hiss) is hiss
