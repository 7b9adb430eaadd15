"""What the melody conditioning hears of a track.

The music is synthesized, so that its melody is known by itself. Chroma is that of transformers'
feature extractor, whose defaults are those of the published checkpoint: what the model is told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tones import tones

from pipeline.engines.musicgen import stems
from pipeline.engines.musicgen.stems import Heard, Melody, listen
from pipeline.errors import MissingPackage, Stopped
from pipeline.records import Audio

Doubles = NDArray[np.float64]

RATE_HZ = 44100
TUNE = (69, 72, 76, 74, 71, 67, 72, 69)  # MIDI pitches, two to a second


def never() -> bool:
    return False


def hear(audio: Audio, how: Melody, **options: Any) -> Heard:
    return listen(audio, how, should_stop=never, **options)


# --- music of known parts -----------------------------------------------------------------------------


def tune(seconds: float = 12.0) -> Doubles:
    """Plucked notes with five partials, A4 and about, RMS 0.1."""
    out = np.zeros(round(seconds * RATE_HZ))
    for k in range(int(seconds / 0.5)):
        pitch_hz = 440.0 * 2 ** ((TUNE[k % len(TUNE)] - 69) / 12)
        time_s = np.arange(round(0.5 * RATE_HZ)) / RATE_HZ
        partials = sum(np.sin(2 * np.pi * pitch_hz * n * time_s) / n**1.5 for n in range(1, 6))
        edges = np.minimum(1, time_s / 0.005) * np.minimum(1, (0.5 - time_s) / 0.02)
        out[k * time_s.size : (k + 1) * time_s.size] = np.asarray(partials) * np.exp(-time_s / 0.4) * edges
    return level(out, 0.1)


def bass(seconds: float = 12.0) -> Doubles:
    """D2 and G2 in turn, a second each, plucked every half second, RMS 0.1."""
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(np.where(time_s % 2 < 1, 73.4, 98.0)) / RATE_HZ
    return level(sum(np.sin(n * phase) / n**2 for n in (1, 2, 3)) * np.exp(-(time_s % 0.5) / 0.5), 0.1)


def drums(seconds: float = 12.0) -> Doubles:
    """Kick, snare and hats at 120 bpm, RMS 0.1."""
    rng = np.random.default_rng(5)
    beat = RATE_HZ // 2
    time_s = np.arange(beat) / RATE_HZ
    kick = np.sin(2 * np.pi * (55 * time_s + 4 * (1 - np.exp(-time_s / 0.02)))) * np.exp(-time_s / 0.15)
    out = []
    for k in range(round(2 * seconds)):
        noise = rng.standard_normal(beat)
        hats = np.diff(noise, prepend=0.0) * np.exp(-(time_s % 0.25) / 0.02)
        out.append(0.1 * hats + (kick if k % 2 == 0 else 0.4 * noise * np.exp(-time_s / 0.05)))
    return level(np.concatenate(out), 0.1)


def level(sound: Any, rms: float) -> Doubles:
    return np.asarray(sound * (rms / np.sqrt(np.mean(np.square(sound)))))


def of(*parts: Any) -> Audio:
    """The sum of parts in stereo."""
    return Audio(np.tile(sum(parts), (2, 1)).astype(np.float32), RATE_HZ)


@pytest.fixture(scope="session")
def pitch_classes() -> Callable[[Audio], NDArray[np.int64]]:
    """The pitch class named in each frame of chroma."""
    pytest.importorskip("torchaudio", reason="torchaudio is not in the core install")
    transformers = pytest.importorskip("transformers", reason="transformers is not in the core install")
    from pipeline.audio import resample

    extractor = transformers.MusicgenMelodyFeatureExtractor()

    def name(audio: Audio) -> NDArray[np.int64]:
        mono = resample(Audio(audio.mono()[None], audio.sample_rate), extractor.sampling_rate).samples[0]
        features = extractor(mono, sampling_rate=extractor.sampling_rate, return_tensors="np")
        return np.asarray(features["input_features"][0].argmax(axis=-1))

    return name


@pytest.fixture
def without_demucs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package isn't installed."""
    monkeypatch.setitem(sys.modules, "demucs", None)
    monkeypatch.setitem(sys.modules, "demucs.htdemucs", None)


# --- harmonic -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rhythm", "at_most", "at_least"),
    [("drums", 0.70, 0.95), ("bass", 0.20, 0.95), ("both", 0.20, 0.95)],
)
def test_the_melody_is_heard_through_drums_and_bass(
    pitch_classes: Any, rhythm: str, at_most: float, at_least: float
) -> None:
    """Reference: the chroma of the melody by itself. Drums 18 dB above it, bass 12 dB, both 12 dB."""
    parts = {"drums": 8.0 * drums(), "bass": 4.0 * bass(), "both": 4.0 * (drums() + bass())}
    track = of(tune(), parts[rhythm])
    expected = pitch_classes(of(tune()))
    assert np.mean(pitch_classes(track) == expected) < at_most
    assert np.mean(pitch_classes(hear(track, "harmonic").audio) == expected) > at_least


def test_hardly_anything_of_a_melody_is_lost(pitch_classes: Any) -> None:
    expected = pitch_classes(of(tune()))
    assert np.mean(pitch_classes(hear(of(tune()), "harmonic").audio) == expected) > 0.97


@pytest.mark.parametrize("sample_rate", [8000, 22050, 32000, 44100, 48000, 96000])
def test_length_rate_and_type_are_kept(sample_rate: int) -> None:
    audio = tones(440.0, 660.0, seconds=1.0137, sample_rate=sample_rate)
    heard = hear(audio, "harmonic")
    assert heard.how == "harmonic"
    assert heard.audio.sample_rate == sample_rate
    assert heard.audio.samples.shape == (1, audio.n_samples)
    assert heard.audio.samples.dtype == np.float32


def test_a_steady_tone_passes_as_it_is() -> None:
    """Reference: the tone through the high-pass, 1/(1 + (200/440)^4); 2 % of its level; no delay."""
    time_s = np.arange(2 * RATE_HZ) / RATE_HZ
    tone = 0.5 * np.sin(2 * np.pi * 440.0 * time_s)
    heard = hear(of(tone), "harmonic").audio.samples[0]
    middle = slice(RATE_HZ // 2, 3 * RATE_HZ // 2)
    gain = 1 / (1 + (stems.BASS_HZ / 440.0) ** stems.BASS_ORDER)
    np.testing.assert_allclose(heard[middle], gain * tone[middle], atol=0.01)


def test_the_mask_is_that_of_librosa() -> None:
    """Reference: librosa.decompose.hpss of the same magnitudes, and medians; 1e-5."""
    from librosa.decompose import hpss

    audio = of(tune(3.0), drums(3.0))
    grid = stems._grid(audio, stems.OVERLAP)
    magnitudes = np.abs(stems._spectra(audio, grid, 0, grid.n_frames))
    mask = stems._stroke_mask(magnitudes, grid, stems.TONE_S)
    sizes = (
        stems._odd(stems.TONE_S * RATE_HZ / grid.hop),
        stems._odd(stems.STROKE_HZ * grid.fft / RATE_HZ),
    )
    harmonic, _ = hpss(magnitudes.T, kernel_size=sizes, mask=True)
    np.testing.assert_allclose(1 - mask.T, harmonic, atol=1e-5)


def test_blocks_leave_no_trace() -> None:
    """Reference: the same sound from another beginning, so that the blocks lie elsewhere; 1e-5 of 0.9."""
    audio = of(tune(40.0), drums(40.0))
    grid = stems._grid(audio, stems.OVERLAP)
    assert grid.n_frames > 1.5 * stems.BLOCK_FRAMES
    cut = 300 * grid.hop
    whole = hear(audio, "harmonic").audio.samples[:, cut:]
    later = hear(Audio(audio.samples[:, cut:], RATE_HZ), "harmonic").audio.samples
    np.testing.assert_allclose(later[:, RATE_HZ:], whole[:, RATE_HZ:], atol=1e-5)


def test_the_same_audio_gives_the_same_bits() -> None:
    audio = of(tune(3.0), drums(3.0))
    before = audio.samples.copy()
    audio.samples.flags.writeable = False
    first, again = hear(audio, "harmonic"), hear(audio, "harmonic")
    np.testing.assert_array_equal(first.audio.samples, again.audio.samples)
    np.testing.assert_array_equal(audio.samples, before)
    assert stems.rhythm(audio) == stems.rhythm(audio)


@pytest.mark.parametrize("how", ["mix", "harmonic", "auto"])
@pytest.mark.parametrize("n_samples", [0, 1, 100, 5000])
def test_very_short_sounds_are_no_trouble(how: Melody, n_samples: int) -> None:
    audio = Audio(of(tune(0.5)).samples[:, :n_samples], RATE_HZ)
    heard = hear(audio, how)
    assert heard.audio.n_samples == n_samples
    assert np.isfinite(heard.audio.samples).all()


def test_a_stop_is_heeded() -> None:
    with pytest.raises(Stopped):
        listen(of(tune(1.0)), "harmonic", should_stop=lambda: True)


# --- auto and the others ----------------------------------------------------------------------------


def test_the_mix_is_left_alone_when_asked_for() -> None:
    track = of(tune(3.0), drums(3.0))
    heard = hear(track, "mix")
    assert heard.how == "mix" and heard.audio is track


@pytest.mark.parametrize("melodic", [tones(440.0, 523.25, 659.26, 880.0, seconds=8.0), of(tune(8.0))])
def test_auto_leaves_what_is_melodic_already_alone(melodic: Audio) -> None:
    heard = hear(melodic, "auto")
    assert heard.how == "mix" and heard.audio is melodic


def test_demucs_that_is_not_installed_is_told(without_demucs: None) -> None:
    with pytest.raises(MissingPackage, match="demucs"):
        hear(of(tune(1.0)), "demucs")
