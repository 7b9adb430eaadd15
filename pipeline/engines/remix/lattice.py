"""The lattice of (intervals left, point) on which paths through a track are weighed and drawn.

Points are where a track may be cut; they are evenly spaced, and lengths count the intervals between them. A
path is a sequence of segments. A segment begins where the path starts or a join enters, and ends where the
next join leaves. Weights are logarithms: of a segment by its length, and of a join. Summed backwards from the
end, they give at every point the total weight of all possible continuations, and a path drawn forwards by
these totals is an exact sample of all paths of that length and end: forward filtering, backward sampling
(Carter and Kohn 1994) with time reversed, for a semi-Markov model with explicit durations (Rabiner 1989,
section IV D). With the maximum in place of the sum, the same recursion finds the best path (Viterbi).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.music.spectra import Doubles

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Moves:
    """What a path may consist of; log weights, -inf: never."""

    segments: Doubles  # (longest + 1,): of a segment between joins, by its length
    last: Doubles  # (longest + 1,): of the last segment
    targets: Indices  # (points, targets): points that may be entered
    joins: Doubles  # (points, targets)


@dataclass(frozen=True, eq=False)
class Lattice:
    """Log weights of all paths to the end, or of the best one; (intervals left + 1, points) each."""

    moves: Moves
    entered: Doubles  # after a segment has begun at the point
    left: Doubles  # before a join leaves the point
    final: Doubles  # (points,): of ending at each point


def weigh(moves: Moves, final: Doubles, n_intervals: int, *, best: bool) -> Lattice:
    """The lattice of the paths of up to n_intervals; `final` is the log weight of ending at each point."""
    combine = np.maximum.reduce if best else np.logaddexp.reduce
    entered, left = np.full((2, n_intervals + 1, final.size), -np.inf)
    lattice = Lattice(moves, entered, left, final)
    everywhere = np.arange(final.size)
    for n in range(1, n_intervals + 1):
        entered[n] = combine(_segments(lattice, n, everywhere), axis=1)
        left[n] = combine(moves.joins + entered[n][moves.targets], axis=1)
    return lattice


def draw_joins(
    lattice: Lattice, point: int, n_intervals: int, rng: np.random.Generator | None
) -> tuple[tuple[int, int], ...]:
    """The joins (point left, point entered) of a drawn path from a point; of the best path without `rng`."""
    moves, n = lattice.moves, n_intervals
    joins: list[tuple[int, int]] = []
    while True:
        options = _segments(lattice, n, np.array([point]))[0]
        length = draw_index(options, rng)
        if length == options.size - 1:
            return tuple(joins)
        leave, n = point + length, n - length
        weights = moves.joins[leave] + lattice.entered[n][moves.targets[leave]]
        point = int(moves.targets[leave, draw_index(weights, rng)])
        joins.append((leave, point))


def _segments(lattice: Lattice, n: int, points: Indices) -> Doubles:
    """Log weights of the segments from each point with n intervals left, (points, longest + 2).

    By length, each with all that may follow it; in the last column those that are the path's last.
    """
    moves, n_points = lattice.moves, lattice.final.size
    lengths = np.arange(min(moves.segments.size, n))
    ends = points[:, None] + lengths
    inside = ends < n_points
    options = np.full((points.size, lengths.size + 1), -np.inf)
    follow = lattice.left[n - lengths, np.where(inside, ends, 0)]
    options[:, :-1] = np.where(inside, moves.segments[lengths] + follow, -np.inf)
    if n < moves.last.size:
        end = points + n
        options[:, -1] = np.where(
            end < n_points, moves.last[n] + lattice.final[np.minimum(end, n_points - 1)], -np.inf
        )
    return options


def draw_index(log_weights: Doubles, rng: np.random.Generator | None) -> int:
    """An index drawn by weight; the index of the largest weight without `rng`."""
    if rng is None:
        return int(np.argmax(log_weights))
    shares = np.cumsum(np.exp(log_weights - log_weights.max()))
    return min(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")), shares.size - 1)
