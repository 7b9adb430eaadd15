"""Synthesized pieces of music whose beats, bar lines, meter and key are known.

A style says what each instrument plays in a bar, in steps; a beat has four steps where it is divided evenly
and three where it swings or is dotted (6/8: a bar of two beats, each a dotted quarter). Strokes are up to
10 ms early or late and of uneven strength, as played.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.music.spectra import RATE_HZ

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
TempoOf = Callable[[Doubles], Doubles]  # beats per minute at a position in beats
Stroke = tuple[float, float, Doubles]  # steps into the bar, gain, sound

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
DEGREES = {  # of the chords of four bars
    "major": {"A": (1, 6, 4, 5), "B": (4, 1, 2, 5)},
    "minor": {"A": (1, 6, 4, 5), "B": (4, 1, 7, 5)},
}
BARS = 4  # of each letter of the form
JITTER_S = 0.004  # standard deviation of a stroke's time


@dataclass(frozen=True)
class Style:
    """Patterns of one bar: x a stroke, . none; the bass plays the chord's root (x) or its fifth (5)."""

    meter: int
    steps: int  # a beat
    kick: str = ""
    snare: str = ""
    hat: str = ""
    bass: str = ""
    chords: str = ""
    lead: str = ""
    attack_s: float = 0.004


STYLES = {
    "rock": Style(
        4, 4, "x.......x.x.....", "....x.......x...", "x.x.x.x.x.x.x.x.", "x.x.x.x.x.x.x.5.",
        "x.......x.......",
    ),
    "house": Style(
        4, 4, "x...x...x...x...", "....x.......x...", "..x...x...x...x.", "..x...x...x...5.",
        "x..x..x...x..x..",
    ),
    "breakbeat": Style(
        4, 4, "x.........x.....", "....x.......x...", "x.x.x.x.x.x.x.x.", "x.....x.x.......",
        "x...............", "x.x...x...x.x...",
    ),
    "tresillo": Style(
        4, 4, "x.....x.....x...", "", "x..x..x.x..x..x.", "x.....x.....5...",
        "x..x..x...x.x...", "x.....x.....x...",
    ),
    "dotted": Style(
        4, 4, "x...x...x...x...", "....x.......x...", "", "x.....x.....x...",
        "x.....x.....x...", "x..x..x..x..x.x.",
    ),
    "metal": Style(
        4, 4, "x.x.x.x.x.x.x.x.", "....x.......x...", "x...x...x...x...", "x.xxx.xxx.xxx.xx",
        "x.......x.......",
    ),
    "chiptune": Style(
        4, 4, "", "....x.......x...", "", "x.x.x.x.x.x.5.x.", "xxxxxxxxxxxxxxxx", "x...x.x.x..x..x.",
    ),
    "arpeggio": Style(
        4, 4, bass="x...............", chords="x...............", lead="x.x.x.x.x.x.x.x.",
    ),
    "ballad": Style(
        4, 4, bass="x.......5.......", chords="x...x...x...x...", lead="x.....x.x...x...",
    ),
    "strings": Style(
        4, 4, bass="x.......x.......", chords="x.......x.......", lead="x...x...x.x.x...", attack_s=0.04,
    ),
    "swing": Style(
        4, 3, "x.....x.....", "", "x..x.xx..x.x", "x..x..5..x..", "x....x......", "x.xx..x.xx.x",
    ),
    "shuffle": Style(4, 3, "x.....x.....", "...x.....x..", "x.xx.xx.xx.x", "x.xx.xx.x5.x", "x..x..x..x.."),
    "waltz": Style(3, 4, bass="x...........", chords="....x...x...", lead="x...x...x.x."),
    "jazz waltz": Style(3, 3, "x........", "...x..x..", "x..x.xx.x", "x.....5..", "x..x..x..", "x..x.xx.."),
    "three": Style(
        3, 4, "x.......x...", "....x.......", "x.x.x.x.x.x.", "x.......5...", "x...........", "x.....x.x...",
    ),
    "six eight": Style(2, 3, "x.....", "...x..", "xxxxxx", "x..5..", "x.....", "x.xx.."),
    "jig": Style(2, 3, bass="x..5..", chords="x..x..", lead="xxxxxx"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Piece:
    """Music and its truth."""

    mono: Floats  # (samples,) at RATE_HZ
    beats_s: Doubles
    downbeats_s: Doubles
    meter: int
    tonic: int  # pitch class: 0 is C
    mode: str


@cache
def play(
    name: str,
    bpm: float | TempoOf = 120.0,
    *,
    tonic: int = 0,
    mode: str = "major",
    form: str = "AAB",
    pickup: int = 0,
    seed: int = 0,
) -> Piece:
    """Four bars for each letter of the form, after `pickup` beats of the melody alone."""
    style, rng = STYLES[name], np.random.default_rng(seed)
    n_bars = BARS * len(form)
    seconds_at = _clock(bpm, n_bars * style.meter + pickup)
    out = np.zeros(int((seconds_at(n_bars * style.meter + pickup) + 1.5) * RATE_HZ))
    tunes = {letter: rng.integers(0, 4, (2, style.meter * style.steps)) for letter in "AB"}
    for bar in range(n_bars):
        chord = _chord(tonic, mode, 1 if bar == n_bars - 1 else DEGREES[mode][form[bar // BARS]][bar % BARS])
        first = bar * style.meter + pickup
        step_s = float(seconds_at(first + 1) - seconds_at(first)) / style.steps
        strokes = [*_bar(style, chord, tunes[form[bar // BARS]][bar % 2], step_s)]
        if bar == 0:
            upbeat = _note(_chord(tonic, mode, 1)[2] + 12, 0.4, style.attack_s)
            strokes += [(-k * style.steps, 0.25, upbeat) for k in range(1, pickup + 1)]
        for step, gain, sound in strokes:
            late_s = JITTER_S * float(np.clip(rng.standard_normal(), -2.5, 2.5))
            at = max(0, round((seconds_at(first + step / style.steps) + late_s) * RATE_HZ))
            out[at : at + sound.size] += gain * rng.uniform(0.7, 1.0) * sound[: out.size - at]
    return Piece(
        mono=(0.5 * out / np.abs(out).max()).astype(np.float32),
        beats_s=seconds_at(np.arange(n_bars * style.meter + pickup)),
        downbeats_s=seconds_at(np.arange(n_bars) * style.meter + pickup),
        meter=style.meter,
        tonic=tonic,
        mode=mode,
    )


def rubato(bpm: float, depth: float = 0.12, beats: float = 16.0) -> TempoOf:
    """A tempo that rises and falls by `depth` over so many beats."""
    return lambda at: bpm * (1 + depth * np.sin(2 * np.pi * at / beats))


def speeding_up(first_bpm: float, last_bpm: float, beats: float) -> TempoOf:
    """A tempo that changes evenly over so many beats."""
    return lambda at: first_bpm + (last_bpm - first_bpm) * np.clip(at / beats, 0.0, 1.0)


def two_tempos(first_bpm: float, second_bpm: float, change_beat: int) -> TempoOf:
    """Another tempo from a beat on."""
    return lambda at: np.where(at < change_beat, first_bpm, second_bpm)


@cache
def swells(seconds: float = 30.0, seed: int = 0) -> Floats:
    """Chords that fade into each other at uneven times, without onsets or beats; mono at RATE_HZ."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    out, at_s = np.zeros(time_s.size), 0.0
    while at_s < seconds:
        envelope = np.exp(-0.5 * ((time_s - at_s) / rng.uniform(1.2, 2.2)) ** 2)
        for pitch in 48 + rng.choice([0, 3, 5, 7, 10, 12, 15, 19], 3, replace=False):
            out += envelope * np.sin(2 * np.pi * _hz(pitch) * time_s + rng.uniform(0, 6))
        at_s += rng.uniform(2.0, 4.5)
    return np.asarray(0.3 * out / np.abs(out).max(), np.float32)


def _clock(bpm: float | TempoOf, beats: int) -> Callable[..., Doubles]:
    """Seconds at a position in beats; the first is at 0.3 s."""
    at = np.arange(0, beats + 4, 1 / 64)
    tempo = bpm(at) if callable(bpm) else np.full(at.size, bpm)
    seconds = 0.3 + np.concatenate([[0.0], np.cumsum(60.0 / tempo)[:-1] / 64])
    return lambda positions: np.interp(positions, at, seconds)


def _chord(tonic: int, mode: str, degree: int) -> list[int]:
    """The triad on a degree of the scale, MIDI; the dominant of minor is major."""
    scale, root = SCALES[mode], 48 + (tonic + 5) % 12 - 5
    chord = [root + scale[k % 7] + 12 * (k // 7) for k in (degree - 1, degree + 1, degree + 3)]
    chord[1] += mode == "minor" and degree == 5
    return chord


def _bar(style: Style, chord: list[int], tune: NDArray[np.int64], step_s: float) -> Iterator[Stroke]:
    for pattern, gain, drum in (
        (style.kick, 0.8, _kick), (style.snare, 0.5, _snare), (style.hat, 0.2, _hat)
    ):  # fmt: skip
        yield from ((step, gain, drum()) for step, _ in _strokes(pattern))
    for step, steps in _strokes(style.bass):
        pitch = chord[0 if style.bass[step] == "x" else 2] - 12
        yield step, 0.3, _note(pitch, steps * step_s, style.attack_s)
    broken = style.chords.count("x") == len(style.chords)
    for k, (step, steps) in enumerate(_strokes(style.chords)):
        for pitch in [chord[k % 3]] if broken else chord:
            yield step, 0.12, _note(pitch + 12, steps * step_s, style.attack_s)
    for k, (step, steps) in enumerate(_strokes(style.lead)):
        pitch = (*chord, chord[0] + 12)[tune[k]] + 24
        yield step, 0.16, _note(pitch, steps * step_s, style.attack_s)


def _strokes(pattern: str) -> list[tuple[int, int]]:
    """The step of each stroke, and the steps from it to the next."""
    at = [step for step, sign in enumerate(pattern) if sign != "."]
    return list(zip(at, np.diff([*at, len(pattern)]).tolist(), strict=True)) if at else []


def _hz(pitch: float) -> float:
    return float(440.0 * 2 ** ((pitch - 69) / 12))


@cache
def _note(pitch: int, seconds: float, attack_s: float) -> Doubles:
    time_s = np.arange(max(64, round(seconds * RATE_HZ))) / RATE_HZ
    f = _hz(pitch)
    partials = sum(np.sin(2 * np.pi * f * k * time_s) / k**1.4 for k in range(1, 8) if f * k < 9000)
    edges = np.minimum(1.0, time_s / attack_s) * np.minimum(1.0, (time_s[-1] - time_s) / 0.02)
    return np.asarray(partials * np.exp(-time_s / 0.7) * edges)


@cache
def _kick() -> Doubles:
    time_s = np.arange(round(0.2 * RATE_HZ)) / RATE_HZ
    sweep = 50 * time_s + 5 * (1 - np.exp(-time_s / 0.02))
    return np.asarray(np.sin(2 * np.pi * sweep) * np.exp(-time_s / 0.06))


@cache
def _snare() -> Doubles:
    time_s = np.arange(round(0.15 * RATE_HZ)) / RATE_HZ
    hiss = np.random.default_rng(1).standard_normal(time_s.size)
    return np.asarray((0.5 * hiss + np.sin(2 * np.pi * 190 * time_s)) * np.exp(-time_s / 0.04))


@cache
def _hat() -> Doubles:
    time_s = np.arange(round(0.06 * RATE_HZ)) / RATE_HZ
    hiss = np.random.default_rng(2).standard_normal(time_s.size)
    return np.asarray(np.diff(hiss, prepend=0.0) * np.exp(-time_s / 0.012))
