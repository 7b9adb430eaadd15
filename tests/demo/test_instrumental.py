"""The bundled instrumental: properties of its file, and a comparison with what its script renders."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import soundfile
from scipy import signal

from pipeline.demo import INSTRUMENTAL, TITLE, synth
from pipeline.demo.compose import BAR, render
from pipeline.demo.score import FORM, TEMPO_BPM, bars, events
from pipeline.demo.synth import RATE, Signal

BARS = sum(len(section.chords) for section in FORM)


@pytest.fixture(scope="module")
def bundled() -> Signal:
    samples, rate = soundfile.read(INSTRUMENTAL, dtype="float64", always_2d=True)
    assert rate == RATE
    return np.asarray(samples.T)


@pytest.fixture(scope="module")
def rendered() -> Signal:
    """Takes about ten seconds, so the tests that use it are long."""
    return render()


def chroma(samples: Signal) -> Signal:
    """Energy per pitch class above 130 Hz, C first, from one long spectrum a half bar."""
    spectra = np.abs(signal.stft(samples.mean(axis=0), RATE, nperseg=16384)[2]) ** 0.5
    hz = np.fft.rfftfreq(16384, 1 / RATE)
    band = (hz > 130) & (hz < 2100)
    classes = np.round(12 * np.log2(hz[band] / 440) + 9).astype(int) % 12
    return np.bincount(classes, weights=spectra[band].sum(axis=1)) / np.bincount(classes)


def test_the_bundled_file_is_small_stereo_vorbis_of_28_to_40_seconds_with_its_title() -> None:
    with soundfile.SoundFile(INSTRUMENTAL) as file:
        assert (file.format, file.subtype, file.channels, file.title) == ("OGG", "VORBIS", 2, TITLE)
        assert 28 <= file.frames / file.samplerate <= 40
    assert INSTRUMENTAL.stat().st_size <= 600 * 1024


@pytest.mark.long
def test_the_script_renders_what_the_bundled_file_holds(bundled: Signal, rendered: Signal) -> None:
    # Reference: the script's samples. Vorbis at 118 kbit/s keeps the wave below 4 kHz: measured 0.9984.
    assert bundled.shape == rendered.shape
    low = signal.butter(4, 4000, fs=RATE, output="sos")
    a, b = (signal.sosfilt(low, x[:, 4 * BAR : 6 * BAR]) for x in (bundled, rendered))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.995
    # Above, only the spectrum's shape survives: levels of third octaves, measured within 0.4 dB.
    for low_hz in (4000, 5000, 6300, 8000, 10000, 12500):
        band = signal.butter(4, (low_hz, 1.26 * low_hz), "bandpass", fs=RATE, output="sos")
        levels = [np.sum(signal.sosfilt(band, x) ** 2) for x in (bundled, rendered)]
        assert abs(10 * np.log10(levels[0] / levels[1])) < 1.0


def test_its_loudness_is_minus_14_lufs_under_minus_1_dbtp(bundled: Signal) -> None:
    import pyloudnorm

    assert pyloudnorm.Meter(RATE).integrated_loudness(bundled.T) == pytest.approx(-14.0, abs=0.1)
    true_peak = np.abs(signal.resample_poly(bundled, 4, 1, axis=1)).max()
    assert 20 * np.log10(true_peak) <= -1.0


def test_it_ends_in_silence_by_decaying(bundled: Signal) -> None:
    frames = bundled[:, BARS * BAR :]
    level = np.sqrt(np.mean(frames[:, : frames.shape[1] // 4410 * 4410].reshape(-1, 4410) ** 2, axis=1))
    level = level.reshape(2, -1).max(axis=0)
    assert level[-1] < 1e-3
    assert np.all(level[5:] < 1.6 * level[4:-1] + 1e-3)


def test_its_beat_is_the_scores_tempo_throughout(bundled: Signal) -> None:
    # Reference: the score. The strongest lag of the onset curve's autocorrelation near a beat's length.
    hop = 256
    spectra = np.abs(signal.stft(bundled.mean(axis=0), RATE, nperseg=2048, noverlap=2048 - hop)[2])
    onsets = np.maximum(np.diff(np.log1p(1000 * spectra), axis=1), 0).sum(axis=0)  # spectral flux
    for part in np.array_split(onsets[round(2 * BAR / hop) : round(BARS * BAR / hop)], 3):
        curve = part - part.mean()
        correlation = signal.correlate(curve, curve)[curve.size - 1 :]
        lags = np.arange(round(0.35 * RATE / hop), round(0.65 * RATE / hop))
        beat = lags[np.argmax(correlation[lags])]
        assert 60 * RATE / hop / beat == pytest.approx(TEMPO_BPM, rel=0.02)


def test_it_is_in_f_major_and_its_bridge_in_a_flat(bundled: Signal) -> None:
    scale = np.isin(np.arange(12), [0, 2, 4, 5, 7, 9, 11]).astype(float)
    for first, last, tonic in ((2, 10, 5), (10, 13, 8), (14, 18, 5)):  # bars without the pivot chord
        energies = chroma(bundled[:, first * BAR : last * BAR])
        fits = [float(energies @ np.roll(scale, key)) for key in range(12)]
        assert int(np.argmax(fits)) == tonic


@pytest.mark.long
def test_sections_share_bars_that_can_be_exchanged(rendered: Signal) -> None:
    # Bars of the same chord in A and A' differ less than bars of A and of the bridge.
    def spectrum(bar: int) -> Signal:
        power = np.abs(signal.stft(rendered[:, bar * BAR : (bar + 1) * BAR], RATE, nperseg=4096)[2])
        return np.log1p(100 * power).ravel()

    same = np.corrcoef(spectrum(2), spectrum(6))[0, 1]
    other = np.corrcoef(spectrum(2), spectrum(10))[0, 1]
    assert same > 0.85
    assert same > other + 0.1


@pytest.mark.long
def test_mono_playback_loses_less_than_2_db_in_every_section(rendered: Signal) -> None:
    edges = np.cumsum([0] + [len(section.chords) for section in FORM]) * BAR
    for start, stop in pairwise(edges):
        piece = rendered[:, start:stop]
        assert 10 * np.log10(np.mean(piece.mean(axis=0) ** 2) / np.mean(piece**2)) > -2.0


@pytest.mark.long
def test_the_low_end_is_in_the_middle(rendered: Signal) -> None:
    low = signal.sosfilt(signal.butter(4, 110, fs=RATE, output="sos"), rendered)
    assert np.corrcoef(low)[0, 1] > 0.98


def test_the_score_fills_its_bars() -> None:
    form = bars()
    assert len(form) == BARS == 18
    assert all(list(events(bar.melody)) or bar.section is FORM[0] for bar in form)
    with pytest.raises(ValueError, match="16 sixteenths"):
        list(events("C4/4 D4/8"))


def voices() -> dict[str, Signal]:
    rng = np.random.default_rng(1)
    return {
        "bass": synth.tone(synth.BASS, 58.0, 0.3, 1.0),
        "lead": synth.tone(synth.LEAD, 700.0, 0.3, 1.0),
        "pluck": synth.tone(synth.PLUCK, 700.0, 0.1, 1.0),
        "piano": synth.electric_piano(349.0, 0.3, 1.0),
        "pad": synth.pad("F4", 0.5),
        "vibraphone": synth.vibraphone(700.0, 0.3, 1.0),
        "kick": synth.drum(48, 142, 0.13, 1.0),
        "clap": synth.noise(synth.CLAP, rng, 1.0),
        "hat": synth.noise(synth.HAT, rng, 1.0),
        "crash": synth.noise(synth.CRASH, rng, 1.0),
    }


@pytest.mark.parametrize("name", voices())
def test_a_sound_starts_and_ends_without_a_click(name: str) -> None:
    sound = voices()[name]
    peak = np.abs(sound).max()
    assert np.abs(sound[..., :2]).max() < 0.02 * peak
    assert np.abs(sound[..., -2:]).max() < 1e-4 * peak


def test_a_harmonic_series_has_no_partials_but_its_own() -> None:
    # Reference: the spectrum of a band-limited series has lines at multiples of its frequency alone;
    # a naive saw of 2205 Hz (20 samples) folds back onto its own lines, so one of 2105 Hz is used.
    hz, n = 2105.0, RATE
    spectrum = np.abs(np.fft.rfft(synth.series(hz, synth.SAW, np.ones(n)))) / (n / 2)
    own = (hz * np.arange(1, int(synth.HIGHEST_HZ / hz) + 1)).astype(int)
    np.testing.assert_allclose(spectrum[own], synth.SAW[: own.size], rtol=1e-6)
    spectrum[own] = 0
    assert spectrum.max() < 1e-9


def test_the_limiter_holds_the_ceiling_between_the_samples() -> None:
    t = np.arange(RATE) / RATE
    loud = np.stack([2.0 * np.sin(2 * np.pi * 11025 * t + np.pi / 4), 1.5 * np.sin(2 * np.pi * 100 * t)])
    held = synth.limited(loud, 0.8)
    assert np.abs(signal.resample_poly(held, 4, 1, axis=1))[:, 4000:-4000].max() <= 0.8 * 1.005
