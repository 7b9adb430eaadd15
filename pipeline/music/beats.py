"""Tempo, beat times and bar lines of a track, and whether it has beats at all.

A pulse is sought by the autocorrelation of the onset envelope in windows (a tempogram) and followed by
dynamic programming (Ellis 2007, "Beat tracking by dynamic programming") that lets its period change slowly,
as in Krebs, Böck and Widmer (2015, "An efficient state-space model for joint tempo and meter tracking").
Which multiple or fraction of the pulse is the beat, and where bars begin, is decided in `meter`; then the
beat itself is followed.

These beats lie on analysis frames and drift towards the loudest onset nearby, so they are fitted afterwards:
to even grids where the music keeps a steady tempo (anything sequenced or played to a click), otherwise to
short local lines. Finally all are shifted by one offset that puts them on the steepest rise of the level.

Pulse clarity is how similar the onsets of bars are. A track below LEAST_CLARITY gets evenly spaced
pseudo-beats instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.polynomial.polynomial import polyfit
from numpy.polynomial.polyutils import getdomain, mapparms
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, median_filter, uniform_filter1d

from pipeline.music.features import divide
from pipeline.music.meter import (
    BEAT_TICKS,
    FASTEST_BPM,
    OCTAVE_TICKS,
    PREFERRED_BPM,
    PULSE_TICKS,
    SLOWEST_BPM,
    find_bar_line,
    find_level,
    measure_rhythm,
)
from pipeline.music.spectra import FRAME_RATE_HZ, RATE_HZ, Doubles, Floats, Spectra

WINDOW_S = 8.0  # of the tempogram, so that four beats at 60 BPM are compared with the next four
MULTIPLES = 4  # of the pulse's period, over which the autocorrelation is averaged
PULSE_PRIOR_OCTAVES = 0.9  # standard deviation of the pulse's rate around the preferred tempo
LEAST_CLARITY = 0.22  # measured: noise, speech and pads up to 0.17, music with a beat from 0.34
MIN_BEATS = 7  # with fewer, pseudo-beats are used; of the eight of a loop of two bars often one is not found
END_BEATS = 8  # at either end, whose tempo is assumed beyond it
SHORTEST, LONGEST, N_INTERVALS = 0.7, 1.3, 41  # intervals between beats, relative to the typical one
TEMPO_CHANGE = 500.0  # cost of a squared change of the interval from beat to beat, in log units
TEMPO_OFFSET = 8.0  # the same of its difference from the typical interval
NEAR_FRAMES = 4  # an onset at most so far from a beat is the beat's ...
ONSET_STRENGTH = 0.5  # ... if it is this strong, in standard deviations
STEADY_S = 0.008  # beats are on an even grid if they are no further from it, by the median of ...
STEADY_BEATS = 9  # ... so many in sequence
CLOSE_S = 0.003  # beats this close to a line count alike when it is fitted
LOCAL_BEATS = 2  # neighbours to either side to which a local line is fitted
NEAR_EDGE_S = 0.02  # a beat this close to the track's start or end is moved onto it
GRID_S = 0.5  # length of a pseudo-beat
STEP = 22  # samples, 1 ms: resolution of the final shift
MIN_PSEUDO_BEATS = 8  # of the shortest track


@dataclass(frozen=True, eq=False)
class Beats:
    """Edges between beats: beat k lasts from edges_s[k] to edges_s[k + 1]."""

    edges_s: Doubles  # (beats + 1,), rising, within the track
    tempo_bpm: float | None  # None: the edges are pseudo-beats
    pulse_clarity: float  # -1 to 1
    meter: int  # beats a bar, 1 of pseudo-beats
    phase: int  # edge of the first bar line: 0 <= phase < meter


def track_beats(spectra: Spectra, mono: Floats) -> Beats:
    """The beats of mono sound at RATE_HZ, (samples,)."""
    duration_s = mono.size / RATE_HZ
    envelope = _normalized(spectra.onsets)
    period_s = _pulse_period_s(envelope)
    for candidates in (BEAT_TICKS, OCTAVE_TICKS):  # the second time the beat itself is followed
        pulse_s = _follow(envelope, period_s)
        if pulse_s.size < MIN_BEATS:
            return _pseudo_beats(duration_s, 0.0)
        ticks_s = divide(_extend(pulse_s, duration_s), PULSE_TICKS)
        rhythm = measure_rhythm(spectra, ticks_s)
        level = find_level(rhythm, candidates)
        period_s = level.beat * rhythm.tick_s
    if level.clarity < LEAST_CLARITY or ticks_s.size < MIN_BEATS * level.beat:
        return _pseudo_beats(duration_s, level.clarity)
    bar_line = find_bar_line(rhythm, level)
    rough_s = ticks_s[bar_line % level.beat :: level.beat]
    first_bar = (bar_line // level.beat - int((rough_s < 0.0).sum())) % level.meter
    times_s = _fit(*_heard(rough_s[(rough_s >= 0.0) & (rough_s <= duration_s)], envelope))
    times_s = times_s + _attack_shift_s(times_s, mono)
    edges_s = _within(_extend(times_s, duration_s), duration_s)
    tempo_bpm = 60.0 / float(np.median(np.diff(edges_s)))
    phase = int(np.argmin(np.abs(edges_s - times_s[first_bar]))) % level.meter
    return Beats(edges_s, tempo_bpm, level.clarity, level.meter, phase)


def _pseudo_beats(duration_s: float, clarity: float) -> Beats:
    n_beats = max(MIN_PSEUDO_BEATS, round(duration_s / GRID_S))
    return Beats(np.linspace(0.0, duration_s, n_beats + 1), None, clarity, 1, 0)


def _normalized(onsets: Floats) -> Doubles:
    """The onset envelope without its moving average, scaled to unit standard deviation."""
    slow = uniform_filter1d(onsets.astype(np.float64), max(3, round(1.5 * FRAME_RATE_HZ)), mode="nearest")
    flat = onsets - slow
    return np.asarray(flat / max(float(flat.std()), 1e-9))


def _pulse_period_s(envelope: Doubles) -> float:
    """The period at whose multiples the autocorrelation of the windows is highest."""
    size = round(WINDOW_S * FRAME_RATE_HZ)
    padded = np.pad(envelope, (0, max(0, size - envelope.size)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[:: size // 2]
    correlation = _autocorrelation(windows - windows.mean(axis=1, keepdims=True))
    periods = 60.0 * FRAME_RATE_HZ / np.geomspace(FASTEST_BPM, SLOWEST_BPM, 400)
    lags = periods[:, None] * np.arange(1, MULTIPLES + 1)
    inside = lags <= correlation.size - 1
    values = np.interp(lags, np.arange(correlation.size), correlation) * inside
    combs = values.sum(axis=1) / inside.sum(axis=1)
    octaves = np.log2(60.0 * FRAME_RATE_HZ / periods / PREFERRED_BPM)
    prior = np.exp(-0.5 * (octaves / PULSE_PRIOR_OCTAVES) ** 2)
    return float(periods[np.argmax(np.maximum(combs, 0.0) * prior)]) / FRAME_RATE_HZ


def _autocorrelation(windows: Doubles) -> Doubles:
    """Mean autocorrelation of (windows, frames), each of unit energy, for lags up to half the length."""
    n = windows.shape[1]
    spectra = scipy.fft.rfft(windows, scipy.fft.next_fast_len(2 * n), axis=1)
    raw = scipy.fft.irfft(np.abs(spectra) ** 2, axis=1)[:, : n // 2] / (n - np.arange(n // 2))
    quiet = 0.1 * raw[:, 0].mean() + 1e-12  # windows without onsets count less
    return np.asarray(gaussian_filter1d((raw / np.maximum(raw[:, :1], quiet)).mean(axis=0), 1.5))


def _follow(envelope: Doubles, period_s: float) -> Doubles:
    """The times, in s, of a pulse of about this period, which may change slowly.

    Ellis's dynamic programming, with the interval to the beat before as part of the state, so that what costs
    is a change between successive intervals. Scores of a block of frames depend on earlier blocks alone.
    """
    period = period_s * FRAME_RATE_HZ
    local = gaussian_filter1d(envelope, period / 32)
    intervals = np.unique(np.round(period * np.geomspace(SHORTEST, LONGEST, N_INTERVALS)).astype(np.int64))
    logs = np.log(intervals)
    change = -TEMPO_CHANGE * (logs[:, None] - logs) ** 2  # (interval before, interval after)
    offset = -TEMPO_OFFSET * (logs - np.log(period)) ** 2
    n, first, last = local.size, int(intervals[0]), int(intervals[-1])
    leaving = np.zeros((last + n, intervals.size))  # best score before an interval; 0 before the start
    score, before = np.empty((n, intervals.size)), np.empty((n, intervals.size), np.int64)
    for start in range(0, n, first):
        block = np.arange(start, min(n, start + first))
        arrived = leaving[block[:, None] + last - intervals, np.arange(intervals.size)]
        score[block] = local[block, None] + offset + arrived
        through = score[block][:, :, None] + change
        best = through.argmax(axis=1)
        before[block] = best
        leaving[block + last] = np.take_along_axis(through, best[:, None], axis=1)[:, 0]
    frame = n - 1 - int(np.argmax(score[-round(period) :].max(axis=1)[::-1]))
    k = int(score[frame].argmax())
    beats = [frame]
    while (frame := frame - int(intervals[k])) >= 0:
        k = int(before[frame, k])
        beats.append(frame)
    return np.array(beats[::-1]) / FRAME_RATE_HZ


def _heard(times_s: Doubles, envelope: Doubles) -> tuple[Doubles, NDArray[np.bool_]]:
    """Each beat moved to the onset near it, between frames, and which beats have such an onset."""
    smooth = gaussian_filter1d(envelope, 1.0)
    at = np.round(times_s * FRAME_RATE_HZ).astype(np.int64)
    at = np.clip(at, NEAR_FRAMES + 1, smooth.size - NEAR_FRAMES - 2)
    near = at[:, None] + np.arange(-NEAR_FRAMES, NEAR_FRAMES + 1)
    peak = near[np.arange(at.size), smooth[near].argmax(axis=1)]
    left, middle, right = smooth[peak - 1], smooth[peak], smooth[peak + 1]
    heard = (middle >= ONSET_STRENGTH) & (middle >= left) & (middle >= right)
    shift = 0.5 * (left - right) / np.minimum(left - 2 * middle + right, -1e-9)
    return np.where(heard, (peak + shift) / FRAME_RATE_HZ, times_s), heard


def _fit(times_s: Doubles, heard: NDArray[np.bool_]) -> Doubles:
    """Beats on even grids wherever the tempo is steady, on lines fitted to their neighbours elsewhere."""
    index = np.arange(times_s.size, dtype=np.float64)
    if heard.sum() >= STEADY_BEATS:
        slope, start = _line(index[heard], times_s[heard])
        apart_s = np.abs(times_s - start - slope * index)[heard]
        if median_filter(apart_s, STEADY_BEATS, mode="nearest").max() <= STEADY_S:
            return np.asarray(start + slope * index)
    half = times_s.size // 2
    if half >= 2 * STEADY_BEATS:
        return np.concatenate([_fit(times_s[:half], heard[:half]), _fit(times_s[half:], heard[half:])])
    near = [slice(max(0, k - LOCAL_BEATS), k + LOCAL_BEATS + 1) for k in range(times_s.size)]
    lines = [_line(index[part], times_s[part]) for part in near]
    return np.array([start + slope * k for k, (slope, start) in enumerate(lines)])


def _line(x: Doubles, y: Doubles) -> tuple[float, float]:
    """Slope and intercept of the line of least absolute error, by iteratively reweighted least squares."""
    offset, scale = mapparms(getdomain(x), (-1.0, 1.0))  # as Polynomial.fit, of which this is the quick part
    scaled, weights = offset + scale * x, np.ones(x.size)
    slope, start = 1.0, 0.0
    for _ in range(12):
        level, rise = polyfit(scaled, y, 1, w=np.sqrt(weights))
        slope, start = rise * scale, level + rise * offset
        weights = 1.0 / np.maximum(np.abs(y - start - slope * x), CLOSE_S)
    return float(slope), float(start)


def _attack_shift_s(times_s: Doubles, mono: Floats) -> float:
    """The shift, within 40 ms, at which the level around the beats rises most steeply on average."""
    level = np.abs(mono[: mono.size // STEP * STEP]).reshape(-1, STEP).max(axis=1).astype(np.float64)
    rise = np.maximum(0.0, np.diff(gaussian_filter1d(np.log1p(20 * level), 2.0), prepend=0.0))
    shifts = np.arange(-40, 41)
    index = np.round(times_s * (RATE_HZ / STEP)).astype(np.int64)[:, None] + shifts
    mean_rise = rise[np.clip(index, 0, rise.size - 1)].mean(axis=0)
    return float(shifts[np.argmax(mean_rise)]) * STEP / RATE_HZ


def _extend(times_s: Doubles, duration_s: float) -> Doubles:
    """The beats extrapolated beyond both ends of the track at the tempo of the first and the last beats."""
    head = float(np.median(np.diff(times_s[:END_BEATS])))
    tail = float(np.median(np.diff(times_s[-END_BEATS:])))
    before = times_s[0] - head * np.arange(int(times_s[0] / head) + 1, 0, -1)
    after = times_s[-1] + tail * np.arange(1, int((duration_s - times_s[-1]) / tail) + 2)
    return np.concatenate([before, times_s, after])


def _within(edges_s: Doubles, duration_s: float) -> Doubles:
    """The beats inside of the track; those very near to its start or end are moved there."""
    inside = edges_s[(edges_s >= -NEAR_EDGE_S) & (edges_s <= duration_s + NEAR_EDGE_S)]
    inside[inside <= NEAR_EDGE_S] = 0.0
    inside[inside >= duration_s - NEAR_EDGE_S] = duration_s
    return np.asarray(inside)
