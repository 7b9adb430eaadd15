"""A piece of sequenced music whose bars are exact copies, for tests of what happens on its bar lines."""

from __future__ import annotations

from functools import cache

import numpy as np

from pipeline.records import Audio

RATE, BAR_S = 22050, 2.0  # four beats at 120 a minute
CHORDS = ((57, 60, 64), (53, 57, 60), (48, 52, 55), (55, 59, 62))  # MIDI pitches, one chord a bar


@cache
def sequenced(seconds: float = 40.0) -> Audio:
    """Kick, hi-hat and four chords in turn from 0 s on, stereo; it repeats every 8 s to the sample."""
    period = np.concatenate([_bar(chord) for chord in CHORDS])
    mono = np.resize(period, round(seconds * RATE))
    return Audio(np.stack([mono, 0.8 * mono]).astype(np.float32), RATE)


@cache
def pads(seconds: float = 30.0) -> Audio:
    """Slow chords that fade into each other, without a beat, mono."""
    t = np.arange(round(seconds * RATE)) / RATE
    out = np.zeros(t.size)
    for k in range(int(seconds / 3.1) + 2):
        swell = np.exp(-0.5 * ((t - 3.1 * k) / 1.6) ** 2)
        for voice, pitch in enumerate(CHORDS[k % 4]):
            out += swell * np.sin(2 * np.pi * _hz(pitch) * t + k + voice)
    return Audio((0.1 * out[None]).astype(np.float32), RATE)


def _bar(chord: tuple[int, ...]) -> np.ndarray:
    t = np.arange(round(BAR_S * RATE)) / RATE
    tones = sum(np.sin(2 * np.pi * _hz(pitch) * t) for pitch in chord) * np.exp(-t / 1.5)
    beat = t % 0.5
    kick = np.sin(2 * np.pi * 55 * beat) * np.exp(-beat / 0.08) * (1.5 - (t >= 0.5))
    noise = np.random.default_rng(5).standard_normal(t.size)
    hat = noise * np.exp(-(t % 0.25) / 0.01)
    return np.asarray(0.08 * tones + 0.3 * kick + 0.05 * hat)


def _hz(pitch: int) -> float:
    return float(440.0 * 2 ** ((pitch - 69) / 12))
