"""Short pieces of synthesized music for the tests of scores: any key, tempo, instrument and order of bars."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import soundfile
from numpy.typing import NDArray

from pipeline.records import Audio

RATE = 22050
CHORDS = ((0, 4, 7), (9, 12, 16), (5, 9, 12), (7, 11, 14))  # of a bar each: I vi IV V
MAJOR = (0, 2, 4, 5, 7, 9, 11, 12)
INSTRUMENTS = {  # partials, decay (s), attack (s)
    "piano": (tuple(k**-1.2 for k in range(1, 9)), 0.4, 0.003),
    "organ": ((1.0, 0.8, 0.0, 0.6, 0.0, 0.0, 0.0, 0.3), 20.0, 0.03),
}


@cache
def play(
    *,
    tune: int = 0,
    transpose: int = 0,
    bpm: float = 120.0,
    instrument: str = "piano",
    bars: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7),
    drums: bool = True,
) -> Audio:
    """A tune in C major over chords, bass and drums, mono; `bars` are played in the order given."""
    beat_s = 60.0 / bpm
    out = np.zeros(round(4 * beat_s * len(bars) * RATE))
    for at, bar in enumerate(bars):
        rng = np.random.default_rng([tune, bar])
        chord = CHORDS[(bar + tune) % 4]
        notes = [(0.0, 4.0, 60 + pitch, 0.3) for pitch in chord]
        notes += [(beat, 0.9, 36 + chord[0], 0.6) for beat in range(4)]
        notes += [(k / 2, 0.5, 72 + int(rng.choice(MAJOR)), 0.6) for k in range(8) if rng.random() < 0.7]
        for beat, length, pitch, gain in notes:
            sound = gain * _note(pitch + transpose, length * beat_s, instrument)
            _add(out, (4 * at + beat) * beat_s, sound)
        for beat in range(4) if drums else ():
            _add(out, (4 * at + beat) * beat_s, 0.8 * _stroke(rng, is_kick=beat % 2 == 0))
    return Audio((0.5 * out / np.abs(out).max()).astype(np.float32)[None], RATE)


def _note(pitch: int, seconds: float, instrument: str) -> NDArray[np.float64]:
    partials, decay_s, attack_s = INSTRUMENTS[instrument]
    time_s = np.arange(round(seconds * RATE)) / RATE
    hz = 440.0 * 2 ** ((pitch - 69) / 12)
    waves = [
        gain * np.sin(2 * np.pi * k * hz * time_s) for k, gain in enumerate(partials, 1) if k * hz < 9000
    ]
    edges = np.minimum(1.0, time_s / attack_s) * np.minimum(1.0, (seconds - time_s) / 0.02)
    return np.asarray(np.sum(waves, axis=0) * np.exp(-time_s / decay_s) * edges)


def _stroke(rng: np.random.Generator, *, is_kick: bool) -> NDArray[np.float64]:
    time_s = np.arange(round(0.15 * RATE)) / RATE
    sound = np.sin(2 * np.pi * 60 * time_s) if is_kick else 0.5 * rng.standard_normal(time_s.size)
    return np.asarray(sound * np.exp(-time_s / 0.04))


def _add(out: NDArray[np.float64], at_s: float, sound: NDArray[np.float64]) -> None:
    first = round(at_s * RATE)
    kept = sound[: out.size - first]
    out[first : first + kept.size] += kept


def changed(audio: Audio, *, gain: float = 1.0) -> Audio:
    """Louder or quieter, and clipped at full scale."""
    return Audio(np.clip(gain * audio.samples, -1.0, 1.0).astype(np.float32), audio.sample_rate)


def through_mp3(audio: Audio) -> Audio:
    file = io.BytesIO()
    soundfile.write(file, audio.samples.T, audio.sample_rate, format="MP3")
    file.seek(0)
    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return Audio(np.ascontiguousarray(samples.T), rate)


@cache
def noise(seconds: float = 16.0) -> Audio:
    values = np.random.default_rng(3).standard_normal((1, round(seconds * RATE)))
    return Audio((0.1 * values).astype(np.float32), RATE)


def silence(seconds: float = 16.0) -> Audio:
    return Audio(np.zeros((1, round(seconds * RATE)), np.float32), RATE)


def tone(seconds: float = 16.0) -> Audio:
    time_s = np.arange(round(seconds * RATE)) / RATE
    return Audio((0.3 * np.sin(2 * np.pi * 440 * time_s))[None].astype(np.float32), RATE)


def joined(*parts: Audio) -> Audio:
    """The parts one after the other, cut hard."""
    return Audio(np.concatenate([part.samples for part in parts], axis=1), RATE)


def part(audio: Audio, start_s: float, stop_s: float) -> Audio:
    return Audio(audio.samples[:, round(start_s * RATE) : round(stop_s * RATE)], RATE)
