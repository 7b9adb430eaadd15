"""The search for a path through the beats that has the asked length.

A path plays beats in order and at some edges joins to another edge; at least `min_segment` beats are played
between two joins. Among the paths of one length from a start to an end:

- temperature 0 takes the best one: few joins, with high scores (as the retargeting of Wenner et al. 2013).
- a temperature T > 0 draws. At each edge the probability of a join is exp(-1/T) where the joins are as good
  as the track's best, and lower elsewhere; a target has the weight exp(score / T). The draw is conditional
  on the asked length and end (see `lattice`). Of DRAWS paths, one of the better half is taken: those with
  the best joins and the fewest repeated beats. A copy of the track's start is not taken if there are others.

Only the best share of the track's joins may be used, the first of GATES. A larger share is tried if there is
no path of the asked length, or so few that many seeds would give the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.engines.remix.analysis import Analysis
from pipeline.engines.remix.lattice import Moves, draw_index, draw_joins, path_weights, start_weight
from pipeline.errors import EngineFailure
from pipeline.music.spectra import Doubles

Joins = tuple[tuple[int, int], ...]  # (edge left, edge entered) of each

GATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # shares of all possible joins that may be used
VARIETY_GATE = 0.1  # the largest share that is tried for the sake of variety alone
MIN_SIMILARITY = 0.15  # of a join, at all gates but the last
MAX_TARGETS, MAX_TARGETS_AT_LAST_GATE = 16, 64  # per edge
REFERENCE = 0.01  # the best share of the joins, which defines "as good as the track's best"
SCORE_WEIGHT = 8.0  # in the exponent, at temperature 1
JOIN_COST = 2.0  # at temperature 0: two joins of score 1 cost as much as one of score 0
FROZEN = 0.01  # temperatures up to here count as 0
DRAWS = 32
ENOUGH_VARIETY = 26  # different paths among the draws
SECTION_START = 1.25  # weight at temperature 1 of starting at a section; the track's start has 1
PICKUP = -4.0  # log weight of starting a few beats before a downbeat, by which the ending can fit
MAX_END_SILENCE_S = 0.35  # after the track's own ending
LANDING_S = 0.05  # tolerance of both limits on when the ending comes
MAX_RESERVE = 0.1  # share of beats planned beyond the asked length where the beats vary in length
RECENT_BARS = 16  # a beat that was played within these bars counts as repeated
WORST_WEIGHT, REPEAT_WEIGHT = 0.5, 1.0  # in a path's fault


@dataclass(frozen=True)
class BeatPath:
    """What to play: from `start_s` of the source on, with these joins."""

    start_s: float
    joins: Joins
    to_ending: bool  # it plays the track's own ending; otherwise its last seconds must be faded


@dataclass(frozen=True)
class _Start:
    edge: int
    n_beats: int  # to play from there
    log_weight: float


def find_path(
    track: Analysis, duration_s: float, *, temperature: float, min_segment: int, seed: int
) -> BeatPath:
    """The path of this length, which depends on the arguments alone.

    Raises:
        EngineFailure: there is none; this has not been seen with any track of two bars or more.
    """
    rng = np.random.default_rng(seed) if temperature > FROZEN else None
    reaches_end = duration_s >= track.duration_s - track.spare_tail_s
    if rng is None and duration_s <= track.duration_s and (reaches_end or not track.has_ending):
        return BeatPath(0.0, (), to_ending=reaches_end)
    search = _Search(track, duration_s, temperature, max(1, min(min_segment, track.n_beats // 3)), rng)
    found = search.find(to_ending=True) if track.has_ending else None
    found = found or search.find(to_ending=False)
    if found is None:
        raise EngineFailure(
            f"found no path of {duration_s:.1f} s through a track of {track.duration_s:.1f} s"
        )
    return found


@dataclass(frozen=True)
class _Search:
    """One request's search; without `rng` it takes the best path instead of drawing."""

    track: Analysis
    duration_s: float
    temperature: float
    min_segment: int
    rng: np.random.Generator | None

    def find(self, *, to_ending: bool) -> BeatPath | None:
        """A path through the narrowest gate that gives one and, if drawn, enough variety."""
        found: BeatPath | None = None
        for gate in GATES:
            if self.rng is None and gate < VARIETY_GATE:
                continue
            if gate > VARIETY_GATE and (to_ending or found):
                break
            candidates = self._candidates(gate, to_ending)
            found = self._choose(candidates) or found
            if found and (self.rng is None or len({path for _, path in candidates}) >= ENOUGH_VARIETY):
                break
        return found

    def _candidates(self, gate: float, to_ending: bool) -> list[tuple[float, BeatPath]]:
        """The best path, or up to DRAWS drawn ones, each with its fault."""
        starts = self._starts(to_ending)
        if not starts:
            return []
        moves = self._moves(gate)
        final = np.full(self.track.n_beats + 1, -np.inf)
        final[-1 if to_ending else slice(0, -1)] = (
            0.0  # before the last beat, sound is left to fill the length
        )
        longest = max(start.n_beats for start in starts)
        table = path_weights(moves, final, longest, best=self.rng is None)
        weights: Doubles = np.array(
            [start.log_weight + start_weight(table, moves, start.edge, start.n_beats) for start in starts]
        )
        if not np.isfinite(weights).any():
            return []
        candidates = []
        for _ in range(DRAWS if self.rng else 1):
            start = starts[draw_index(weights, self.rng)]
            joins = draw_joins(table, moves, start.edge, start.n_beats, self.rng)
            if to_ending and not self._ends_in_time(start, joins):
                continue
            if self.rng and gate <= VARIETY_GATE and not joins and start.edge == 0:
                continue  # a copy
            start_s = float(self.track.edges_s[start.edge]) if start.edge else 0.0
            candidates.append((self._fault(start, joins), BeatPath(start_s, joins, to_ending)))
        return candidates

    def _choose(self, candidates: list[tuple[float, BeatPath]]) -> BeatPath | None:
        """One of the better half of those with the first one's start and number of joins.

        The first one was drawn, so these two are left to the draw.
        """
        if not candidates:
            return None
        _, first = candidates[0]
        rivals = [
            (fault, path)
            for fault, path in candidates
            if path.start_s == first.start_s and len(path.joins) == len(first.joins)
        ]
        rivals.sort(key=lambda rival: rival[0])
        n_better = (len(rivals) + 1) // 2
        return rivals[0 if self.rng is None else int(self.rng.integers(n_better))][1]

    def _moves(self, gate: float) -> Moves:
        """The joins that pass the gate, and the log weights of joining and of playing on."""
        track, is_last_gate = self.track, gate == GATES[-1]
        n_joins = int(np.isfinite(track.scores).sum())
        allowed = track.scores.copy()
        allowed[:, track.n_beats - self.min_segment + 1 :] = -np.inf  # too near the end for a segment
        if not is_last_gate:
            allowed[track.similarities < MIN_SIMILARITY] = -np.inf
        ranked = np.sort(allowed[np.isfinite(allowed)])[::-1].astype(np.float64)
        n_targets = min(MAX_TARGETS_AT_LAST_GATE if is_last_gate else MAX_TARGETS, allowed.shape[1])
        targets = np.argsort(-allowed, axis=1, kind="stable")[:, :n_targets]
        scores = np.take_along_axis(allowed, targets, axis=1).astype(np.float64)
        if ranked.size:
            scores[scores < ranked[min(max(round(gate * n_joins), 1), ranked.size) - 1]] = -np.inf
        if self.rng is None or not ranked.size:
            return Moves(np.zeros(len(scores)), targets, scores - JOIN_COST, self.min_segment)
        reference = ranked[min(int(REFERENCE * n_joins), ranked.size - 1)]
        exponent = SCORE_WEIGHT / self.temperature * (scores - reference)
        total = np.logaddexp.reduce(exponent, axis=1, keepdims=True)
        any_join = -1.0 / self.temperature + np.minimum(total, 0.0)  # log of the probability of joining here
        join = np.full_like(exponent, -np.inf)
        np.subtract(exponent + any_join, total, out=join, where=np.isfinite(total))
        return Moves(np.log1p(-np.exp(any_join[:, 0])), targets, join, self.min_segment)

    def _starts(self, to_ending: bool) -> list[_Start]:
        """Every start, with every number of beats, that can give the asked length."""
        track = self.track
        beats_s = np.diff(track.edges_s)
        beat_s = float(np.median(beats_s))
        reserve = min(MAX_RESERVE, float(beats_s.std() / beats_s.mean()))
        tail_s = track.duration_s - float(track.edges_s[-1])
        starts = []
        for edge, log_weight in self._start_edges(to_ending):
            wanted_s = self.duration_s - (float(track.edges_s[0]) if edge == 0 else 0.0)
            if to_ending:
                least = (wanted_s - tail_s - MAX_END_SILENCE_S) / beat_s
                most = (wanted_s - tail_s + track.spare_tail_s) / beat_s
                lengths = range(max(0, int(np.ceil(least))), int(np.floor(most)) + 1)
            else:
                n_beats = max(0, int(np.ceil(wanted_s / beat_s * (1.0 + reserve) - 0.5)))
                lengths = range(n_beats, n_beats + 1)
            starts += [_Start(edge, n_beats, log_weight) for n_beats in lengths]
        return starts

    def _start_edges(self, to_ending: bool) -> list[tuple[int, float]]:
        """Edges to start at and their log weights: the track's start, sections, and pickups to both."""
        track, edges = self.track, [(0, 0.0)]
        if self.rng and track.sections:
            log_weight = float(np.log(SECTION_START * self.temperature / len(track.sections)))
            edges += [(edge, log_weight) for edge in track.sections]
        if to_ending:
            downbeats = [(track.meter, 0.0), *edges[1:]]
            edges += [
                (edge - k, weight + PICKUP) for edge, weight in downbeats for k in range(1, track.meter)
            ]
        return edges

    def _ends_in_time(self, start: _Start, joins: Joins) -> bool:
        """Whether the track's ending fits the asked length, given the true lengths of the beats."""
        track = self.track
        lead_s = 0.0 if start.edge else float(track.edges_s[0])
        points = [start.edge, *(edge for join in joins for edge in join), track.n_beats]
        played_s = float(np.diff(track.edges_s[points])[::2].sum())
        missing_s = self.duration_s - lead_s - played_s - (track.duration_s - float(track.edges_s[-1]))
        return -track.spare_tail_s - LANDING_S <= missing_s <= MAX_END_SILENCE_S + LANDING_S

    def _fault(self, start: _Start, joins: Joins) -> float:
        """The mean and the worst loss of score at the joins, and the share of beats repeated soon."""
        if not joins:
            return 0.0
        losses = 1.0 - np.array([self.track.scores[join] for join in joins])
        recent = RECENT_BARS * max(self.track.meter, 4)
        last_played: dict[int, int] = {}
        n_repeated = 0
        for at, beat in enumerate(_beats(start, joins)):
            n_repeated += at - last_played.get(beat, -recent - 1) <= recent
            last_played[beat] = at
        repeated = n_repeated / max(start.n_beats, 1)
        return float(losses.mean() + WORST_WEIGHT * losses.max() + REPEAT_WEIGHT * repeated)


def _beats(start: _Start, joins: Joins) -> list[int]:
    """The source's beats in the order in which they are played."""
    beats: list[int] = []
    edge = start.edge
    for leave, enter in joins:
        beats += range(edge, leave)
        edge = enter
    return beats + list(range(edge, edge + start.n_beats - len(beats)))
