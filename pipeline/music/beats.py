"""Tempo and beat times of a track, and whether it has beats at all.

Tempo: the beat period with the highest mean autocorrelation of the onset envelope over its first four
multiples, weighted by a log-normal prior over tempo (Ellis 2007, "Beat tracking by dynamic programming").
Beats: dynamic programming as in the same paper. These beats lie on analysis frames and drift towards
the loudest onset nearby, so they are fitted afterwards: to one even grid where the music keeps a steady
tempo (anything sequenced or played to a click), otherwise to short local lines. Finally all beats are
shifted by one offset that puts them on the steepest rise of the level.

Pulse clarity is the mean of the normalized autocorrelation over the four multiples (after Lartillot et al.
2008, "Multi-feature modeling of pulse clarity"). A track below CLEAR_PULSE gets evenly spaced
pseudo-beats instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

from pipeline.music.spectra import FRAME_RATE_HZ, RATE_HZ, Doubles, Floats

SLOWEST_BPM, FASTEST_BPM = 55.0, 215.0
PRIOR_BPM, PRIOR_OCTAVES = 118.0, 0.9
MULTIPLES = 4  # of the beat period, over which the autocorrelation is averaged
FINE_MULTIPLES = 24  # the same for the final refinement of the period
CLEAR_PULSE = 0.16
MIN_BEATS = 8  # with fewer the tempo is unreliable and pseudo-beats are used
TIGHTNESS = 400.0  # weight of the beat tracker's penalty for intervals off the tempo
STEADY_S = 0.006  # the tempo is steady if the median distance of the beats from an even grid is less
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


def track_beats(onsets: Floats, mono: Floats) -> Beats:
    """The beats of mono sound at RATE_HZ, (samples,); `onsets` are its onset strengths, (frames,)."""
    duration_s = mono.size / RATE_HZ
    envelope = _normalized(onsets)
    period, clarity = _period(envelope)
    if clarity < CLEAR_PULSE or duration_s * FRAME_RATE_HZ < MIN_BEATS * period:
        n_beats = max(MIN_PSEUDO_BEATS, round(duration_s / GRID_S))
        return Beats(np.linspace(0.0, duration_s, n_beats + 1), None, clarity)
    frames = _beat_frames(envelope, period)
    times_s = _fit(_interpolated(frames, envelope), period) / FRAME_RATE_HZ
    times_s = times_s + _attack_shift_s(times_s, mono)
    edges_s = _extend(times_s, duration_s)
    return Beats(edges_s, 60.0 / float(np.median(np.diff(edges_s))), clarity)


def _normalized(onsets: Floats) -> Doubles:
    """The onset envelope without its moving average, scaled to unit standard deviation."""
    slow = uniform_filter1d(onsets.astype(np.float64), max(3, round(1.5 * FRAME_RATE_HZ)), mode="nearest")
    flat = onsets - slow
    return np.asarray(flat / max(float(flat.std()), 1e-9))


def _period(envelope: Doubles) -> tuple[float, float]:
    """Beat period in frames, and the pulse clarity."""
    correlation = _autocorrelation(envelope)
    periods = 60.0 * FRAME_RATE_HZ / np.geomspace(FASTEST_BPM, SLOWEST_BPM, 800)
    combs = _comb(correlation, periods, MULTIPLES)
    octaves = np.log2(60.0 * FRAME_RATE_HZ / periods / PRIOR_BPM)
    best = periods[np.argmax(np.maximum(combs, 0.0) * np.exp(-0.5 * (octaves / PRIOR_OCTAVES) ** 2))]
    fine = best * np.linspace(0.97, 1.03, 241)
    best = fine[np.argmax(_comb(correlation, fine, MULTIPLES))]
    fine = best * np.linspace(0.994, 1.006, 241)
    sharp = fine[np.argmax(_comb(correlation, fine, FINE_MULTIPLES))]
    return float(sharp), float(_comb(correlation, np.array([sharp]), MULTIPLES)[0])


def _autocorrelation(envelope: Doubles) -> Doubles:
    """For lags up to half the length, divided by the number of overlapping frames; 1 at lag 0."""
    n = envelope.size
    spectrum = scipy.fft.rfft(envelope, scipy.fft.next_fast_len(2 * n))
    raw = scipy.fft.irfft(np.abs(spectrum) ** 2)[: max(2, n // 2)]
    smooth = gaussian_filter1d(raw / (n - np.arange(raw.size)), 1.0)
    return np.asarray(smooth / max(float(smooth[0]), 1e-12))


def _comb(correlation: Doubles, periods: Doubles, multiples: int) -> Doubles:
    """Mean of the autocorrelation at 1 to `multiples` times each period, without lags beyond its end."""
    lags = periods[:, None] * np.arange(1, multiples + 1)
    inside = lags <= correlation.size - 1
    values = np.interp(lags, np.arange(correlation.size), correlation) * inside
    return np.asarray(values.sum(axis=1) / np.maximum(inside.sum(axis=1), 1))


def _beat_frames(envelope: Doubles, period: float) -> NDArray[np.int64]:
    """The frames of the beats by Ellis's dynamic programming."""
    local = gaussian_filter1d(envelope, period / 32)
    gaps = np.arange(round(period / 2), round(period * 2) + 1)
    penalty = -TIGHTNESS * np.log(gaps / period) ** 2
    reversed_penalty, first, last = penalty[::-1].copy(), int(gaps[0]), int(gaps[-1])
    previous = np.full(local.size, -1, np.int64)
    total = np.concatenate([np.zeros(last), local])  # zeros: the first beat has no predecessor and no penalty
    for frame in range(local.size):
        reachable = total[frame : frame + last - first + 1] + reversed_penalty
        best = int(np.argmax(reachable))
        total[last + frame] = local[frame] + reachable[best]
        previous[frame] = frame - last + best
    frame = local.size - 1 - int(np.argmax(total[last:][-round(period) :][::-1]))
    beats = []
    while frame >= 0:
        beats.append(frame)
        frame = int(previous[frame])
    return np.array(beats[::-1], np.int64)


def _interpolated(frames: NDArray[np.int64], envelope: Doubles) -> Doubles:
    """Each beat moved to the envelope's peak within 4 frames, by parabolic interpolation between frames."""
    smooth = gaussian_filter1d(envelope, 1.0)
    out = frames.astype(np.float64)
    for k, frame in enumerate(frames):
        low, high = max(1, frame - 4), min(smooth.size - 1, frame + 5)
        if high - low < 3:
            continue
        peak = low + int(np.argmax(smooth[low:high]))
        left, mid, right = smooth[peak - 1], smooth[peak], smooth[min(peak + 1, smooth.size - 1)]
        curve = left - 2 * mid + right
        out[k] = peak + (0.5 * (left - right) / curve if curve < 0 and mid >= max(left, right) else 0.0)
    return out


def _fit(times: Doubles, period: float) -> Doubles:
    """Beats on one even grid if the tempo is steady, otherwise on lines fitted to their neighbours."""
    steps = np.maximum(1, np.round(np.diff(times) / period)).astype(np.int64)
    index = np.concatenate([[0], np.cumsum(steps)])
    slope, start = _line(index.astype(np.float64), times)
    grid = np.arange(index[-1] + 1)
    if np.median(np.abs(times - (start + slope * index))) <= STEADY_S * FRAME_RATE_HZ:
        return np.asarray(start + slope * grid)
    filled = np.interp(grid, index, times)
    out = np.empty(grid.size)
    for k in grid:
        near = slice(max(0, k - LOCAL_BEATS), k + LOCAL_BEATS + 1)
        slope, start = _line(grid[near].astype(np.float64), filled[near])
        out[k] = start + slope * k
    return out


def _line(x: Doubles, y: Doubles) -> tuple[float, float]:
    """Slope and intercept of the line of least absolute error, by iteratively reweighted least squares."""
    weights = np.ones(x.size)
    slope, start = 1.0, 0.0
    for _ in range(12):
        slope, start = np.polynomial.Polynomial.fit(x, y, 1, w=np.sqrt(weights)).convert().coef[::-1]
        weights = 1.0 / np.maximum(np.abs(y - start - slope * x), 0.5)
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
    """The beats extrapolated to both ends of the track at the tempo of the first and the last beat."""
    head, tail = times_s[1] - times_s[0], times_s[-1] - times_s[-2]
    before = times_s[0] - head * np.arange(int(times_s[0] / head) + 1, 0, -1)
    after = times_s[-1] + tail * np.arange(1, int((duration_s - times_s[-1]) / tail) + 2)
    edges = np.concatenate([before, times_s, after])
    edges = edges[(edges >= -NEAR_EDGE_S) & (edges <= duration_s + NEAR_EDGE_S)]
    edges[edges <= NEAR_EDGE_S] = 0.0
    edges[edges >= duration_s - NEAR_EDGE_S] = duration_s
    return np.asarray(edges)
