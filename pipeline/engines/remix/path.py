"""The search for a path through a track that has the asked length.

A path plays from a start, and at some points joins to another point. At temperature 0 it is the best one: few
joins, with high scores, from the track's start (as the retargeting of Wenner et al. 2013). A temperature
T > 0 draws:

- the start and the kind of the end: any beginning of a phrase is as likely as the track's start, unless T is
  low; the last seconds are the track's own or are faded.
- a path between them, by the lengths of its segments, whose typical length falls with T, preferably four,
  eight or sixteen bars; and by the scores of its joins (see `moves`). A low T prefers joins that go forward.
  Of DRAWS paths with as many joins as the first one, one of the better half is taken: those with the best
  joins and the fewest repeated intervals.

Only joins above the first of FLOORS may be used. The next one is tried if there is no path of the asked
length, or if so few that many seeds would give the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.engines.remix.analysis import Analysis
from pipeline.engines.remix.lattice import Lattice, draw_index, draw_joins, weigh
from pipeline.engines.remix.moves import PathRequest, moves
from pipeline.engines.remix.starts import Start, ends_in_time, starts
from pipeline.errors import NoResult
from pipeline.music.spectra import Doubles

Joins = tuple[tuple[int, int], ...]  # (point left, point entered) of each

# Least score of joins, and whether the penalty for skipping an odd number of bars counts. Of the joins above
# 0.2, 95 % are as smooth as uncut music to the classifier that `similarity` names; from 0 to 0.2, 90 %.
FLOORS = ((0.2, True), (0.0, True), (0.0, False), (-0.2, False), (-0.5, False), (-np.inf, False))
VARIETY_FLOORS = 4  # so many are tried for the sake of variety alone
FROZEN_FLOOR = 2  # the first one at temperature 0, where the best path avoids bad joins by itself
DRAWS = 32
ENOUGH_VARIETY = 20  # different paths among the draws
RECENT_S = 30.0  # nothing is played three times within this time if that can be avoided
WORST_WEIGHT, REPEAT_WEIGHT = 0.5, 1.0  # in a path's fault


@dataclass(frozen=True)
class BeatPath:
    """What to play: from `start_s` of the source on, with these joins."""

    start_s: float
    joins: Joins
    to_ending: bool  # it plays the track's own ending; otherwise its last seconds must be faded


def find_path(
    track: Analysis, duration_s: float, *, temperature: float, min_segment: int, seed: int
) -> BeatPath:
    """The path of this length, which depends on the arguments alone; `min_segment` is in beats.

    Raises:
        NoResult: there is none; this has not been seen with any track of two bars or more.
    """
    asked = PathRequest(track, duration_s, temperature, min_segment)
    reaches_end = duration_s >= track.duration_s - track.spare_tail_s
    if asked.is_frozen and duration_s <= track.duration_s and (reaches_end or not track.has_ending):
        return BeatPath(0.0, (), to_ending=reaches_end)
    found = _Search(asked, None if asked.is_frozen else np.random.default_rng(seed)).find()
    if found is None:
        raise NoResult(f"found no path of {duration_s:.1f} s through a track of {track.duration_s:.1f} s")
    return found


@dataclass(frozen=True)
class _Search:
    """One request's search; without `rng` it takes the best path instead of drawing."""

    asked: PathRequest
    rng: np.random.Generator | None

    def find(self) -> BeatPath | None:
        """A path above the first of FLOORS that gives one and, if drawn, enough variety."""
        possible = starts(self.asked)
        found, found_thirds = None, 0
        for tried, floor in enumerate(FLOORS):
            if self.rng is None and tried < FROZEN_FLOOR:
                continue
            if found and tried >= VARIETY_FLOORS:
                break
            lattices = self._lattices(self._allowed(*floor), possible)
            order = self._order(self._weights(possible, lattices))
            paths = [path for k in order for path in self._draw(possible[k], lattices, 1)]
            thirds = min((self._repeats(*path)[1] for path in paths), default=0)
            paths = [path for path in paths if self._repeats(*path)[1] == thirds]
            if paths and (found is None or thirds <= found_thirds):
                found, found_thirds = self._choose(paths[0], lattices), thirds
            if found and (self.rng is None or (found_thirds == 0 and len(set(paths)) >= ENOUGH_VARIETY)):
                break
        return found

    def _allowed(self, floor: float, counts_bars: bool) -> Doubles:
        """The scores of the joins above a floor, (points, points); -inf: not allowed."""
        track = self.asked.track
        above = (track.scores if counts_bars else track.natural) >= floor
        return np.where(above, track.scores, -np.inf).astype(np.float64)

    def _lattices(self, allowed: Doubles, possible: list[Start]) -> dict[bool, Lattice]:
        """Of the paths to the track's own end, and of those that may end at any point but the last."""
        own, anywhere = np.full((2, len(allowed)), -np.inf)
        own[-1] = anywhere[:-1] = 0.0  # after every point but the last, sound is left to fill the length
        made, lattices = moves(self.asked, allowed), {}
        for to_ending, final in ((True, own), (False, anywhere)):
            longest = max((one.n_intervals for one in possible if one.to_ending == to_ending), default=0)
            lattices[to_ending] = weigh(made, final, longest, best=self.rng is None)
        return lattices

    def _weights(self, possible: list[Start], lattices: dict[bool, Lattice]) -> Doubles:
        """Log weights of the starts, -inf where no path begins; without `rng` with that of the best path."""
        totals = np.array([lattices[one.to_ending].entered[one.n_intervals, one.point] for one in possible])
        weights = np.array([one.log_weight for one in possible])
        return weights + totals if self.rng is None else np.where(np.isfinite(totals), weights, -np.inf)

    def _order(self, weights: Doubles) -> list[int]:
        """Indices of DRAWS drawn starts; without `rng`, of all, the best first."""
        if not np.isfinite(weights).any():
            return []
        if self.rng:
            return [draw_index(weights, self.rng) for _ in range(DRAWS)]
        return [int(k) for k in np.argsort(-weights, kind="stable") if np.isfinite(weights[k])]

    def _draw(self, start: Start, lattices: dict[bool, Lattice], n: int) -> list[tuple[Start, Joins]]:
        """Up to n paths from a start: those of n whose ending comes in time."""
        lattice = lattices[start.to_ending]
        draws = (draw_joins(lattice, start.point, start.n_intervals, self.rng) for _ in range(n))
        return [
            (start, joins) for joins in draws if not start.to_ending or ends_in_time(self.asked, start, joins)
        ]

    def _choose(self, first: tuple[Start, Joins], lattices: dict[bool, Lattice]) -> BeatPath:
        """One of the better half of the paths with the first one's start and number of joins.

        The first one was drawn, so these two are left to the draw. No path that plays more a third time.
        """
        start, joins = first
        rivals = [joins]
        if self.rng:
            rivals += [other for _, other in self._draw(start, lattices, DRAWS) if len(other) == len(joins)]
        thirds = self._repeats(start, joins)[1]
        rivals = [other for other in rivals if self._repeats(start, other)[1] <= thirds]
        rivals.sort(key=lambda other: self._fault(start, other))
        n_better = (len(rivals) + 1) // 2
        chosen = rivals[int(self.rng.integers(n_better)) if self.rng else 0]
        return BeatPath(start.start_s, chosen, start.to_ending)

    def _fault(self, start: Start, joins: Joins) -> float:
        """The mean and the worst loss of score at the joins, and the share of what is repeated soon."""
        if not joins:
            return 0.0
        losses = 1.0 - np.array([self.asked.track.scores[join] for join in joins])
        repeated = self._repeats(start, joins)[0] / start.n_intervals
        return float(losses.mean() + WORST_WEIGHT * losses.max() + REPEAT_WEIGHT * repeated)

    def _repeats(self, start: Start, joins: Joins) -> tuple[int, int]:
        """How many intervals are played a second time, and how many a third time, within RECENT_S."""
        recent = RECENT_S / self.asked.interval_s
        played: dict[int, list[int]] = {}
        n_second = n_third = 0
        for at, interval in enumerate(_intervals(start, joins)):
            before = played.setdefault(interval, [])
            n_second += len(before) > 0 and at - before[-1] <= recent
            n_third += len(before) > 1 and at - before[-2] <= recent
            before.append(at)
        return n_second, n_third


def _intervals(start: Start, joins: Joins) -> list[int]:
    """The source's intervals in the order in which they are played."""
    played: list[int] = []
    point = start.point
    for leave, enter in joins:
        played += range(point, leave)
        point = enter
    return played + list(range(point, point + start.n_intervals - len(played)))
