"""All that is known of a track before it is asked for anything: beats, bars, possible joins, its ending."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.remix import bars, beats, similarity, spectra
from pipeline.records import Audio

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

OFF_DOWNBEAT = 0.1  # what a join loses that is not on a downbeat
ODD_BARS = (0.0, 0.06, 0.03, 0.06)  # what it loses by the bars it skips, modulo four: phrases have four
JUST_HEARD = 0.3  # what it loses by going back one bar; less for more bars, nothing for eight
AT_SECTION = 0.06  # what it gains for leaving where a section ends, and again for entering where one begins
LOOP_SCORE = 0.8  # of going from the very end to the very start of a track that is made to loop
LEVEL_S = 0.05  # resolution of the level that shows how the track ends
QUIET_DB = -30.0  # below the track's usual level: an ending, not a cut
RINGING_DB = -9.0  # below the usual level for good: the last sound dies away
KEPT_RING_S = 0.4  # of the dying away that is always played


@dataclass(frozen=True, eq=False)
class Analysis:
    """One track; times in seconds of the source, edges as indices of `edges_s`."""

    duration_s: float
    edges_s: Doubles  # (beats + 1,)
    tempo_bpm: float | None  # None: no beats
    pulse_clarity: float
    meter: int
    sections: tuple[int, ...]
    scores: Floats  # (beats + 1, beats + 1): of leaving at the first edge to enter at the second; -inf: never
    similarities: Floats  # the same without preferences: 1 alike, 0 as different as the track's typical pair
    ends: bool  # it comes to an end, rather than being cut off or looping
    spare_tail_s: float  # how much of its end may be faded away

    @property
    def n_beats(self) -> int:
        return self.edges_s.size - 1


def analyse(audio: Audio) -> Analysis:
    """Analyse a track of any length and rate."""
    mono = _at_analysis_rate(audio)
    heard = spectra.measure(mono)
    pulse = beats.find(heard.onsets, mono)
    features = similarity.describe(heard, pulse.edges_s)
    apart = similarity.distances(features)
    lines = bars.find(features, apart) if pulse.tempo_bpm else bars.without_beats(apart)
    similarities, scores = _scores(similarity.join_costs(apart), lines)
    ends, spare_s = _ending(mono)
    if pulse.tempo_bpm and not ends and _whole_bars(pulse.edges_s, audio.duration_s, lines.meter):
        similarities[-1, 0] = scores[-1, 0] = LOOP_SCORE
    return Analysis(
        duration_s=audio.duration_s,
        edges_s=pulse.edges_s,
        tempo_bpm=pulse.tempo_bpm,
        pulse_clarity=pulse.pulse_clarity,
        meter=lines.meter,
        sections=lines.sections,
        scores=scores,
        similarities=similarities,
        ends=ends,
        spare_tail_s=spare_s,
    )


def _at_analysis_rate(audio: Audio) -> Floats:
    import soxr

    mono = np.ascontiguousarray(audio.mono(), dtype=np.float32)
    if audio.sample_rate == spectra.RATE_HZ:
        return mono
    return np.asarray(soxr.resample(mono, audio.sample_rate, spectra.RATE_HZ), dtype=np.float32)


def _scores(costs: Floats, lines: bars.Bars) -> tuple[Floats, Floats]:
    """Similarity of every two edges as a join, and the score the search goes by."""
    n = costs.shape[0]
    leave, enter = np.arange(n, dtype=np.int32)[:, None], np.arange(n, dtype=np.int32)
    distance = leave - enter
    least = lines.meter if lines.meter > 1 else max(1, min(4, n // 4))
    possible = (distance % lines.meter == 0) & (np.abs(distance) >= least)
    possible &= (leave > 0) & (leave < n - 1) & (enter < n - 1)
    typical = float(np.median(costs[possible])) if possible.any() else 0.0
    similarities = (1.0 - costs / max(typical, 1e-6)).astype(np.float32)
    scores = similarities.copy()
    if lines.meter > 1:
        scores -= np.where((leave - lines.phase) % lines.meter == 0, 0.0, OFF_DOWNBEAT).astype(np.float32)
        scores -= np.asarray(ODD_BARS, np.float32)[distance // lines.meter % 4]
    new = np.isin(np.arange(n), lines.sections).astype(np.float32)
    scores += AT_SECTION * (new[:, None] + new)
    back_bars = distance / max(lines.meter, 3)
    scores -= np.where(distance > 0, JUST_HEARD * np.clip((8 - back_bars) / 7, 0, 1), 0.0).astype(np.float32)
    scores[~possible] = -np.inf
    return similarities, scores


def _whole_bars(edges_s: Doubles, duration_s: float, meter: int) -> bool:
    """Whether the track is whole bars from its first sample to its last, as loops are."""
    near = beats.NEAR_EDGE_S
    return bool((len(edges_s) - 1) % meter == 0 and edges_s[0] <= near and edges_s[-1] >= duration_s - near)


def _ending(mono: Floats) -> tuple[bool, float]:
    """Whether the track comes to an end, and how many seconds of its dying away can be spared."""
    frame = round(LEVEL_S * spectra.RATE_HZ)
    n_frames = mono.size // frame
    if n_frames < 4:
        return False, 0.0
    power = (mono[-n_frames * frame :].astype(np.float64) ** 2).reshape(n_frames, frame).mean(axis=1)
    level_db = 10 * np.log10(np.maximum(power, 1e-12))
    usual_db = float(np.median(level_db))
    if level_db[-1] > usual_db + QUIET_DB:
        return False, 0.0
    loud = np.flatnonzero(level_db > usual_db + RINGING_DB)
    ring_s = (n_frames - 1 - loud[-1]) * LEVEL_S
    return True, max(0.0, float(ring_s) - KEPT_RING_S)
