"""The analysis of a track, shared by all its requests: beats, bars, sections, possible joins, the ending."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.engines.remix.similarity import join_costs
from pipeline.music import bars, beats, features, spectra
from pipeline.music.spectra import Doubles, Floats
from pipeline.records import Audio

# Corrections of a join's score
OFF_DOWNBEAT_PENALTY = 0.1  # the join is not on a downbeat
ODD_BARS_PENALTIES = (0.0, 0.06, 0.03, 0.06)  # by the bars it skips, modulo four: phrases often have four
STEP_BACK_PENALTY = 0.3  # it goes back by one bar; falls to 0 at eight bars
SECTION_BONUS = 0.06  # it leaves at the end of a section; the same for entering at the start of one
LOOP_SCORE = 0.8  # score of joining the end to the start of a track that is cut as a loop
# The ending
LEVEL_S = 0.05  # frame length of the level curve
QUIET_DB = -30.0  # a track that stops this far below its median level has an ending
DECAY_DB = -9.0  # the final decay begins where the level falls this far below the median for good
PLAYED_DECAY_S = 0.4  # part of the decay that is always played


@dataclass(frozen=True, eq=False)
class Analysis:
    """One track; times are seconds of the source, edges are indices of `edges_s`."""

    duration_s: float
    edges_s: Doubles  # (beats + 1,)
    tempo_bpm: float | None  # None: the edges are pseudo-beats
    pulse_clarity: float
    meter: int
    sections: tuple[int, ...]
    scores: (
        Floats  # (beats + 1, beats + 1), of leaving at the first edge and entering at the second; -inf: never
    )
    similarities: Floats  # scores before corrections: 1 for equal contexts, 0 for a typical pair
    has_ending: bool  # it comes to an end, rather than being cut off or looping
    spare_tail_s: float  # how much of the final decay may be left out

    @property
    def n_beats(self) -> int:
        return self.edges_s.size - 1


def analyse(audio: Audio) -> Analysis:
    """Analyse a track of any length and rate."""
    mono = _at_analysis_rate(audio)
    spectrum = spectra.compute_spectra(mono)
    pulse = beats.track_beats(spectrum, mono)
    of_beats = features.beat_features(spectrum, pulse.edges_s)
    distances = features.beat_distances(of_beats)
    found = (
        bars.find_bars(distances, pulse.meter, pulse.phase)
        if pulse.tempo_bpm
        else bars.bars_of_pseudo_beats(distances)
    )
    similarities, scores = _scores(join_costs(distances), found)
    has_ending, spare_tail_s = _ending(mono)
    if pulse.tempo_bpm and not has_ending and _is_whole_bars(pulse.edges_s, audio.duration_s, found.meter):
        similarities[-1, 0] = scores[-1, 0] = LOOP_SCORE
    return Analysis(
        duration_s=audio.duration_s,
        edges_s=pulse.edges_s,
        tempo_bpm=pulse.tempo_bpm,
        pulse_clarity=pulse.pulse_clarity,
        meter=found.meter,
        sections=found.sections,
        scores=scores,
        similarities=similarities,
        has_ending=has_ending,
        spare_tail_s=spare_tail_s,
    )


def _at_analysis_rate(audio: Audio) -> Floats:
    import soxr

    mono = np.ascontiguousarray(audio.mono(), dtype=np.float32)
    if audio.sample_rate == spectra.RATE_HZ:
        return mono
    return np.asarray(soxr.resample(mono, audio.sample_rate, spectra.RATE_HZ), dtype=np.float32)


def _scores(costs: Floats, found: bars.Bars) -> tuple[Floats, Floats]:
    """For every join its similarity, and the corrected score that the search uses; (edges, edges) each."""
    n = costs.shape[0]
    leave, enter = np.arange(n, dtype=np.int32)[:, None], np.arange(n, dtype=np.int32)
    distance = leave - enter
    meter = found.meter
    least = meter if meter > 1 else max(1, min(4, n // 4))
    possible = (distance % meter == 0) & (np.abs(distance) >= least)
    possible &= (leave > 0) & (leave < n - 1) & (enter < n - 1)
    typical = float(np.median(costs[possible])) if possible.any() else 0.0
    similarities = (1.0 - costs / max(typical, 1e-6)).astype(np.float32)
    scores = similarities.copy()
    if meter > 1:
        off_downbeat = (leave - found.phase) % meter != 0
        scores -= np.where(off_downbeat, OFF_DOWNBEAT_PENALTY, 0.0).astype(np.float32)
        scores -= np.asarray(ODD_BARS_PENALTIES, np.float32)[distance // meter % 4]
    boundary = np.isin(np.arange(n), found.sections).astype(np.float32)
    scores += SECTION_BONUS * (boundary[:, None] + boundary)
    bars_back = distance / max(meter, 3)
    step_back = STEP_BACK_PENALTY * np.clip((8 - bars_back) / 7, 0, 1)
    scores -= np.where(distance > 0, step_back, 0.0).astype(np.float32)
    scores[~possible] = -np.inf
    return similarities, scores


def _is_whole_bars(edges_s: Doubles, duration_s: float, meter: int) -> bool:
    """Whether the track consists of whole bars from its first sample to its last, as loops do."""
    near = beats.NEAR_EDGE_S
    return bool((len(edges_s) - 1) % meter == 0 and edges_s[0] <= near and edges_s[-1] >= duration_s - near)


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
