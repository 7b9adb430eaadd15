"""The lattice of (beats left, edge) on which ways through a track are weighed and drawn.

At an edge the music goes on to the next, or jumps to a target and plays `min_segment` beats from there:
counting those with the jump keeps two joins apart without a third dimension. Weights are logs. Summed
backwards from the end they give, at every point, the weight of all that can still follow, and a way drawn
forwards by them is an exact draw among all ways of that length and end (forward filtering, backward
sampling, Carter and Kohn 1994, with time reversed). With the maximum for the sum the same
recursion finds the best way (Viterbi).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Moves:
    """What can be done at each edge."""

    go_on: Doubles  # (edges,), log weights
    targets: Indices  # (edges, targets), edges that leave room for min_segment beats wherever jump is finite
    jump: Doubles  # (edges, targets), log weights, -inf: never
    min_segment: int  # beats


def weigh(moves: Moves, last: Doubles, n_beats: int, *, best: bool) -> Doubles:
    """Log weight of all ways to the end (of the best way, if `best`), (n_beats + 1 beats left, edges).

    `last`, (edges,), is the weight of ending there.
    """
    join = np.maximum.reduce if best else np.logaddexp.reduce
    table = np.full((n_beats + 1, last.size), -np.inf)
    table[0] = last
    landing = _landing(moves, slice(None))
    ways = np.full((last.size, landing.shape[1] + 1), -np.inf)
    for left in range(1, n_beats + 1):
        ways[:-1, 0] = moves.go_on[:-1] + table[left - 1, 1:]
        if left >= moves.min_segment:
            ways[:, 1:] = moves.jump + table[left - moves.min_segment][landing]
        table[left] = join(ways, axis=1)
    return table


def weight_of_start(table: Doubles, moves: Moves, edge: int, n_beats: int) -> float:
    """Log weight of all ways of n_beats from there; the first segment has its least length as well."""
    played = min(moves.min_segment, n_beats)
    return float(table[n_beats - played, edge + played]) if edge + played < table.shape[1] else -np.inf


def walk(
    table: Doubles, moves: Moves, edge: int, n_beats: int, rng: np.random.Generator | None
) -> tuple[tuple[int, int], ...]:
    """The joins (edge left, edge entered) of a way drawn from the table; of the best without `rng`."""
    played = min(moves.min_segment, n_beats)
    edge, left = edge + played, n_beats - played
    joins = []
    choices = np.full(moves.targets.shape[1] + 1, -np.inf)
    while left > 0:
        choices[:] = -np.inf
        if edge + 1 < table.shape[1]:
            choices[0] = moves.go_on[edge] + table[left - 1, edge + 1]
        if left >= moves.min_segment:
            choices[1:] = moves.jump[edge] + table[left - moves.min_segment, _landing(moves, edge)]
        choice = pick(choices, rng)
        if choice == 0:
            edge, left = edge + 1, left - 1
        else:
            target = int(moves.targets[edge, choice - 1])
            joins.append((edge, target))
            edge, left = target + moves.min_segment, left - moves.min_segment
    return tuple(joins)


def _landing(moves: Moves, edges: int | slice) -> Indices:
    """Where a jump's first segment ends; those without room have no weight, so any edge will do."""
    landing = moves.targets[edges] + moves.min_segment
    return np.asarray(np.minimum(landing, moves.targets.shape[0] - 1))


def pick(log_weights: Doubles, rng: np.random.Generator | None) -> int:
    """The index of one drawn by weight; of the heaviest without `rng`."""
    if rng is None:
        return int(np.argmax(log_weights))
    shares = np.cumsum(np.exp(log_weights - log_weights.max()))
    return min(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")), shares.size - 1)
