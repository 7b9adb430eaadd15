"""The conditions that are computed from melody and prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tones import tones

from pipeline.engines.musicgen import conditioning
from pipeline.records import Audio

RATE_HZ, WINDOW = 32000, 960_000


def chroma_of(musicgen: Any, audio: Audio) -> np.ndarray:
    return conditioning.track_chroma(musicgen.checkpoint, audio, [0])[0]


def test_chroma_is_the_feature_extractors_of_the_same_sound(musicgen: Any) -> None:
    """Reference: transformers' extractor on 30 s of mono, cut by hand; equal bit for bit."""
    audio = tones(440.0, 523.25, 659.26, 880.0, seconds=33.0, sample_rate=RATE_HZ)
    expected = musicgen.checkpoint.feature_extractor(
        audio.samples[0, :WINDOW], sampling_rate=RATE_HZ, return_tensors="np"
    )["input_features"][0]
    np.testing.assert_array_equal(chroma_of(musicgen, audio), expected)


@pytest.mark.parametrize(
    ("pitch_hz", "pitch_class"), [(261.63, 0), (329.63, 4), (440.0, 9), (466.16, 10), (987.77, 11)]
)
@pytest.mark.parametrize("sample_rate", [32000, 44100])
def test_a_tone_has_its_own_pitch_class_alone(
    musicgen: Any, pitch_hz: float, pitch_class: int, sample_rate: int
) -> None:
    chroma = chroma_of(musicgen, tones(pitch_hz, seconds=31.0, sample_rate=sample_rate))
    assert chroma.shape == (235, 12)
    assert np.array_equal(np.unique(chroma), [0, 1])
    assert (chroma.sum(axis=-1) == 1).all()
    assert (chroma.argmax(axis=-1) == pitch_class).all()


def test_a_short_source_is_repeated_not_padded(musicgen: Any) -> None:
    """Silence would show as C (class 0)."""
    melody = tones(440.0, 659.26, seconds=4.0, sample_rate=RATE_HZ, channels=1)
    window = conditioning.repeated_mono(melody, RATE_HZ, WINDOW)
    np.testing.assert_array_equal(window[128_000:256_000], melody.samples[0])
    assert set(chroma_of(musicgen, melody).argmax(axis=-1)) == {9, 4}


def test_a_later_window_has_the_chroma_of_its_own_part_of_the_track(musicgen: Any) -> None:
    """A for 20 s, then E: the window from 18 s has A for 2 s, in frames of 0.128 s, then E."""
    checkpoint = musicgen.checkpoint
    first, second = (
        tones(pitch, seconds=s, sample_rate=RATE_HZ) for pitch, s in ((440.0, 20.0), (659.26, 30.0))
    )
    track = Audio(np.concatenate([first.samples, second.samples], axis=1), RATE_HZ)
    chroma = conditioning.track_chroma(checkpoint, track, [0, 18 * 50])
    conditions = conditioning.Conditions(
        chroma, conditioning.encode_prompt(checkpoint, "", checkpoint.text_encoder), checkpoint
    )
    window = conditions.chroma[18 * 50].argmax(axis=-1)
    assert (window[:14] == 9).all() and (window[18:] == 4).all()
    assert conditions.conditional(18 * 50).shape == conditions.unconditional().shape == (236, 32)


@pytest.mark.parametrize(("start", "seconds"), [(900, 70.0), (2700, 70.0), (900, 40.0), (2700, 40.0)])
def test_every_window_has_the_chroma_of_the_sound_from_its_own_start(
    musicgen: Any, start: int, seconds: float
) -> None:
    """Reference: audiocraft's positions of a later window, modulo the melody's length, and its extractor.

    Melody notes of 0.31 s, which don't fall on the frames of one grid for the whole track.
    """
    checkpoint = musicgen.checkpoint
    notes = np.random.default_rng(4).integers(48, 72, 250)
    pitches = [440.0 * 2 ** ((note - 69) / 12) for note in notes]
    n_samples = round(seconds * RATE_HZ)
    melody = np.concatenate(
        [tones(pitch, seconds=0.31, sample_rate=RATE_HZ, channels=1).samples[0] for pitch in pitches]
    )[:n_samples]
    positions = np.arange(start * 640, start * 640 + WINDOW) % n_samples
    expected = checkpoint.feature_extractor(melody[positions], sampling_rate=RATE_HZ, return_tensors="np")[
        "input_features"
    ][0]
    found = conditioning.track_chroma(checkpoint, Audio(melody[None], RATE_HZ), [0, start])[start]
    np.testing.assert_array_equal(found, expected)


def test_a_long_source_is_used_from_its_beginning() -> None:
    melody = tones(440.0, 659.26, seconds=80.0, sample_rate=RATE_HZ)
    window = conditioning.repeated_mono(melody, RATE_HZ, WINDOW)
    np.testing.assert_array_equal(window, melody.samples[0, :WINDOW])


def test_resampling_a_beginning_gives_the_beginning_of_the_resampled() -> None:
    """Reference: the whole source resampled, then cut; soxr's rounding, 1e-6."""
    from pipeline.audio import resample

    melody = tones(440.0, 659.26, seconds=40.0, sample_rate=44100, channels=1)
    whole = resample(melody, RATE_HZ).samples[0, :WINDOW]
    np.testing.assert_allclose(conditioning.repeated_mono(melody, RATE_HZ, WINDOW), whole, atol=1e-6)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_no_prompt_is_the_models_null_condition(musicgen: Any, prompt: str) -> None:
    """Reference: get_unconditional_inputs of the library's processor."""
    from transformers import MusicgenMelodyProcessor

    checkpoint = musicgen.checkpoint
    processor = MusicgenMelodyProcessor(checkpoint.feature_extractor, checkpoint.tokenizer)
    null = processor.get_unconditional_inputs(1)
    assert null["input_ids"].tolist() == [[checkpoint.tokenizer.eos_token_id]]
    assert null["attention_mask"].tolist() == [[0]]
    np.testing.assert_array_equal(
        conditioning.encode_prompt(checkpoint, prompt, pytest.fail), np.zeros((1, 32))
    )


def test_a_prompt_is_encoded_with_its_end_token(musicgen: Any) -> None:
    """Reference: the library's text encoder and projection on the tokens and the end token."""
    import torch

    checkpoint = musicgen.checkpoint
    tokens = checkpoint.tokenizer.convert_tokens_to_ids(["▁warm", "▁analog", "▁synths", "</s>"])
    with torch.inference_mode():
        hidden = checkpoint.text_encoder()(input_ids=torch.tensor([tokens])).last_hidden_state
        expected = checkpoint.text_projection(hidden)[0].numpy()
    found = conditioning.encode_prompt(checkpoint, " warm analog synths ", checkpoint.text_encoder)
    np.testing.assert_allclose(found, expected, atol=1e-6)
