"""Where a path may start and how it may end, so that it has the asked length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.engines.remix.analysis import PHRASE_BARS
from pipeline.engines.remix.moves import FROZEN, PathRequest

OWN_ENDING = 1.2  # log weight of playing the track's own ending, over fading, at temperature 1; times 1 / T
PICKUP = -3.0  # log weight of starting a few beats before a downbeat, by which the ending can fit
EARLY, EARLY_EXPONENT = 0.52, 5  # log weight of starting elsewhere than the track does: -(EARLY / T)^5
IN_PHRASE = -0.7  # log weight of starting inside a phrase
MAX_END_SILENCE_S = 0.35  # after the track's own ending
LANDING_S = 0.05  # tolerance of both limits on when the ending comes
MAX_RESERVE = 0.1  # share of intervals planned beyond the asked length where the tempo varies
MISSING = 0.25  # intervals that may lack at the end: the track goes on after the last one


@dataclass(frozen=True)
class Start:
    """A start, with the length and the kind of the end."""

    start_s: float
    point: int  # the first one from there on
    n_intervals: int  # to play from the point
    to_ending: bool  # the track's own ending is played
    log_weight: float


def starts(asked: PathRequest) -> list[Start]:
    """Every start, with every number of intervals, that can give the asked length."""
    track, found = asked.track, []
    for start_s, point, log_weight in _beginnings(asked):
        lead_s = float(track.points_s[point]) - start_s
        if point == 0 or lead_s == 0:
            n = _intervals_to_fade(asked, asked.duration_s - lead_s)
            found.append(Start(start_s, point, n, False, log_weight))
        if track.has_ending:
            own = log_weight + OWN_ENDING / max(asked.temperature, FROZEN)
            lengths = _intervals_to_ending(asked, asked.duration_s - lead_s)
            found += [Start(start_s, point, n, True, own) for n in lengths]
    return found


def ends_in_time(asked: PathRequest, start: Start, joins: tuple[tuple[int, int], ...]) -> bool:
    """Whether the track's ending fits the asked length, given the true lengths of the intervals."""
    track = asked.track
    points = [start.point, *(point for join in joins for point in join), track.points_s.size - 1]
    lead_s = float(track.points_s[start.point]) - start.start_s
    played_s = lead_s + float(np.diff(track.points_s[points])[::2].sum()) + track.tail_s
    missing_s = asked.duration_s - played_s
    return -track.spare_tail_s - LANDING_S <= missing_s <= MAX_END_SILENCE_S + LANDING_S


def _intervals_to_fade(asked: PathRequest, duration_s: float) -> int:
    points_s = asked.track.points_s
    phrases_s = points_s[PHRASE_BARS:] - points_s[:-PHRASE_BARS]
    reserve = min(MAX_RESERVE, float(phrases_s.std() / phrases_s.mean())) if phrases_s.size else 0.0
    return max(1, int(np.ceil(duration_s / asked.interval_s * (1.0 + reserve) - MISSING)))


def _intervals_to_ending(asked: PathRequest, duration_s: float) -> range:
    until_last_s = duration_s - asked.track.tail_s
    least = int(np.ceil((until_last_s - MAX_END_SILENCE_S) / asked.interval_s))
    most = int((until_last_s + asked.track.spare_tail_s) / asked.interval_s)
    return range(max(1, least), most + 1)


def _beginnings(asked: PathRequest) -> list[tuple[float, int, float]]:
    """Where to start: seconds, the first point from there on, and the log weight."""
    track = asked.track
    bar = track.meter // track.step  # in points, the first of which is on a bar line
    late = -((EARLY / max(asked.temperature, FROZEN)) ** EARLY_EXPONENT)
    bars = [point for point in range(bar, track.points_s.size - 1, bar) if not track.silent[point]]
    inner = bars[:0] if asked.is_frozen else bars
    later = [(point, late + (IN_PHRASE if track.phrase_bars[point] else 0.0)) for point in inner]
    found = [(0.0, 0, 0.0), *((float(track.points_s[point]), point, weight) for point, weight in later)]
    for point, log_weight in [(point, 0.0) for point in bars[:1]] if asked.is_frozen else later:
        edge = track.first + point * track.step
        pickups_s = track.edges_s[edge - track.meter + 1 : edge]
        found += [(float(pickup_s), point, log_weight + PICKUP) for pickup_s in pickups_s]
    return found
