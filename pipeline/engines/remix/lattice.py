"""The lattice of (beats left, edge) on which paths through a track are weighed and drawn.

At an edge the music either plays on to the next edge or joins to a target and plays at least `min_segment`
beats from there. Counting these beats as part of the join keeps joins apart without a third dimension.
Weights are logarithms. Summed backwards from the end, they give at every point the total weight of all
possible continuations, and a path drawn forwards by these totals is an exact sample of all paths of that
length and end (forward filtering, backward sampling, Carter and Kohn 1994, with time reversed). With
the maximum in place of the sum, the same recursion finds the best path (Viterbi).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.music.spectra import Doubles

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Moves:
    """What may follow each edge."""

    play_on: Doubles  # (edges,), log weights
    targets: Indices  # (edges, targets): edges; min_segment beats follow them wherever `join` is finite
    join: Doubles  # (edges, targets), log weights; -inf: never
    min_segment: int  # beats


def path_weights(moves: Moves, final: Doubles, n_beats: int, *, best: bool) -> Doubles:
    """Log weight of all paths to the end, or of the best one if `best`; (n_beats + 1 beats left, edges).

    `final`, (edges,), is the log weight of ending at each edge.
    """
    combine = np.maximum.reduce if best else np.logaddexp.reduce
    table = np.full((n_beats + 1, final.size), -np.inf)
    table[0] = final
    landing = _landing(moves, slice(None))
    options = np.full((final.size, landing.shape[1] + 1), -np.inf)
    for left in range(1, n_beats + 1):
        options[:-1, 0] = moves.play_on[:-1] + table[left - 1, 1:]
        if left >= moves.min_segment:
            options[:, 1:] = moves.join + table[left - moves.min_segment][landing]
        table[left] = combine(options, axis=1)
    return table


def start_weight(table: Doubles, moves: Moves, edge: int, n_beats: int) -> float:
    """Log weight of all paths of n_beats from this edge; the first segment, too, has min_segment beats."""
    played = min(moves.min_segment, n_beats)
    return float(table[n_beats - played, edge + played]) if edge + played < table.shape[1] else -np.inf


def draw_joins(
    table: Doubles, moves: Moves, edge: int, n_beats: int, rng: np.random.Generator | None
) -> tuple[tuple[int, int], ...]:
    """The joins (edge left, edge entered) of a path drawn by the table; of the best path without `rng`."""
    played = min(moves.min_segment, n_beats)
    edge, left = edge + played, n_beats - played
    joins = []
    options = np.full(moves.targets.shape[1] + 1, -np.inf)
    while left > 0:
        options[:] = -np.inf
        if edge + 1 < table.shape[1]:
            options[0] = moves.play_on[edge] + table[left - 1, edge + 1]
        if left >= moves.min_segment:
            options[1:] = moves.join[edge] + table[left - moves.min_segment, _landing(moves, edge)]
        choice = draw_index(options, rng)
        if choice == 0:
            edge, left = edge + 1, left - 1
        else:
            target = int(moves.targets[edge, choice - 1])
            joins.append((edge, target))
            edge, left = target + moves.min_segment, left - moves.min_segment
    return tuple(joins)


def _landing(moves: Moves, edges: int | slice) -> Indices:
    """The edge min_segment beats after a join; clipped at the end, where joins are never taken."""
    landing = moves.targets[edges] + moves.min_segment
    return np.asarray(np.minimum(landing, moves.targets.shape[0] - 1))


def draw_index(log_weights: Doubles, rng: np.random.Generator | None) -> int:
    """An index drawn by weight; the index of the largest weight without `rng`."""
    if rng is None:
        return int(np.argmax(log_weights))
    shares = np.cumsum(np.exp(log_weights - log_weights.max()))
    return min(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")), shares.size - 1)
