"""What is asked of a path, and the weights of its segments' lengths and of its joins (see `lattice`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.engines.remix.analysis import PHRASE_BARS, Analysis
from pipeline.engines.remix.lattice import Indices, Moves
from pipeline.music.spectra import Doubles

FROZEN = 0.01  # temperatures up to here count as 0
MAX_TARGETS = 32  # of a point
SCORE_WEIGHT = 6.0  # log weight of a join per unit of score
GOOD_SCORE = 0.5  # a point whose joins have this score or more is left as readily as any
RELUCTANCE = 0.3  # of leaving a point with worse joins, as a share of their log weight
JOIN_COST = 2.0  # at temperature 0: two joins of score 1 cost as much as one of score 0
BACKWARD = -0.5  # log weight of a join that goes back, at temperature 1; times 1 / T
SEGMENT_S, SEGMENT_SPREAD = 6.0, 0.4  # typical length at temperature 1; log-normal deviation
SEGMENT_EXPONENT = 1.5  # the typical length is divided by this power of the temperature
ODD_SEGMENT = (0.0, -2.0, -1.0, -2.0)  # log weights by its bars modulo PHRASE_BARS
MAX_UNCUT_S = 27.0  # longest passage of the source without a join
MAX_UNCUT_SHARE = 0.85  # the same, of the result


@dataclass(frozen=True)
class PathRequest:
    """What is asked of a path, without its seed."""

    track: Analysis
    duration_s: float
    temperature: float
    min_segment_beats: int

    @property
    def is_frozen(self) -> bool:
        """Whether the best path is asked for, rather than a drawn one."""
        return self.temperature <= FROZEN

    @cached_property
    def interval_s(self) -> float:
        """Mean time between two points."""
        return float(np.diff(self.track.points_s).mean())

    @cached_property
    def shortest(self) -> int:
        """Least length of a segment in intervals; the track and the result have room for a join."""
        wanted, track = -(-self.min_segment_beats // self.track.step), self.track.points_s.size - 1
        return max(1, min(wanted, track // 3, int(self.duration_s / self.interval_s) // 2))

    @cached_property
    def longest(self) -> int:
        """Greatest length of a segment in intervals, at least such that two segments can have any length."""
        limit_s = min(MAX_UNCUT_S, MAX_UNCUT_SHARE * self.duration_s)
        return max(int(limit_s / self.interval_s), 2 * self.shortest - 1)


def moves(asked: PathRequest, allowed: Doubles) -> Moves:
    """The segments and joins of a path; `allowed`, (points, points), are the scores of the possible joins."""
    targets = np.argsort(-allowed, axis=1, kind="stable")[:, :MAX_TARGETS]
    scores = np.take_along_axis(allowed, targets, axis=1)
    if asked.is_frozen:
        lengths = np.zeros(asked.track.points_s.size)
        lengths[: asked.shortest] = -np.inf
        return Moves(lengths, lengths, targets, scores - JOIN_COST)
    lengths = _length_weights(asked)
    at_least = np.logaddexp.accumulate(lengths[::-1])[::-1]  # of a segment of this length or more
    at_least[: asked.shortest] = -np.inf
    return Moves(lengths, at_least, targets, _join_weights(asked, targets, scores))


def _length_weights(asked: PathRequest) -> Doubles:
    """Log probability of each length of a segment, (longest + 1,)."""
    intervals = np.arange(asked.longest + 1)
    typical_s = SEGMENT_S / asked.temperature**SEGMENT_EXPONENT
    ratio = np.maximum(intervals, 0.5) * asked.interval_s / typical_s
    weights = -0.5 * (np.log(ratio) / SEGMENT_SPREAD) ** 2
    if asked.track.step == asked.track.meter > 1:
        weights += np.array(ODD_SEGMENT)[intervals % PHRASE_BARS]
    weights[: asked.shortest] = -np.inf
    return np.asarray(weights - np.logaddexp.reduce(weights))


def _join_weights(asked: PathRequest, targets: Indices, scores: Doubles) -> Doubles:
    """Log probability of leaving each point for each target, (points, targets)."""
    back = targets < np.arange(len(targets))[:, None]
    weights = SCORE_WEIGHT * (scores - GOOD_SCORE) + np.where(back, BACKWARD / asked.temperature, 0.0)
    total = np.logaddexp.reduce(weights, axis=1, keepdims=True)
    total = np.where(np.isfinite(total), total, 0.0)
    return np.asarray(weights - total + RELUCTANCE * np.minimum(total, 0.0))
