"""The analysis of a track, shared by all its requests: where it may be cut, possible joins, the ending."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.remix.beatless import onset_edges_s
from pipeline.engines.remix.similarity import SILENCE_DB, break_penalties, join_costs, levels_around
from pipeline.music import analysis, bars, features, spectra
from pipeline.music.spectra import Doubles, Floats
from pipeline.records import Audio

MIN_BARS = 6  # of fewer bars any beats may be joined that keep the position in the bar
EMPHASES = {  # weights of a beat's features
    "balanced": features.WEIGHTS,
    "timbre": {"harmony": 0.1, "timbre": 0.6, "rhythm": 0.2, "loudness": 0.1},
    "harmony": {"harmony": 0.7, "timbre": 0.1, "rhythm": 0.1, "loudness": 0.1},
}
PHRASE_BARS = 4  # most phrases have four bars, or a multiple of them
BEATLESS_BAR = 4  # intervals without a beat that stand for a bar, as in `bars`
# Corrections of a join's score
ODD_BARS_PENALTIES = (0.0, 0.6, 0.4, 0.6)  # by the bars it skips, modulo PHRASE_BARS
STEP_BACK_PENALTY = 0.3  # it goes back by one bar; falls to 0 at eight bars
SECTION_BONUS = 0.06  # it leaves at the end of a section; the same for entering at the start of one
LOOP_SCORE = 0.8  # score of joining the end to the start of a track that is cut as a loop
LOOP_END_S = 0.06  # the last beat of a loop is found no further than this from its end
# The ending
LEVEL_S = 0.05  # frame length of the level curve
QUIET_DB = -30.0  # a track that stops this far below its median level has an ending
DECAY_DB = -9.0  # the final decay begins where the level falls this far below the median for good
PLAYED_DECAY_S = 0.4  # part of the decay that is always played


@dataclass(frozen=True, eq=False)
class Analysis:
    """One track, and the points where it may be cut: its downbeats, or onsets if it has no beat."""

    duration_s: float
    edges_s: Doubles  # (beats + 1,), seconds; without a beat, of intervals of about half a second
    tempo_bpm: float | None  # None: the music has no beat
    pulse_clarity: float
    meter: int  # beats a bar; 1 without a beat
    first: int  # edge of the first point
    step: int  # edges from point to point
    phrase_bars: tuple[int, ...]  # bars since a phrase began, of each point
    silent: NDArray[np.bool_]  # (points,): within a silence, in which nothing starts
    scores: Floats  # (points, points), corrected, of leaving at the first and entering at the second
    natural: Floats  # the same before corrections: 1 as in uncut music, 0 for a typical pair of points
    has_ending: bool  # it comes to an end, rather than being cut off or looping
    spare_tail_s: float  # how much of the final decay may be left out

    @property
    def n_beats(self) -> int:
        return self.edges_s.size - 1

    @property
    def points_s(self) -> Doubles:
        return self.edges_s[self.first :: self.step]

    @property
    def tail_s(self) -> float:
        """Time from the last point to the end."""
        return self.duration_s - float(self.points_s[-1])


def analyse(audio: Audio, emphasis: str = "balanced") -> Analysis:
    """Analyse a track of any length and rate; `emphasis`: a key of EMPHASES."""
    piece = analysis.analyse(audio)
    mono, spectrum, pulse = piece.mono, piece.spectra, piece.beats
    has_beat = pulse.tempo_bpm is not None
    edges_s = pulse.edges_s if has_beat else onset_edges_s(spectrum, audio.duration_s)
    meter, phase = pulse.meter, pulse.phase
    has_ending, spare_tail_s = _ending(mono)
    whole = _whole_bars(edges_s, audio.duration_s, meter) if has_beat and not has_ending else None
    if whole:
        edges_s, meter, phase = *whole, 0
    of_beats = features.beat_features(spectrum, edges_s)
    distances = features.beat_distances(of_beats, EMPHASES[emphasis])
    found = bars.find_bars(distances, meter, phase) if has_beat else bars.bars_of_pseudo_beats(distances)
    first = found.phase
    step = found.meter if edges_s.size > MIN_BARS * found.meter else 1
    points_s = edges_s[first::step]
    costs = join_costs(distances)[first::step, first::step]
    sections = tuple((edge - first) // step for edge in found.sections)
    bar = found.meter // step if has_beat else BEATLESS_BAR
    levels_db = levels_around(mono, points_s)
    penalties = break_penalties(spectrum.mel, levels_db, points_s)
    natural, scores = _scores(costs, penalties, sections, bar, has_bars=has_beat)
    silent = np.maximum(*levels_db) <= SILENCE_DB
    scores[np.tril(np.outer(silent, silent))] = -np.inf  # silence is like itself, but must not get longer
    if whole:
        natural[-1, 0] = scores[-1, 0] = LOOP_SCORE
    return Analysis(
        duration_s=audio.duration_s,
        edges_s=edges_s,
        tempo_bpm=pulse.tempo_bpm,
        pulse_clarity=pulse.pulse_clarity,
        meter=found.meter,
        first=first,
        step=step,
        phrase_bars=_phrase_bars(points_s.size, sections, bar),
        silent=silent,
        scores=scores,
        natural=natural,
        has_ending=has_ending,
        spare_tail_s=spare_tail_s,
    )


def _scores(
    costs: Floats, penalties: Floats, sections: tuple[int, ...], bar: int, *, has_bars: bool
) -> tuple[Floats, Floats]:
    """How natural every join is, and the corrected score that the search uses; (points, points) each.

    `bar` is the number of points in a bar.
    """
    n = costs.shape[0]
    leave, enter = np.arange(n, dtype=np.int32)[:, None], np.arange(n, dtype=np.int32)
    distance = leave - enter
    possible = np.abs(distance) >= min(bar, max(1, n // 4))
    possible &= distance % bar == 0 if has_bars else enter > 0  # no sound before it could be faded in
    possible &= (leave > 0) & (leave < n - 1) & (enter < n - 1)
    typical = float(np.median(costs[possible])) if possible.any() else 0.0
    natural = (1.0 - costs / max(typical, 1e-6) - penalties).astype(np.float32)
    scores = natural.copy()
    if has_bars:
        scores -= np.asarray(ODD_BARS_PENALTIES, np.float32)[distance // bar % PHRASE_BARS]
    boundary = np.isin(np.arange(n), sections).astype(np.float32)
    scores += SECTION_BONUS * (boundary[:, None] + boundary)
    step_back = STEP_BACK_PENALTY * np.clip((8 - distance / bar) / 7, 0, 1)
    scores -= np.where(distance > 0, step_back, 0.0).astype(np.float32)
    scores[~possible] = -np.inf
    return natural, scores


def _phrase_bars(n_points: int, sections: tuple[int, ...], bar: int) -> tuple[int, ...]:
    """How many bars before each point a phrase began; every section begins one, `bar` is in points."""
    starts = [0, *sections, n_points]
    return tuple(
        (point - start) // bar % PHRASE_BARS
        for start, stop in itertools.pairwise(starts)
        for point in range(start, stop)
    )


def _whole_bars(edges_s: Doubles, duration_s: float, meter: int) -> tuple[Doubles, int] | None:
    """The edges and the meter of a track that is whole bars from its first sample to its last, as loops are.

    None: it isn't. Its last beats are extrapolated, so its end counts more. The meter found in few bars is
    often wrong: one that does not divide the beats gives way to four, the most common one.
    """
    whole = np.append(edges_s[edges_s < duration_s - LOOP_END_S], duration_s)
    last_s, beat_s = whole[-1] - whole[-2], float(np.median(np.diff(edges_s)))
    if edges_s[0] > 0.0 or abs(last_s - beat_s) > LOOP_END_S:
        return None
    fitting = (count for count in (meter, 4) if (whole.size - 1) % count == 0)
    return next(((whole, count) for count in fitting), None)


def _ending(mono: Floats) -> tuple[bool, float]:
    """Whether the track comes to an end, and how many seconds of its final decay may be left out."""
    frame = round(LEVEL_S * spectra.RATE_HZ)
    n_frames = mono.size // frame
    if n_frames < 4:
        return False, 0.0
    power = (mono[-n_frames * frame :].astype(np.float64) ** 2).reshape(n_frames, frame).mean(axis=1)
    level_db = 10 * np.log10(np.maximum(power, 1e-12))
    median_db = float(np.median(level_db))
    if level_db[-1] > median_db + QUIET_DB:
        return False, 0.0
    loud = np.flatnonzero(level_db > median_db + DECAY_DB)
    decay_s = (n_frames - 1 - loud[-1]) * LEVEL_S
    return True, max(0.0, float(decay_s) - PLAYED_DECAY_S)
