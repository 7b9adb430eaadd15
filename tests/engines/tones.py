"""Synthetic melodies, and changes of a request to which both MusicGen engines must respond."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.records import Audio, VariationRequest

RequestFn = Callable[..., VariationRequest]  # of the fixture `request_for`
C_MAJOR, A_MINOR = (261.63, 329.63, 392.0), (220.0, 261.63, 329.63)

EVERY_PARAMETER = pytest.mark.parametrize(
    "change",
    [
        {"pitches_hz": C_MAJOR},  # ignored by transformers before 5.23: huggingface/transformers #45647
        {"prompt": "slow piano"},
        {"guidance": 1.0},
        {"guidance": 6.0},
        {"seed": 8},
        {"seed": 7 + 2**32},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
    ],
    ids=str,
)
MELODY_OR_PROMPT = pytest.mark.parametrize(
    "change", [{"pitches_hz": C_MAJOR}, {"prompt": "fast drums"}], ids=str
)


def tones(*pitches_hz: float, seconds: float = 4.0, sample_rate: int = 44100, channels: int = 2) -> Audio:
    """Equally long notes in sequence, each with a weak octave above it."""
    time_s = np.arange(int(seconds * sample_rate / len(pitches_hz))) / sample_rate
    notes = [0.3 * np.sin(2 * np.pi * f * time_s) + 0.05 * np.sin(4 * np.pi * f * time_s) for f in pitches_hz]
    samples = np.tile(np.concatenate(notes).astype(np.float32), (channels, 1))
    return Audio(samples, sample_rate)
