"""Small pieces of synthesized music with known beats, and sounds without beats; each is made once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.records import Audio

Doubles = NDArray[np.float64]

CHORDS = {  # MIDI pitches of one bar each
    "verse": [(57, 60, 64), (53, 57, 60), (48, 52, 55), (55, 59, 62)],
    "chorus": [(53, 57, 60), (55, 59, 62), (57, 60, 64), (52, 55, 59)],
}
TUNES = {  # scale steps of one bar each, on the beats and in between
    "verse": [(0, None, 2, 4, None, 2, 1, None), (5, None, 4, None, 2, 1, 0, None)] * 2,
    "chorus": [(7, 7, None, 5, 4, None, 5, None), (8, None, 7, 5, None, 4, 2, None)] * 2,
}
SCALE = (0, 2, 3, 5, 7, 8, 10)  # natural minor


@dataclass(frozen=True, eq=False)
class Piece:
    """Music and its beats, which begin at 0 s."""

    audio: Audio
    beat_s: float
    meter: int


@cache
def play(
    bpm: float = 120.0,
    sections: str = "verse verse chorus verse chorus",
    *,
    meter: int = 4,
    sample_rate: int = 44100,
    channels: int = 2,
    ending: bool = True,
) -> Piece:
    """Drums, bass, chords and a melody, four bars a section; `ending` adds a last chord that decays."""
    beat_s = 60.0 / bpm
    bar_s = meter * beat_s
    names = [name for name in sections.split() for _ in range(4)]
    total_s = len(names) * bar_s + (2.5 if ending else 0.0)
    out = np.zeros((2, round(total_s * sample_rate)))
    rng = np.random.default_rng(7)
    for bar, name in enumerate(names):
        for at_s, gain, pan, sound in _bar(
            name, bar % 4, meter=meter, beat_s=beat_s, rate=sample_rate, rng=rng
        ):
            _add(out, round((bar * bar_s + at_s) * sample_rate), sound * gain, pan)
    if ending:
        for pitch in (45, *CHORDS["verse"][0]):
            sound = _note(pitch, 2.4, sample_rate, decay_s=0.7)
            _add(out, round(len(names) * bar_s * sample_rate), 0.2 * sound, pan=0.0)
    samples = out if channels == 2 else out.mean(axis=0, keepdims=True)
    return Piece(
        Audio((0.5 * samples / np.abs(samples).max()).astype(np.float32), sample_rate), beat_s, meter
    )


def _bar(
    name: str, bar: int, *, meter: int, beat_s: float, rate: int, rng: np.random.Generator
) -> Iterator[tuple[float, float, float, Doubles]]:
    """(seconds into the bar, gain, pan, sound) of each of the bar's sounds."""
    chord = CHORDS[name][bar]
    for pitch in chord:
        yield 0.0, 0.08, 0.4, _note(pitch, meter * beat_s, rate, decay_s=2.0)
    for beat in range(meter):
        at_s = beat * beat_s
        yield at_s, 0.3, 0.0, _note(chord[0] - 24, 0.8 * beat_s, rate, decay_s=0.4)
        low = beat == 0 or (meter == 4 and beat == 2)
        yield at_s, 0.6, 0.0, _kick(rate) if low else _snare(rate, rng)
        for half in (0.0, 0.5):
            yield at_s + half * beat_s, 0.12, -0.3, _hat(rate, rng)
    for k, step in enumerate(TUNES[name][bar][: 2 * meter]):
        if step is not None:
            pitch = 69 + 12 * (step // 7) + SCALE[step % 7]
            yield 0.5 * k * beat_s, 0.12, -0.4, _note(pitch, 0.5 * beat_s, rate, decay_s=0.3)


def _add(out: Doubles, first: int, sound: Doubles, pan: float) -> None:
    kept = sound[: max(0, out.shape[1] - first)]
    out[:, first : first + kept.size] += np.array([[1.0 - pan], [1.0 + pan]]) * kept


@cache
def _note(pitch: int, seconds: float, rate: int, *, decay_s: float) -> Doubles:
    time_s = np.arange(round(seconds * rate)) / rate
    f = 440.0 * 2 ** ((pitch - 69) / 12)
    partials = [np.sin(2 * np.pi * f * k * time_s) / k**1.5 for k in range(1, 6) if f * k < 0.45 * rate]
    edges = np.minimum(1.0, time_s / 0.005) * np.minimum(1.0, (seconds - time_s) / 0.01)
    return np.asarray(sum(partials) * np.exp(-time_s / decay_s) * edges)


def _kick(rate: int) -> Doubles:
    time_s = np.arange(round(0.2 * rate)) / rate
    return np.asarray(
        np.sin(2 * np.pi * (50 * time_s + 5 * (1 - np.exp(-time_s / 0.02)))) * np.exp(-time_s / 0.06)
    )


def _snare(rate: int, rng: np.random.Generator) -> Doubles:
    time_s = np.arange(round(0.15 * rate)) / rate
    return np.asarray(
        (0.5 * rng.standard_normal(time_s.size) + np.sin(2 * np.pi * 190 * time_s)) * np.exp(-time_s / 0.04)
    )


def _hat(rate: int, rng: np.random.Generator) -> Doubles:
    time_s = np.arange(round(0.05 * rate)) / rate
    return np.asarray(np.diff(rng.standard_normal(time_s.size), prepend=0.0) * np.exp(-time_s / 0.012))


@cache
def pads(seconds: float = 20.0, sample_rate: int = 44100) -> Audio:
    """Slow stereo chords that fade into each other, without onsets."""
    time_s = np.arange(round(seconds * sample_rate)) / sample_rate
    out = np.zeros((2, time_s.size))
    for k, chord in enumerate((CHORDS["verse"] * 9)[: int(seconds / 3.1) + 2]):
        swell = np.exp(-0.5 * ((time_s - 3.1 * k) / 1.6) ** 2)
        for voice, pitch in enumerate(chord):
            f = 440.0 * 2 ** ((pitch - 69) / 12)
            out += swell * np.sin(2 * np.pi * f * time_s + np.array([[0.3], [0.9]]) * (k + voice))
    return Audio((0.3 * out / np.abs(out).max()).astype(np.float32), sample_rate)


@cache
def drone(seconds: float = 12.0, sample_rate: int = 44100) -> Audio:
    """One steady chord of sines, mono."""
    time_s = np.arange(round(seconds * sample_rate)) / sample_rate
    out = sum(np.sin(2 * np.pi * f * time_s) for f in (110.0, 165.2, 220.7))
    return Audio((0.1 * np.asarray(out)[None]).astype(np.float32), sample_rate)


@cache
def noise(seconds: float = 10.0, sample_rate: int = 44100) -> Audio:
    """White noise, mono."""
    values = np.random.default_rng(3).standard_normal((1, round(seconds * sample_rate)))
    return Audio((0.1 * values).astype(np.float32), sample_rate)


@cache
def impulses(seconds: float = 12.0, sample_rate: int = 44100, bpm: float = 120.0) -> Audio:
    """One sample of 0.9 on each beat, silence between, mono."""
    out = np.zeros((1, round(seconds * sample_rate)), np.float32)
    out[0, np.round(np.arange(0.0, seconds - 0.01, 60.0 / bpm) * sample_rate).astype(int)] = 0.9
    return Audio(out, sample_rate)


@cache
def speech(seconds: float = 12.0, sample_rate: int = 44100) -> Audio:
    """Syllables of uneven length and pitch with pauses between them, mono."""
    rng = np.random.default_rng(11)
    out = np.zeros((1, round(seconds * sample_rate)))
    at_s = 0.05
    while at_s < seconds - 0.6:
        length_s = float(rng.uniform(0.08, 0.3))
        time_s = np.arange(round(length_s * sample_rate)) / sample_rate
        pitch_hz = rng.uniform(90, 160) * (1 - 0.3 * time_s)
        voice = sum(np.sin(2 * np.pi * k * np.cumsum(pitch_hz) / sample_rate) / k for k in range(1, 20))
        first = round(at_s * sample_rate)
        out[0, first : first + time_s.size] += np.asarray(voice) * np.sin(np.pi * time_s / length_s) ** 0.5
        at_s += length_s + float(rng.choice([0.02, 0.05, 0.35], p=[0.5, 0.3, 0.2]))
    return Audio((0.4 * out / np.abs(out).max()).astype(np.float32), sample_rate)
