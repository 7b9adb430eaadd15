"""Synthetic melodies, and the type of the function that makes requests with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.records import Audio, VariationRequest

RequestFn = Callable[..., VariationRequest]  # of the fixture `request_for`


def tones(*pitches_hz: float, seconds: float = 4.0, sample_rate: int = 44100, channels: int = 2) -> Audio:
    """Equally long notes in sequence, each with a weak octave above it."""
    time_s = np.arange(int(seconds * sample_rate / len(pitches_hz))) / sample_rate
    notes = [0.3 * np.sin(2 * np.pi * f * time_s) + 0.05 * np.sin(4 * np.pi * f * time_s) for f in pitches_hz]
    samples = np.tile(np.concatenate(notes).astype(np.float32), (channels, 1))
    return Audio(samples, sample_rate)
