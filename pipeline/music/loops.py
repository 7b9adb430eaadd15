"""Loops: the passage of a piece that repeats best, near an asked length.

A loop leaves at an edge and enters at an earlier one, a whole number of bars before. Its seam is as good as
the contexts of the two edges are alike: the beats before them, and those after them (so are joins judged in
music retargeting, Wenner et al. 2013; PyMusicLooper compares the chroma of the contexts). Of all pairs of
edges the one is taken whose contexts differ least in harmony, timbre, rhythm and level, and whose distance
is near the asked length. Music without a beat has an even grid of edges and no bars.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EngineFailure
from pipeline.music import features
from pipeline.music.analysis import Piece
from pipeline.music.spectra import RATE_HZ, Doubles, Floats
from pipeline.music.splice import ALIGN_S, GUARD_S, alignment, crossfade
from pipeline.records import Audio

Indices = NDArray[np.int64]

GRID_S = 0.25  # between the edges of music without a beat
CONTEXT_S = 3.0  # to either side of the seam
# Of a beat's features: a change of chords at the seam is heard more than one of drums or timbre.
WEIGHTS = {"harmony": 0.6, "timbre": 0.2, "rhythm": 0.13, "loudness": 0.07}
LENGTH_TOLERANCE = 0.1  # of the asked length; at least half a bar
LENGTH_WEIGHT = 0.1  # cost of a length at the tolerance: 1 is the distance of two random beats
LEVEL_S = 0.25  # before both ends, whose levels are compared
LEVEL_WEIGHT = 0.05  # cost of a dB
OFF_DOWNBEAT_COST = 0.3  # as much as 6 dB: of 50 loops 2 begin off a bar line; with 0.1 14 do
ODD_BARS_COSTS = (0.0, 0.1, 0.05, 0.1)  # by the loop's bars, modulo four: phrases often have four
CROSSFADE_S, BEATLESS_CROSSFADE_S = 0.04, 0.5
LEAD_S = CROSSFADE_S + GUARD_S + ALIGN_S  # sound that must lie before the start
BEATLESS_LEAD_S = BEATLESS_CROSSFADE_S + GUARD_S + GRID_S / 2


@dataclass(frozen=True, eq=False)
class Grid:
    """Where a piece may be cut: at its beats and bars, or anywhere where it has no beat."""

    edges_s: Doubles  # (beats + 1,)
    distances: Floats  # (beats, beats), of every two beats
    meter: int  # beats a bar
    phase: int  # edge of the first downbeat

    @property
    def beat_s(self) -> float:
        return float(np.median(np.diff(self.edges_s)))

    @property
    def bar_s(self) -> float:
        return self.meter * self.beat_s


def find_grid(piece: Piece) -> Grid:
    """The piece's beats and bars, or an even grid of bars of one beat."""
    found, duration_s = piece.beats, piece.mono.size / RATE_HZ
    even = np.linspace(0.0, duration_s, max(2, round(duration_s / GRID_S)) + 1)
    edges_s = even if found.tempo_bpm is None else found.edges_s
    distances = features.beat_distances(features.beat_features(piece.spectra, edges_s), WEIGHTS)
    return Grid(edges_s, distances, found.meter, found.phase)


@dataclass(frozen=True)
class Loop:
    """A passage that repeats, in samples of the piece."""

    start: int
    stop: int
    bars: int | None  # None: the music has no beat
    similarity: float  # of the contexts of both ends: 1 the same, 0 as of two random passages
    level_step_db: float  # of the sound before the end against that before the start

    @property
    def seam(self) -> dict[str, float]:
        """The seam for the manifest."""
        return {"similarity": round(self.similarity, 3), "level_step_db": round(self.level_step_db, 2)}


def find_loop(audio: Audio, piece: Piece, length_s: float) -> Loop:
    """The best loop of about `length_s`; `piece` is the analysis of `audio`.

    Its length differs by up to LENGTH_TOLERANCE or half a bar, whichever is more. Before its start there is
    enough sound to crossfade the seam.

    Raises:
        EngineFailure: the sound is too short.
    """
    has_beat = piece.beats.tempo_bpm is not None
    grid = find_grid(piece)
    nearest_s = max(0.5 * grid.bar_s, grid.bar_s - length_s)  # at most, to a whole number of bars
    tolerance_s = max(LENGTH_TOLERANCE * length_s, nearest_s + GRID_S)
    enter, leave = _pairs(grid, length_s, tolerance_s, LEAD_S if has_beat else BEATLESS_LEAD_S)
    if not enter.size:
        raise EngineFailure(f"no loop of {length_s:.1f} s fits in {audio.duration_s:.1f} s of sound")
    contexts = _context_costs(grid, enter, leave)
    steps_db = _level_steps_db(piece, grid.edges_s[enter], grid.edges_s[leave])
    costs = contexts + LEVEL_WEIGHT * np.abs(steps_db)
    lengths_s = grid.edges_s[leave] - grid.edges_s[enter]
    costs += LENGTH_WEIGHT * np.abs(lengths_s - length_s) / tolerance_s
    if has_beat:
        costs += OFF_DOWNBEAT_COST * ((enter - grid.phase) % grid.meter != 0)
        costs += np.array(ODD_BARS_COSTS)[(leave - enter) // grid.meter % 4]
    best = int(np.argmin(costs))
    rate = audio.sample_rate
    start, stop = (round(float(grid.edges_s[edge]) * rate) for edge in (enter[best], leave[best]))
    reach_s = ALIGN_S if has_beat else GRID_S / 2
    start += alignment(audio.mono_channels, stop, start, rate, has_beat=has_beat, reach_s=reach_s)
    n_bars = int(leave[best] - enter[best]) // grid.meter if has_beat else None
    return Loop(start, stop, n_bars, 1.0 - float(contexts[best]), float(steps_db[best]))


def bar_line(piece: Piece, near_s: float) -> tuple[float, int] | None:
    """The end of the bar that ends nearest to a time, in seconds, and its number; None without a bar."""
    if piece.beats.tempo_bpm is None:
        return None
    grid = find_grid(piece)
    ends_s = grid.edges_s[grid.phase :: grid.meter][1:]
    if not ends_s.size:
        return None
    bar = int(np.argmin(np.abs(ends_s - near_s)))
    return float(ends_s[bar]), bar + 1


def cut_loop(audio: Audio, loop: Loop) -> Audio:
    """The loop alone: its end is crossfaded into what comes before its start, up to the beat."""
    rate, has_beat = audio.sample_rate, loop.bars is not None
    n_fade = round((CROSSFADE_S if has_beat else BEATLESS_CROSSFADE_S) * rate)
    guard = round(GUARD_S * rate)
    samples = audio.samples[:, loop.start : loop.stop].copy()
    end = samples.shape[1] - guard
    n_fade = min(n_fade, end // 2)
    shift = loop.start - loop.stop
    fade_at = loop.stop - guard - n_fade
    samples[:, end:] = audio.samples[:, loop.start - guard : loop.start]
    samples[:, end - n_fade : end] = crossfade(audio, fade_at, fade_at + shift, n_fade)
    return Audio(samples, rate)


def _pairs(grid: Grid, length_s: float, tolerance_s: float, lead_s: float) -> tuple[Indices, Indices]:
    """Edges to enter and to leave at, whole bars and about `length_s` apart; (pairs,) each."""
    enter, leave = np.triu_indices(grid.edges_s.size, 1)
    fits = (grid.edges_s[enter] >= lead_s) & ((leave - enter) % grid.meter == 0)
    fits &= np.abs(grid.edges_s[leave] - grid.edges_s[enter] - length_s) <= tolerance_s
    return enter[fits], leave[fits]


def _context_costs(grid: Grid, enter: Indices, leave: Indices) -> Doubles:
    """Mean distance of the beats around both edges, the nearest with the largest weight; (pairs,)."""
    reach = max(1, round(CONTEXT_S / grid.beat_s))
    n = grid.distances.shape[0]
    total, weights = np.zeros(enter.size), np.zeros(enter.size)
    for beat in range(-reach, reach):
        weight = np.exp(-0.5 * ((beat + 0.5) / (reach / 2)) ** 2)
        inside = (enter + beat >= 0) & (leave + beat < n)
        total[inside] += weight * grid.distances[enter[inside] + beat, leave[inside] + beat]
        weights[inside] += weight
    return np.asarray(total / np.maximum(weights, 1e-9))


def _level_steps_db(piece: Piece, enter_s: Doubles, leave_s: Doubles) -> Doubles:
    """How much louder it is before the end than before the start, dB; (pairs,)."""
    energy = np.concatenate([[0.0], np.cumsum(piece.mono.astype(np.float64) ** 2)])

    def level_db(from_s: Doubles, to_s: Doubles) -> Doubles:
        first, last = (np.clip(np.round(s * RATE_HZ), 0, piece.mono.size).astype(int) for s in (from_s, to_s))
        return np.asarray(10 * np.log10((energy[last] - energy[first]) / np.maximum(last - first, 1) + 1e-8))

    return level_db(leave_s - LEVEL_S, leave_s) - level_db(enter_s - LEVEL_S, enter_s)
