"""The search for a way through the beats that has the asked length.

A way plays beats in order and at some edges jumps to another, never within `min_segment` beats of the last
jump. Among all ways of one length from one start to one end:

- temperature 0 takes the best: the fewest joins, and of those the best scores (Viterbi, as the retargeting of
  Wenner et al. 2013).
- a temperature T > 0 draws one by chance. At every edge the music goes on, or it jumps, with a probability of exp(-1/T)
  where the joins are as good as the track has them and less elsewhere, to a target drawn by
  exp(score / T). The draw is exact under the condition that the way has the asked length and end: weights are
  summed backwards from the end, then a way is drawn forwards (forward filtering, backward sampling: Carter and
  Kohn 1994, with time reversed). Of DRAWS ways the one that repeats itself least and joins best is taken.

Only joins pass that are among the track's best (GATES); the gate opens further only if no way of that
length exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.remix.analysis import Analysis

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]

GATES = (0.03, 0.1, 0.3, 1.0)  # share of all possible joins that may be used
TARGETS = 16  # most targets kept per edge
REFERENCE = 0.005  # share of the joins that count as "as good as the track has them"
SCORE_WEIGHT = 8.0  # in the exponent, at temperature 1
FROZEN = 0.01  # temperatures from here on down are 0
DRAWS = 16
SECTION_START = 0.3  # probability at temperature 1 that a way starts at a section and not at the start
LATE_START = -5.0  # log weight of a start off the downbeat, which may be what lets the end land
END_SILENCE_S = 0.35  # most silence after an ending
RECENT_BARS = 16  # repeating what was heard this long ago counts as repetition
WORST_WEIGHT, REPEAT_WEIGHT = 0.5, 1.0  # in the choice between the ways drawn


@dataclass(frozen=True)
class Way:
    """What to play: from `start_s` of the source, leaving at the first edge of each join for the second."""

    start_s: float
    joins: tuple[tuple[int, int], ...]
    ends: bool  # it plays the track's own ending; else its last seconds must be faded


@dataclass(frozen=True, eq=False)
class Options:
    """What can be done at each edge: log weights."""

    go_on: Doubles  # (edges,)
    targets: Indices  # (edges, TARGETS)
    jump: Doubles  # (edges, TARGETS), -inf: no such target
    min_segment: int


def find(track: Analysis, duration_s: float, *, temperature: float, min_segment: int, seed: int) -> Way:
    """The way of that length; a function of its arguments alone."""
    rng = np.random.default_rng(seed) if temperature > FROZEN else None
    min_segment = max(1, min(min_segment, track.n_beats // 3))
    if rng is None and duration_s <= track.duration_s and not (
        track.ends and duration_s < track.duration_s - track.spare_tail_s
    ):
        return Way(0.0, (), ends=duration_s >= track.duration_s - track.spare_tail_s)
    attempts = [(True, gate) for gate in GATES[:2] if track.ends] + [(False, gate) for gate in GATES]
    for ends, gate in attempts:
        options = _options(track, gate, temperature if rng else 0.0, min_segment)
        way = _search(track, duration_s, options, ends, temperature, rng)
        if way is not None:
            return way
    raise AssertionError("the last gate lets every length pass")


def _options(track: Analysis, gate: float, temperature: float, min_segment: int) -> Options:
    scores = track.scores.astype(np.float64)
    scores[:, track.n_beats - min_segment + 1 :] = -np.inf  # no room for a segment
    known = np.sort(scores[np.isfinite(scores)])[::-1]
    n_targets = min(TARGETS if gate < 1.0 else track.n_beats, scores.shape[1])
    targets = np.argsort(-scores, axis=1, kind="stable")[:, :n_targets]
    best = np.take_along_axis(scores, targets, axis=1)
    if known.size:
        best[best < known[max(0, int(gate * known.size) - 1)]] = -np.inf
    if temperature <= FROZEN:
        return Options(np.zeros(len(scores)), targets, best - 3.0, min_segment)
    reference = known[int(REFERENCE * known.size)] if known.size else 0.0
    exponent = SCORE_WEIGHT / temperature * (best - reference)
    total = np.logaddexp.reduce(exponent, axis=1, keepdims=True)
    leave = -1.0 / temperature + np.minimum(total, 0.0)  # log of the probability of jumping here
    with np.errstate(invalid="ignore"):
        jump = np.where(np.isfinite(total), exponent - total + leave, -np.inf)
    return Options(np.log1p(-np.exp(leave[:, 0])), targets, jump, min_segment)


def _search(
    track: Analysis, duration_s: float, options: Options, ends: bool, temperature: float, rng: np.random.Generator | None
) -> Way | None:
    """The best or a drawn way, None if there is none."""
    starts = _starts(track, duration_s, ends, temperature if rng else 0.0)
    if not starts:
        return None
    last = np.full(track.n_beats + 1, -np.inf)
    last[-1 if ends else slice(0, -1)] = 0.0
    table = _weights(options, last, max(length for _, length, _ in starts), exact=rng is None)
    weights = np.array([w + _start_weight(table, options, edge, length) for edge, length, w in starts])
    if not np.isfinite(weights).any():
        return None
    ways = []
    for _ in range(DRAWS if rng else 1):
        edge, length, _ = starts[_pick(weights, rng)]
        joins = _walk(table, options, edge, length, rng)
        start_s = float(track.edges_s[edge]) if edge else 0.0
        ways.append((_fault(track, edge, length, joins), Way(start_s, joins, ends)))
    return min(ways, key=lambda item: item[0])[1]


def _starts(track: Analysis, duration_s: float, ends: bool, temperature: float) -> list[tuple[int, int, float]]:
    """(edge, beats to play, log weight) of every start from which the length can come out."""
    beat_s = float(np.median(np.diff(track.edges_s)))
    out = []
    tail_s = track.duration_s - float(track.edges_s[-1])
    chance = SECTION_START * min(temperature, 2.0) / max(1, len(track.sections))
    candidates = [(0, 0.0)]
    if temperature > FROZEN:
        candidates += [(edge, float(np.log(chance))) for edge in track.sections]
    candidates += [(edge, LATE_START) for edge in range(1, track.meter) if ends]
    for edge, weight in candidates:
        lead_s = float(track.edges_s[0]) if edge == 0 else 0.0
        if not ends:
            out.append((edge, max(0, int(np.ceil((duration_s - lead_s) / beat_s - 0.5))), weight))
            continue
        low = (duration_s - lead_s - tail_s - END_SILENCE_S) / beat_s
        high = (duration_s - lead_s - tail_s + track.spare_tail_s) / beat_s
        out += [(edge, n, weight) for n in range(max(0, int(np.ceil(low))), int(np.floor(high)) + 1)]
    return out


def _weights(options: Options, last: Doubles, length: int, *, exact: bool) -> Doubles:
    """Log weight of all ways (of the best way, if exact) to the end, (beats left, edge)."""
    join = np.maximum.reduce if exact else np.logaddexp.reduce
    table = np.full((length + 1, last.size), -np.inf)
    table[0] = last
    landing = np.minimum(options.targets + options.min_segment, last.size - 1)
    for left in range(1, length + 1):
        ways = np.full((last.size, options.targets.shape[1] + 1), -np.inf)
        ways[:-1, 0] = options.go_on[:-1] + table[left - 1, 1:]
        if left >= options.min_segment:
            ways[:, 1:] = options.jump + table[left - options.min_segment][landing]
        table[left] = join(ways, axis=1)
    return table


def _start_weight(table: Doubles, options: Options, edge: int, length: int) -> float:
    played = min(options.min_segment, length)
    return float(table[length - played, edge + played]) if edge + played < table.shape[1] else -np.inf


def _walk(
    table: Doubles, options: Options, edge: int, length: int, rng: np.random.Generator | None
) -> tuple[tuple[int, int], ...]:
    """The joins of a way drawn from the table, or of the best."""
    played = min(options.min_segment, length)
    edge, left = edge + played, length - played
    joins = []
    while left > 0:
        choices = np.full(options.targets.shape[1] + 1, -np.inf)
        if edge + 1 < table.shape[1]:
            choices[0] = options.go_on[edge] + table[left - 1, edge + 1]
        if left >= options.min_segment:
            landing = np.minimum(options.targets[edge] + options.min_segment, table.shape[1] - 1)
            choices[1:] = options.jump[edge] + table[left - options.min_segment, landing]
        choice = _pick(choices, rng)
        if choice == 0:
            edge, left = edge + 1, left - 1
        else:
            target = int(options.targets[edge, choice - 1])
            joins.append((edge, target))
            edge, left = target + options.min_segment, left - options.min_segment
    return tuple(joins)


def _pick(log_weights: Doubles, rng: np.random.Generator | None) -> int:
    """The heaviest, or one drawn by weight."""
    if rng is None:
        return int(np.argmax(log_weights))
    shares = np.cumsum(np.exp(log_weights - log_weights.max()))
    return min(int(np.searchsorted(shares, rng.random() * shares[-1], side="right")), shares.size - 1)


def beats_of(edge: int, length: int, joins: tuple[tuple[int, int], ...]) -> Indices:
    """The source beat heard in each of `length` beats."""
    runs, left = [], length
    for leave, enter in joins:
        runs.append(np.arange(edge, leave))
        left -= leave - edge
        edge = enter
    runs.append(np.arange(edge, edge + left))
    return np.concatenate(runs)


def _fault(track: Analysis, edge: int, length: int, joins: tuple[tuple[int, int], ...]) -> float:
    """What is wrong with a way: mean and worst join, and the share of beats heard again too soon."""
    if not joins:
        return 0.0
    lost = 1.0 - np.array([track.scores[join] for join in joins])
    beats = beats_of(edge, length, joins)
    recent = RECENT_BARS * max(track.meter, 4)
    again = [beat in set(beats[max(0, at - recent) : at].tolist()) for at, beat in enumerate(beats.tolist())]
    return float(lost.mean() + WORST_WEIGHT * lost.max()) + REPEAT_WEIGHT * float(np.mean(again))
