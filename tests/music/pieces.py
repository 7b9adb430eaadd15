"""Synthesized pieces of music whose beats, bar lines, meter and key are known.

A style says what each instrument plays in a bar, in steps; a beat has four steps where it is divided evenly
and three where it swings or is dotted (6/8: a bar of two beats, each a dotted quarter). Strokes are up to
10 ms early or late and of uneven strength, as played.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.music.spectra import RATE_HZ

Doubles = NDArray[np.float64]
TempoOf = Callable[[Doubles], Doubles]  # beats per minute at a position in beats

TONICS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
# Degrees of the chords of four bars
CHORDS = {"major": {"A": (1, 6, 4, 5), "B": (4, 1, 2, 5)}, "minor": {"A": (1, 6, 4, 5), "B": (4, 1, 7, 5)}}
JITTER_S = 0.004  # standard deviation of a stroke's time


@dataclass(frozen=True)
class Style:
    """Patterns of one bar: x a stroke, . none; the bass plays the chord's root (x) or fifth (5)."""

    meter: int
    steps: int  # a beat
    kick: str = ""
    snare: str = ""
    hat: str = ""
    bass: str = ""
    chords: str = ""
    lead: str = ""
    attack_s: float = 0.004
    decay_s: float = 0.8


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

    mono: NDArray[np.float32]  # (samples,) at RATE_HZ
    beats_s: Doubles
    downbeats_s: Doubles
    sections_s: Doubles  # starts of the sections, without the first
    meter: int
    key: str  # such as "F# minor"


@cache
def play(
    style_name: str,
    bpm: float | TempoOf = 120.0,
    *,
    tonic: int = 0,
    mode: str = "major",
    form: str = "AABBA",
    pickup: int = 0,
    lead_in_s: float = 0.3,
    seed: int = 0,
) -> Piece:
    """Four bars a letter of the form, after `pickup` beats of the melody alone and a silence before them."""
    style, rng = STYLES[style_name], np.random.default_rng(seed)
    per_bar = style.meter * style.steps
    n_bars = 4 * len(form)
    seconds_at = _clock(bpm, n_bars * style.meter + pickup, lead_in_s)
    out = np.zeros(int((seconds_at(np.array([n_bars * style.meter + pickup]))[0] + 1.5) * RATE_HZ))

    def stroke(step: float, sound: Doubles, gain: float) -> None:
        at_s = seconds_at(np.array([step / style.steps + pickup]))[0] + JITTER_S * float(
            np.clip(rng.standard_normal(), -2.5, 2.5)
        )
        first = max(0, round(at_s * RATE_HZ))
        kept = sound[: max(0, out.size - first)]
        out[first : first + kept.size] += gain * rng.uniform(0.7, 1.0) * kept

    scale, root = np.array(SCALES[mode]), 48 + (tonic + 5) % 12 - 5
    tunes = {letter: rng.integers(-1, 4, (2, per_bar)) for letter in "AB"}
    for beat in range(-pickup, 0):
        stroke(beat * style.steps, _note(root + 12 + int(scale[4]), 0.4, style.attack_s, style.decay_s), 0.25)
    for bar in range(n_bars):
        letter = form[bar // 4]
        degree = CHORDS[mode][letter][bar % 4] - 1
        raised = mode == "minor" and degree == 4  # the dominant of minor is major
        chord = [root + int(scale[(degree + k) % 7]) + 12 * ((degree + k) // 7) for k in (0, 2, 4)]
        chord[1] += raised
        if bar == n_bars - 1 or (bar % 8 == 7 and bar // 4 + 1 < len(form) and bar % 16 == 15):
            chord = [root + int(scale[k]) for k in (0, 2, 4)]
        for name in ("kick", "snare", "hat"):
            for step in _strokes(getattr(style, name)):
                sound = {"kick": _kick, "snare": _snare, "hat": _hat}[name]()
                stroke(bar * per_bar + step, sound, {"kick": 0.8, "snare": 0.5, "hat": 0.2}[name])
        beat_s = float(np.diff(seconds_at(np.array([0.0, 1.0]) + pickup + bar * style.meter))[0])
        step_s = beat_s / style.steps
        for step in _strokes(style.bass):
            pitch = chord[0 if style.bass[step] == "x" else 2] - 24
            length_s = _gap(style.bass, step) * step_s
            stroke(bar * per_bar + step, _note(pitch + 12, length_s, style.attack_s, 0.6), 0.3)
        for k, step in enumerate(_strokes(style.chords)):
            arpeggio = style.chords.count("x") == per_bar
            length_s = _gap(style.chords, step) * step_s
            for pitch in [chord[k % 3]] if arpeggio else chord:
                stroke(bar * per_bar + step, _note(pitch + 12, length_s, style.attack_s, style.decay_s), 0.12)
        for k, step in enumerate(_strokes(style.lead)):
            move = int(tunes[letter][bar % 2, k])
            pitch = chord[move % 3] + 24 + (12 if move > 2 else 0)
            if step % style.steps and move == -1:
                pitch = root + 24 + int(scale[(degree + 1) % 7])
            stroke(
                bar * per_bar + step,
                _note(pitch, _gap(style.lead, step) * step_s, style.attack_s, style.decay_s),
                0.16,
            )
    beats = np.arange(-pickup, n_bars * style.meter) + pickup
    bars = np.arange(n_bars) * style.meter + pickup
    changes = [k for k in range(1, len(form)) if form[k] != form[k - 1]]
    return Piece(
        (0.5 * out / np.abs(out).max()).astype(np.float32),
        seconds_at(beats),
        seconds_at(bars),
        seconds_at(np.array(changes) * 4 * style.meter + pickup),
        style.meter,
        f"{TONICS[tonic]} {mode}",
    )


def rubato(bpm: float, depth: float = 0.12, beats: float = 16.0) -> TempoOf:
    """A tempo that swells and slackens by `depth` over so many beats."""
    return lambda at: bpm * (1 + depth * np.sin(2 * np.pi * at / beats))


def speeding_up(first_bpm: float, last_bpm: float, beats: float) -> TempoOf:
    """A tempo that changes evenly over so many beats."""
    return lambda at: first_bpm + (last_bpm - first_bpm) * np.clip(at / beats, 0.0, 1.0)


def two_tempos(first_bpm: float, second_bpm: float, change_beat: int) -> TempoOf:
    """Another tempo from a beat on."""
    return lambda at: np.where(at < change_beat, first_bpm, second_bpm)


@cache
def swells(seconds: float = 30.0, seed: int = 0) -> NDArray[np.float32]:
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


def _clock(bpm: float | TempoOf, beats: int, lead_in_s: float) -> Callable[[Doubles], Doubles]:
    """Seconds at a position in beats."""
    at = np.arange(0, beats + 4, 1 / 64)
    tempo = bpm(at) if callable(bpm) else np.full(at.size, bpm)
    seconds = lead_in_s + np.concatenate([[0.0], np.cumsum(60.0 / tempo)[:-1] / 64])
    return lambda positions: np.interp(positions, at, seconds)


def _strokes(pattern: str) -> list[int]:
    return [k for k, sign in enumerate(pattern) if sign != "."]


def _gap(pattern: str, step: int) -> int:
    """Steps to the next stroke."""
    later = [k for k in _strokes(pattern + pattern[:1].replace(".", "x")) if k > step]
    return (later[0] if later else len(pattern)) - step


def _hz(pitch: float) -> float:
    return float(440.0 * 2 ** ((pitch - 69) / 12))


@cache
def _note(pitch: int, seconds: float, attack_s: float, decay_s: float) -> Doubles:
    time_s = np.arange(max(64, round(seconds * RATE_HZ))) / RATE_HZ
    f = _hz(pitch)
    partials = sum(np.sin(2 * np.pi * f * k * time_s) / k**1.4 for k in range(1, 8) if f * k < 9000)
    edges = np.minimum(1.0, time_s / attack_s) * np.minimum(1.0, (time_s[-1] - time_s) / 0.02)
    return np.asarray(partials * np.exp(-time_s / decay_s) * edges)


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
