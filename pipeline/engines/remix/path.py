"""The search for a path through a track that has the asked length.

A path plays from a start, and at some points joins to another point. At temperature 0 it is the best one: few
joins, with high scores, from the track's start (as the retargeting of Wenner et al. 2013). A temperature
T > 0 draws:

- the start and the kind of the end: any beginning of a phrase is as likely as the track's start, unless T is
  low; the last seconds are the track's own or are faded.
- a path between them, by the lengths of its segments, whose typical length falls with T, preferably four,
  eight or sixteen bars; and by the scores of its joins (see `lattice`). A low T prefers joins that go forward.
  Of DRAWS paths with as many joins as the first one, one of the better half is taken: those with the best
  joins and the fewest repeated bars.

Only joins of a score above the first of FLOORS may be used. The floor is lowered if there is no path of the
asked length, or if there are too few starts, so that many seeds would give similar results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.engines.remix.analysis import PHRASE_BARS, Analysis
from pipeline.engines.remix.lattice import Lattice, Moves, draw_index, draw_joins, weigh
from pipeline.errors import EngineFailure
from pipeline.music.spectra import Doubles

Joins = tuple[tuple[int, int], ...]  # (point left, point entered) of each

# Least score of joins, and whether joins that skip an odd number of bars need no more. Of the joins above 0.2,
# 95 % are as smooth as uncut music to the classifier that `similarity` names; of those from 0 to 0.2 90 %.
FLOORS = ((0.2, False), (0.0, False), (0.0, True), (-0.5, True), (-np.inf, True))
VARIETY_FLOORS = 3  # so many are tried for the sake of variety alone
ENOUGH_VARIETY = 16  # different ones among the first draws
FROZEN_FLOOR = 2  # the first floor at temperature 0, where the best path avoids bad joins by itself
MAX_TARGETS = 32  # of a point
SCORE_WEIGHT = 6.0  # log weight of a join per unit of score
GOOD_SCORE = 0.5  # a point whose joins have this score or more is left as readily as any
LEAVING = 0.3
NEVER = -1e9
JOIN_COST = 2.0  # at temperature 0: two joins of score 1 cost as much as one of score 0
FROZEN = 0.01  # temperatures up to here count as 0
SEGMENT_S, SEGMENT_SPREAD = 6.0, 0.4  # typical length at temperature 1; log-normal deviation
SEGMENT_EXPONENT = 1.5  # the typical length is divided by this power of the temperature
ODD_SEGMENT = (0.0, -2.0, -1.0, -2.0)  # log weights by its bars modulo PHRASE_BARS
BACKWARD = -0.5  # log weight of a join that goes back, at temperature 1
MAX_UNCUT_S = 27.0  # longest passage of the source without a join
MAX_UNCUT_SHARE = 0.85  # the same of the result
OWN_ENDING = 0.6  # log weight of playing the track's own ending, over fading, at temperature 1; times 1 / T
PICKUP = -3.0  # log weight of starting a few beats before a downbeat, by which the ending can fit
LATE_START = -0.02  # log weight of starting elsewhere than the track does, at temperature 1; times 1 / T³
START = (0.0, -0.7, -0.7, -0.7)  # log weights of starting so many bars into a phrase
DRAWS = 32
MAX_END_SILENCE_S = 0.35  # after the track's own ending
LANDING_S = 0.05  # tolerance of both limits on when the ending comes
MAX_RESERVE = 0.1  # share of intervals planned beyond the asked length where they vary in length
MISSING = 0.25  # intervals that may lack: the track goes on after the last one
RECENT_S = 30.0  # nothing is played three times within this time
WORST_WEIGHT, REPEAT_WEIGHT = 0.5, 1.0  # in a path's fault


@dataclass(frozen=True)
class BeatPath:
    """What to play: from `start_s` of the source on, with these joins."""

    start_s: float
    joins: Joins
    to_ending: bool  # it plays the track's own ending; otherwise its last seconds must be faded


@dataclass(frozen=True)
class _Start:
    start_s: float
    point: int  # the first one after start_s
    n_intervals: int  # to play from there
    to_ending: bool
    log_weight: float


def find_path(
    track: Analysis, duration_s: float, *, temperature: float, min_segment: int, seed: int
) -> BeatPath:
    """The path of this length, which depends on the arguments alone; `min_segment` is in beats.

    Raises:
        EngineFailure: there is none; this has not been seen with any track of two bars or more.
    """
    rng = np.random.default_rng(seed) if temperature > FROZEN else None
    reaches_end = duration_s >= track.duration_s - track.spare_tail_s
    if rng is None and duration_s <= track.duration_s and (reaches_end or not track.has_ending):
        return BeatPath(0.0, (), to_ending=reaches_end)
    found = _Search(track, duration_s, temperature, min_segment, rng).find()
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
    min_segment: int  # beats
    rng: np.random.Generator | None

    def find(self) -> BeatPath | None:
        """A path through the first of FLOORS that gives one and, if drawn, enough variety."""
        starts = self._starts()
        found: BeatPath | None = None
        for tried, (floor, any_bars) in enumerate(FLOORS):
            if self.rng is None and tried < FROZEN_FLOOR:
                continue
            if found and tried >= VARIETY_FLOORS:
                break
            lattices = self._lattices(self._moves(floor, any_bars), starts)
            weights = self._weights(starts, lattices)
            paths = [path for k in self._order(weights) for path in self._draw(starts[k], lattices, 1)]
            if paths:
                found = self._choose(paths[0], lattices)
            if found and (self.rng is None or len(set(paths)) >= ENOUGH_VARIETY):
                break
        return found

    def _order(self, weights: Doubles) -> list[int]:
        """Indices of DRAWS drawn starts; without `rng`, of all, the best first."""
        if not np.isfinite(weights).any():
            return []
        if self.rng:
            return [draw_index(weights, self.rng) for _ in range(DRAWS)]
        return [int(k) for k in np.argsort(-weights, kind="stable") if np.isfinite(weights[k])]

    def _draw(self, start: _Start, lattices: dict[bool, Lattice], n: int) -> list[tuple[_Start, Joins]]:
        """Up to n paths from a start: those of n that meet all conditions."""
        lattice = lattices[start.to_ending]
        draws = (draw_joins(lattice, start.point, start.n_intervals, self.rng) for _ in range(n))
        return [(start, joins) for joins in draws if self._is_good(start, joins)]

    def _choose(self, first: tuple[_Start, Joins], lattices: dict[bool, Lattice]) -> BeatPath:
        """One of the better half of the paths with the first one's start and number of joins.

        The first one was drawn, so these two are left to the draw.
        """
        start, joins = first
        if self.rng is None:
            return BeatPath(start.start_s, joins, start.to_ending)
        rivals = [joins, *(one for _, one in self._draw(start, lattices, DRAWS))]
        rivals = [one for one in rivals if len(one) == len(joins)]
        rivals.sort(key=lambda one: self._fault(start, one))
        chosen = rivals[int(self.rng.integers((len(rivals) + 1) // 2))]
        return BeatPath(start.start_s, chosen, start.to_ending)

    def _lattices(self, moves: Moves, starts: list[_Start]) -> dict[bool, Lattice]:
        """Of the paths to the track's own end, and of those that may end at any point but the last."""
        n_points = self.track.points_s.size
        own, anywhere = np.full((2, n_points), -np.inf)
        own[-1] = anywhere[:-1] = 0.0  # after every point but the last, sound is left to fill the length
        lattices = {}
        for to_ending, final in ((True, own), (False, anywhere)):
            longest = max((one.n_intervals for one in starts if one.to_ending == to_ending), default=0)
            lattices[to_ending] = weigh(moves, final, longest, best=self.rng is None)
        return lattices

    def _weights(self, starts: list[_Start], lattices: dict[bool, Lattice]) -> Doubles:
        """Log weights of the starts, -inf where no path begins; without `rng` they include the best path's."""
        totals = np.array([lattices[one.to_ending].entered[one.n_intervals, one.point] for one in starts])
        weights = np.array([one.log_weight for one in starts])
        return weights + totals if self.rng is None else np.where(np.isfinite(totals), weights, -np.inf)

    def _moves(self, floor: float, any_bars: bool) -> Moves:
        """The joins above the floor, before their correction for odd numbers of bars if `any_bars`."""
        track = self.track
        scores = np.where((track.natural if any_bars else track.scores) >= floor, track.scores, -np.inf)
        targets = np.argsort(-scores, axis=1, kind="stable")[:, :MAX_TARGETS]
        joins = np.take_along_axis(scores, targets, axis=1).astype(np.float64)
        if self.rng is None:
            lengths = np.zeros(self.track.points_s.size)
            lengths[: self._shortest] = -np.inf
            return Moves(lengths, lengths, targets, joins - JOIN_COST)
        weights = SCORE_WEIGHT * (joins - GOOD_SCORE)
        weights += np.where(targets < np.arange(len(targets))[:, None], BACKWARD / self.temperature, 0.0)
        total = np.maximum(np.logaddexp.reduce(weights, axis=1, keepdims=True), NEVER)
        weights += LEAVING * np.minimum(total, 0.0) - total
        lengths = self._length_weights()
        reversed_sums = np.logaddexp.accumulate(lengths[::-1])[::-1]  # of a segment of this length or more
        last = np.where(np.arange(lengths.size) < self._shortest, -np.inf, reversed_sums)
        return Moves(lengths, last, targets, weights)

    def _length_weights(self) -> Doubles:
        """Log probability of each length of a segment, (longest + 1,)."""
        track, intervals = self.track, np.arange(self._longest + 1)
        typical_s = SEGMENT_S / self.temperature**SEGMENT_EXPONENT
        ratio = np.maximum(intervals, 0.5) * self._interval_s / typical_s
        weights = -0.5 * (np.log(ratio) / SEGMENT_SPREAD) ** 2
        if track.step == track.meter > 1:
            weights += np.array(ODD_SEGMENT)[intervals % PHRASE_BARS]
        weights[: self._shortest] = -np.inf
        return np.asarray(weights - np.logaddexp.reduce(weights))

    @cached_property
    def _interval_s(self) -> float:
        return float(np.diff(self.track.points_s).mean())

    @cached_property
    def _shortest(self) -> int:
        """Least length of a segment in intervals; the track and the result have room for a join."""
        wanted, track = -(-self.min_segment // self.track.step), self.track.points_s.size - 1
        return max(1, min(wanted, track // 3, int(self.duration_s / self._interval_s) // 2))

    @cached_property
    def _longest(self) -> int:
        """Greatest length of a segment in intervals; there are two segments that give any longer length."""
        limit_s = min(MAX_UNCUT_S, MAX_UNCUT_SHARE * self.duration_s)
        return max(int(limit_s / self._interval_s), 2 * self._shortest - 1)

    def _starts(self) -> list[_Start]:
        """Every start, with every number of intervals, that can give the asked length."""
        track, interval_s = self.track, self._interval_s
        phrases_s = track.points_s[PHRASE_BARS:] - track.points_s[:-PHRASE_BARS]
        reserve = min(MAX_RESERVE, float(phrases_s.std() / phrases_s.mean())) if phrases_s.size else 0.0
        tail_s = track.duration_s - float(track.points_s[-1])
        own_ending = OWN_ENDING / max(self.temperature, FROZEN)
        starts = []
        for start_s, point, log_weight in self._beginnings():
            wanted_s = self.duration_s - (float(track.points_s[point]) - start_s)
            if start_s in (0.0, float(track.points_s[point])):
                n = max(1, int(np.ceil(wanted_s / interval_s * (1.0 + reserve) - MISSING)))
                starts.append(_Start(start_s, point, n, False, log_weight))
            if track.has_ending:
                least = int(np.ceil((wanted_s - tail_s - MAX_END_SILENCE_S) / interval_s))
                most = int((wanted_s - tail_s + track.spare_tail_s) / interval_s)
                starts += [
                    _Start(start_s, point, n, True, log_weight + own_ending)
                    for n in range(max(1, least), most + 1)
                ]
        return starts

    def _beginnings(self) -> list[tuple[float, int, float]]:
        """Where to start: seconds, the first point from there on, and the log weight."""
        track = self.track
        late = LATE_START / max(self.temperature, FROZEN) ** 3
        points = range(1, track.points_s.size - 1) if self.rng else ()
        later = [(point, late + START[track.phrase_bars[point]]) for point in points]
        starts = [(0.0, 0, 0.0), *((float(track.points_s[point]), point, weight) for point, weight in later)]
        for point, log_weight in [(1, 0.0), *later]:
            edge = track.first + point * track.step
            for early in track.edges_s[edge - track.step + 1 : edge]:
                starts.append((float(early), point, log_weight + PICKUP))
        return starts

    def _is_good(self, start: _Start, joins: Joins) -> bool:
        """Whether the ending fits the asked length, given the true lengths of the intervals.

        Nor may anything be played three times within RECENT_S, unless the track is shorter than that.
        """
        track = self.track
        if self.rng and track.duration_s > RECENT_S and self._repeats(start, joins)[1]:
            return False
        if not start.to_ending:
            return True
        points = [start.point, *(point for join in joins for point in join), track.points_s.size - 1]
        played_s = (
            float(np.diff(track.points_s[points])[::2].sum() + track.points_s[start.point]) - start.start_s
        )
        missing_s = self.duration_s - played_s - (track.duration_s - float(track.points_s[-1]))
        return -track.spare_tail_s - LANDING_S <= missing_s <= MAX_END_SILENCE_S + LANDING_S

    def _fault(self, start: _Start, joins: Joins) -> float:
        """The mean and the worst loss of score at the joins, and the share of what is repeated soon."""
        if not joins:
            return 0.0
        losses = 1.0 - np.array([self.track.scores[join] for join in joins])
        repeated = self._repeats(start, joins)[0] / start.n_intervals
        return float(losses.mean() + WORST_WEIGHT * losses.max() + REPEAT_WEIGHT * repeated)

    def _repeats(self, start: _Start, joins: Joins) -> tuple[int, int]:
        """How many intervals are played a second time, and how many a third time, within RECENT_S."""
        recent = RECENT_S / self._interval_s
        played: dict[int, list[int]] = {}
        n_second = n_third = 0
        for at, interval in enumerate(_intervals(start, joins)):
            before = played.setdefault(interval, [])
            n_second += len(before) > 0 and at - before[-1] <= recent
            n_third += len(before) > 1 and at - before[-2] <= recent
            before.append(at)
        return n_second, n_third


def _intervals(start: _Start, joins: Joins) -> list[int]:
    """The source's intervals in the order in which they are played."""
    played: list[int] = []
    point = start.point
    for leave, enter in joins:
        played += range(point, leave)
        point = enter
    return played + list(range(point, point + start.n_intervals - len(played)))
