"""The search for a way through the beats that has the asked length.

A way plays beats in order and at some edges jumps to another, never within `min_segment` beats of the
last jump. Among the ways of one length from a start to an end:

- temperature 0 takes the best: few joins of high score (as the retargeting of Wenner et al. 2013).
- a temperature T > 0 draws by chance. At every edge the music goes on or jumps, with a probability
  of exp(-1/T) where the joins are as good as the track has them and less elsewhere, to a target of
  weight exp(score / T), given that the way has the asked length and end (see `lattice`). A way with no
  join from the track's start is a copy and not taken if there are others.

Of DRAWS ways one of the better half is taken: those that repeat themselves least and join best.

Only joins pass that are among the track's best (GATES). The gate opens further if no way of that length
exists, or so few that seeds would often give the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.engines.remix.analysis import Analysis
from pipeline.engines.remix.lattice import Doubles, Moves, pick, walk, weigh, weight_of_start
from pipeline.errors import EngineFailure

GATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # share of all possible joins that may be used
VARIED_GATE = 0.1  # to which the gate opens for the sake of variety
LEAST_SIMILARITY = 0.15  # of a join, at any gate but the last
TARGETS = 16  # most targets kept per edge
LAST_TARGETS = 64  # at the last gate
REFERENCE = 0.01  # share of the joins that count as "as good as the track has them"
SCORE_WEIGHT = 8.0  # in the exponent, at temperature 1
JOIN_PRICE = 2.0  # at temperature 0: two joins without a fault cost as much as one of score 0
FROZEN = 0.01  # temperatures up to here are 0
DRAWS = 32
VARIED = 26  # different ways among the draws that are variety enough
SECTION_START = 1.25  # weight at temperature 1 of starting at some section, against 1 of the track's start
PICKUP = -4.0  # log weight of starting some beats before a downbeat, which can let the ending land
END_SILENCE_S = 0.35  # most silence after an ending
LANDING_S = 0.05  # by which an ending may miss that, and its dying away
RESERVE = 0.1  # most, of the beats planned, where their length varies
RECENT_BARS = 16  # repeating what was heard this long ago counts as repetition
WORST_WEIGHT, REPEAT_WEIGHT = 0.5, 1.0  # in the choice between the ways drawn


@dataclass(frozen=True)
class Way:
    """What to play: from `start_s` of the source, leaving at the first edge of each join for the second."""

    start_s: float
    joins: tuple[tuple[int, int], ...]
    ends: bool  # it plays the track's own ending; else its last seconds must be faded

    @property
    def copies(self) -> bool:
        """Whether it only plays the track from its start."""
        return not self.joins and self.start_s == 0.0


@dataclass(frozen=True)
class _Start:
    edge: int
    n_beats: int  # to play from there
    log_weight: float


def find(track: Analysis, duration_s: float, *, temperature: float, min_segment: int, seed: int) -> Way:
    """The way of that length; a function of its arguments alone.

    Raises:
        EngineFailure: there is none; no track of two bars or more is known to have none.
    """
    rng = np.random.default_rng(seed) if temperature > FROZEN else None
    ending_s = track.duration_s - track.spare_tail_s
    copy = Way(0.0, (), ends=duration_s >= ending_s)
    if rng is None and duration_s <= track.duration_s and (copy.ends or not track.ends):
        return copy
    min_segment = max(1, min(min_segment, track.n_beats // 3))
    found: Way | None = None
    for ends, gate in _attempts(track.ends, rng is not None):
        if found is not None and (gate > VARIED_GATE or found.ends != ends):
            break
        moves = _moves(track, gate, temperature, min_segment)
        ways = _draw(track, duration_s, moves, rng, ends=ends, temperature=temperature)
        if rng is not None and gate <= VARIED_GATE:
            ways = [way for way in ways if not way[1].copies]
        found = _choose(ways, rng) or found
        if found is not None and (rng is None or len({way for _, way in ways}) >= VARIED):
            break
    if found is None:
        raise EngineFailure(f"found no way to make {duration_s:.1f} s of a track of {track.duration_s:.1f} s")
    return found


def _attempts(has_ending: bool, drawn: bool) -> list[tuple[bool, float]]:
    """(to the track's own ending, gate), in the order they are tried."""
    usable = [gate for gate in GATES if drawn or gate >= VARIED_GATE]
    return [(True, gate) for gate in usable if has_ending and gate <= VARIED_GATE] + [
        (False, gate) for gate in usable
    ]


def _moves(track: Analysis, gate: float, temperature: float, min_segment: int) -> Moves:
    """What may be played at each edge, through this gate."""
    n_joins = int(np.isfinite(track.scores).sum())
    scores = track.scores.copy()
    scores[:, track.n_beats - min_segment + 1 :] = -np.inf  # no room for a segment
    if gate < GATES[-1]:
        scores[track.similarities < LEAST_SIMILARITY] = -np.inf
    known = np.sort(scores[np.isfinite(scores)])[::-1].astype(np.float64)
    n_targets = min(TARGETS if gate < GATES[-1] else LAST_TARGETS, scores.shape[1])
    targets = np.argsort(-scores, axis=1, kind="stable")[:, :n_targets]
    kept = np.take_along_axis(scores, targets, axis=1).astype(np.float64)
    if known.size == 0:
        return Moves(np.zeros(len(scores)), targets, kept, min_segment)
    kept[kept < known[min(max(round(gate * n_joins), 1), known.size) - 1]] = -np.inf
    if temperature <= FROZEN:
        return Moves(np.zeros(len(scores)), targets, kept - JOIN_PRICE, min_segment)
    exponent = SCORE_WEIGHT / temperature * (kept - known[min(int(REFERENCE * n_joins), known.size - 1)])
    total = np.logaddexp.reduce(exponent, axis=1, keepdims=True)
    leave = -1.0 / temperature + np.minimum(total, 0.0)  # log of the probability of jumping here
    jump = np.full_like(exponent, -np.inf)
    np.subtract(exponent + leave, total, out=jump, where=np.isfinite(total))
    return Moves(np.log1p(-np.exp(leave[:, 0])), targets, jump, min_segment)


def _starts(track: Analysis, duration_s: float, ends: bool, temperature: float) -> list[_Start]:
    """Every start from which the length can come out."""
    beat_s = float(np.median(np.diff(track.edges_s)))
    tail_s = track.duration_s - float(track.edges_s[-1])
    out = []
    for edge, weight in _start_edges(track, ends, temperature):
        wanted_s = duration_s - (float(track.edges_s[0]) if edge == 0 else 0.0)
        if ends:
            least = (wanted_s - tail_s - END_SILENCE_S) / beat_s
            most = (wanted_s - tail_s + track.spare_tail_s) / beat_s
            lengths = range(max(0, int(np.ceil(least))), int(np.floor(most)) + 1)
        else:
            n_beats = max(0, int(np.ceil(wanted_s / beat_s * _reserve(track) - 0.5)))
            lengths = range(n_beats, n_beats + 1)
        out += [_Start(edge, n_beats, weight) for n_beats in lengths]
    return out


def _reserve(track: Analysis) -> float:
    """Factor for the beats planned, so that enough are left where their length varies; 1: an even grid."""
    beats_s = np.diff(track.edges_s)
    return 1.0 + RESERVE * min(1.0, float(beats_s.std() / beats_s.mean()) / RESERVE)


def _lands(track: Analysis, duration_s: float, start: _Start, joins: tuple[tuple[int, int], ...]) -> bool:
    """Whether the track's ending comes out in time, with the beats as long as they are."""
    lead_s = 0.0 if start.edge else float(track.edges_s[0])
    points = [start.edge, *(edge for join in joins for edge in join), track.n_beats]
    played_s = float(np.diff(track.edges_s[points])[::2].sum())
    missing_s = duration_s - lead_s - played_s - (track.duration_s - float(track.edges_s[-1]))
    return -track.spare_tail_s - LANDING_S <= missing_s <= END_SILENCE_S + LANDING_S


def _start_edges(track: Analysis, ends: bool, temperature: float) -> list[tuple[int, float]]:
    """Edges to start at and their log weights: the track's start, sections, and pickups to both."""
    edges = [(0, 0.0)]
    if temperature > FROZEN and track.sections:
        weight = float(np.log(SECTION_START * temperature / len(track.sections)))
        edges += [(edge, weight) for edge in track.sections]
    if ends:
        bars = [(track.meter, 0.0), *edges[1:]]
        edges += [(edge - k, weight + PICKUP) for edge, weight in bars for k in range(1, track.meter)]
    return edges


def _draw(
    track: Analysis,
    duration_s: float,
    moves: Moves,
    rng: np.random.Generator | None,
    *,
    ends: bool,
    temperature: float,
) -> list[tuple[float, Way]]:
    """The best way, or DRAWS drawn ones, with their faults; none if there is none."""
    starts = _starts(track, duration_s, ends, temperature)
    if not starts:
        return []
    last = np.full(track.n_beats + 1, -np.inf)
    last[-1 if ends else slice(0, -1)] = 0.0  # before the last beat there is sound left for what is missing
    table = weigh(moves, last, max(start.n_beats for start in starts), best=rng is None)
    weights: Doubles = np.array(
        [start.log_weight + weight_of_start(table, moves, start.edge, start.n_beats) for start in starts]
    )
    if not np.isfinite(weights).any():
        return []
    ways = []
    for _ in range(DRAWS if rng else 1):
        start = starts[pick(weights, rng)]
        joins = walk(table, moves, start.edge, start.n_beats, rng)
        start_s = float(track.edges_s[start.edge]) if start.edge else 0.0
        if ends and not _lands(track, duration_s, start, joins):
            continue
        ways.append((_fault(track, start, joins), Way(start_s, joins, ends)))
    return ways


def _choose(ways: list[tuple[float, Way]], rng: np.random.Generator | None) -> Way | None:
    """One of the better half of those that start and join as often as the first, which chance decided."""
    if not ways:
        return None
    first = ways[0][1]
    rivals = [
        item for item in ways if item[1].start_s == first.start_s and len(item[1].joins) == len(first.joins)
    ]
    rivals.sort(key=lambda item: item[0])
    better = rivals[: (len(rivals) + 1) // 2]
    return better[0 if rng is None else int(rng.integers(len(better)))][1]


def _fault(track: Analysis, start: _Start, joins: tuple[tuple[int, int], ...]) -> float:
    """What is wrong with a way: mean and worst join, and the share of beats heard again too soon."""
    if not joins:
        return 0.0
    lost = 1.0 - np.array([track.scores[join] for join in joins])
    recent = RECENT_BARS * max(track.meter, 4)
    last_heard: dict[int, int] = {}
    again = 0
    for at, beat in enumerate(_beats(start, joins)):
        again += at - last_heard.get(beat, -recent - 1) <= recent
        last_heard[beat] = at
    repeated = again / max(start.n_beats, 1)
    return float(lost.mean() + WORST_WEIGHT * lost.max() + REPEAT_WEIGHT * repeated)


def _beats(start: _Start, joins: tuple[tuple[int, int], ...]) -> list[int]:
    """The source beat heard in each beat."""
    beats: list[int] = []
    edge = start.edge
    for leave, enter in joins:
        beats += range(edge, leave)
        edge = enter
    return beats + list(range(edge, edge + start.n_beats - len(beats)))
