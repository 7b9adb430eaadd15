"""Stereo whose channels cancel in their mean: every engine hears the sound, and a normal mix is unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import soundfile
import synth

from pipeline.demo import INSTRUMENTAL
from pipeline.engines import descriptors, remix
from pipeline.engines.base import EngineSettings
from pipeline.engines.remix.analysis import analyse
from pipeline.records import Audio, Samples, VariationRequest

RATE_HZ = 44100
SONG = synth.play(sections="verse chorus").audio.mono()  # 18 s
PADS = np.resize(synth.pads(18.0).samples[0], SONG.size)
NOISE = np.random.default_rng(1).standard_normal((2, SONG.size)).astype(np.float32)


def stereo(left: Samples, right: Samples) -> Audio:
    return Audio(np.stack([left, right]).astype(np.float32), RATE_HZ)


ANTIPHASE = stereo(SONG, -SONG)


def cosine(a: Audio, b: Audio, embedder: Any) -> float:
    first, second = (embedder.embed(audio, should_stop=lambda: False).track for audio in (a, b))
    return float(first @ second)


def below_200_hz(samples: Samples) -> Samples:
    spectrum = np.fft.rfft(samples)
    spectrum[np.fft.rfftfreq(samples.size, 1 / RATE_HZ) > 200] = 0
    return np.fft.irfft(spectrum, samples.size).astype(np.float32)


BASS = 3 * below_200_hz(SONG)
FIRST_HALF = np.arange(SONG.size) < SONG.size // 2

CANCELLING = {
    "inverted copy": (ANTIPHASE, SONG),
    "quieter inverted copy": (stereo(SONG, -0.8 * SONG), SONG),
    "inverted copy with a delay": (stereo(SONG, -np.roll(SONG, 5)), SONG),
    "inverted copy with noise": (Audio(ANTIPHASE.samples + 0.0003 * NOISE, RATE_HZ), SONG),
    "mono bass, pads in antiphase": (stereo(BASS + PADS, BASS - PADS), BASS + PADS),
    "one half in antiphase": (stereo(SONG, np.where(FIRST_HALF, -SONG, SONG)), SONG),
}


@pytest.mark.parametrize("name", CANCELLING)
def test_cancelling_stereo_has_the_vector_of_its_sound_in_mono(name: str) -> None:
    audio, mono = CANCELLING[name]
    embedder = descriptors.ENGINE.load(EngineSettings())
    assert cosine(audio, Audio(mono[np.newaxis], RATE_HZ), embedder) > 0.98


def bundled() -> Samples:
    return soundfile.read(INSTRUMENTAL, dtype="float32", always_2d=True)[0].T


NORMAL = {
    "music": bundled,
    "equal channels": lambda: np.stack([SONG, SONG]),
    "one silent channel": lambda: np.stack([SONG, 0 * SONG]),
    "unrelated channels": lambda: NOISE,
    "silence": lambda: 0 * NOISE,
    "ten samples": lambda: NOISE[:, :10],
}


@pytest.mark.parametrize("name", NORMAL)
def test_a_normal_mix_is_the_mean_of_its_channels(name: str) -> None:
    samples = NORMAL[name]()
    np.testing.assert_array_equal(Audio(samples, RATE_HZ).mono(), samples.mean(axis=0, dtype=np.float32))


def test_the_mono_signal_of_an_inverted_copy_is_the_original() -> None:
    for rate_hz in (8000, 44100, 96000):
        np.testing.assert_array_equal(Audio(ANTIPHASE.samples, rate_hz).mono(), SONG)


def test_remix_makes_of_antiphase_stereo_what_it_makes_of_the_same_sound_in_phase() -> None:
    in_phase = stereo(SONG, SONG)
    assert analyse(ANTIPHASE).tempo_bpm == analyse(in_phase).tempo_bpm
    generator: Any = remix.ENGINE.load(EngineSettings(sample_rate=RATE_HZ))
    requests = [VariationRequest(str(k), str(k), a, 30.0, 3) for k, a in enumerate((ANTIPHASE, in_phase))]
    made = list(generator.generate(requests, progress=lambda *_: None, should_stop=lambda: False))
    assert len(made[0].details["joins"]) > 0
    np.testing.assert_array_equal(made[0].audio.samples[0], made[1].audio.samples[0])
    np.testing.assert_array_equal(made[0].audio.samples[1], -made[1].audio.samples[1])


def test_clap_has_the_vector_of_the_mono_sound(clap: Any) -> None:
    assert cosine(ANTIPHASE, Audio(SONG[np.newaxis], RATE_HZ), clap) > 0.999


def test_musicgens_melody_sources_are_those_of_the_mono_sound() -> None:
    from pipeline.engines.musicgen.conditioning import repeated_mono
    from pipeline.engines.musicgen.hpss import harmonic, percussive_share

    mono = Audio(SONG[np.newaxis], RATE_HZ)
    np.testing.assert_array_equal(repeated_mono(ANTIPHASE, 32000, 10**5), repeated_mono(mono, 32000, 10**5))
    assert percussive_share(ANTIPHASE) == percussive_share(mono)
    separated = [harmonic(audio, lambda: False).samples for audio in (ANTIPHASE, mono)]
    np.testing.assert_array_equal(separated[0], separated[1])
