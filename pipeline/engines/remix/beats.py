"""Tempo and beat times of a track, and whether it has beats at all.

Tempo: the beat period whose first four multiples the autocorrelation of the onset envelope favours
most, under a log-normal prior over tempo (Ellis 2007, "Beat tracking by dynamic programming").
Beats: his dynamic programme. His beats sit on analysis frames and wander with the loudest onset
nearby; here they are fitted afterwards: to one even grid where the music keeps one (anything
sequenced or played to a click), else to short local lines. A last shift, the same for all beats, puts
them on the steepest rise of the sound itself.

Pulse clarity is the mean of the normalized autocorrelation over those multiples (after Lartillot et al.
2008, "Multi-feature modeling of pulse clarity"). Below CLEAR_PULSE the track gets an even grid instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

from pipeline.engines.remix.spectra import FRAME_RATE_HZ, RATE_HZ, Floats

Doubles = NDArray[np.float64]

SLOWEST_BPM, FASTEST_BPM = 55.0, 215.0
PRIOR_BPM, PRIOR_OCTAVES = 118.0, 0.9
MULTIPLES = 4  # of the beat period that vote for it
FINE_MULTIPLES = 24  # that sharpen it afterwards
CLEAR_PULSE = 0.16
LEAST_BEATS = 8  # fewer say nothing about a tempo
TIGHTNESS = 400.0  # of the beat tracker: how dearly it pays for leaving the tempo
STEADY_S = 0.006  # a grid is even when half of the beats lie closer to it than this
LOCAL_BEATS = 2  # to either side, of the line that smooths an uneven beat
NEAR_EDGE_S = 0.02  # a beat this close to the track's start or end lies on it
GRID_S = 0.5  # pseudo-beats of music without beats
STEP = 22  # samples, 1 ms: the resolution of the last shift
LEAST_GRID = 8  # pseudo-beats, however short the music


@dataclass(frozen=True, eq=False)
class Beats:
    """Edges between beats: beat k is heard from edges_s[k] to edges_s[k + 1]."""

    edges_s: Doubles  # (beats + 1,), rising, within the track
    tempo_bpm: float | None  # None: no beats, an even grid
    pulse_clarity: float  # -1 to 1


def find(onsets: Floats, mono: Floats) -> Beats:
    """The beats of mono sound at RATE_HZ, (samples,), with its onset strengths, (frames,)."""
    duration_s = mono.size / RATE_HZ
    envelope = _level(onsets)
    period, clarity = _period(envelope)
    if clarity < CLEAR_PULSE or duration_s * FRAME_RATE_HZ < LEAST_BEATS * period:
        n_beats = max(LEAST_GRID, round(duration_s / GRID_S))
        return Beats(np.linspace(0.0, duration_s, n_beats + 1), None, clarity)
    frames = _track(envelope, period)
    times_s = _fit(_sharpen(frames, envelope), period) / FRAME_RATE_HZ
    times_s = times_s + _attack_shift_s(times_s, mono)
    edges_s = _extend(times_s, duration_s)
    return Beats(edges_s, 60.0 / float(np.median(np.diff(edges_s))), clarity)


def _level(onsets: Floats) -> Doubles:
    """The envelope without its slow part and of unit deviation."""
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
    """Per lag, corrected for the overlap that shrinks with it, 1 at lag 0; up to half the length."""
    n = envelope.size
    spectrum = scipy.fft.rfft(envelope, scipy.fft.next_fast_len(2 * n))
    raw = scipy.fft.irfft(np.abs(spectrum) ** 2)[: max(2, n // 2)]
    smooth = gaussian_filter1d(raw / (n - np.arange(raw.size)), 1.0)
    return np.asarray(smooth / max(float(smooth[0]), 1e-12))


def _comb(correlation: Doubles, periods: Doubles, multiples: int) -> Doubles:
    """Mean of the autocorrelation at 1 to `multiples` times each period, as far as it reaches."""
    lags = periods[:, None] * np.arange(1, multiples + 1)
    inside = lags <= correlation.size - 1
    values = np.interp(lags, np.arange(correlation.size), correlation) * inside
    return np.asarray(values.sum(axis=1) / np.maximum(inside.sum(axis=1), 1))


def _track(envelope: Doubles, period: float) -> NDArray[np.int64]:
    """Ellis's dynamic programme: the frames of the beats."""
    local = gaussian_filter1d(envelope, period / 32)
    gaps = np.arange(round(period / 2), round(period * 2) + 1)
    price = -TIGHTNESS * np.log(gaps / period) ** 2
    reversed_price, first, last = price[::-1].copy(), int(gaps[0]), int(gaps[-1])
    total, before = local.copy(), np.full(local.size, -1, np.int64)
    padded = np.concatenate([np.zeros(last), total])  # a beat before the start costs nothing
    for frame in range(local.size):
        reachable = padded[frame : frame + last - first + 1] + reversed_price
        best = int(np.argmax(reachable))
        padded[last + frame] = local[frame] + reachable[best]
        before[frame] = frame - last + best
    total = padded[last:]
    frame = total.size - 1 - int(np.argmax(total[-round(period) :][::-1]))
    beats = []
    while frame >= 0:
        beats.append(frame)
        frame = int(before[frame])
    return np.array(beats[::-1], np.int64)


def _sharpen(frames: NDArray[np.int64], envelope: Doubles) -> Doubles:
    """Each beat on the nearest peak of the envelope within 4 frames, between frames by a parabola."""
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
    """Beats on one even grid if they keep it, else on local lines through their neighbours."""
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
    """Slope and intercept of the line of least absolute error, by reweighting."""
    weights = np.ones(x.size)
    slope, start = 1.0, 0.0
    for _ in range(12):
        slope, start = np.polynomial.Polynomial.fit(x, y, 1, w=np.sqrt(weights)).convert().coef[::-1]
        weights = 1.0 / np.maximum(np.abs(y - start - slope * x), 0.5)
    return float(slope), float(start)


def _attack_shift_s(times_s: Doubles, mono: Floats) -> float:
    """From the fitted beats to the steepest rise of level around them, within 40 ms, in seconds."""
    level = np.abs(mono[: mono.size // STEP * STEP]).reshape(-1, STEP).max(axis=1).astype(np.float64)
    rise = np.maximum(0.0, np.diff(gaussian_filter1d(np.log1p(20 * level), 2.0), prepend=0.0))
    shifts = np.arange(-40, 41)
    index = np.round(times_s * (RATE_HZ / STEP)).astype(np.int64)[:, None] + shifts
    mean_rise = rise[np.clip(index, 0, rise.size - 1)].mean(axis=0)
    return float(shifts[np.argmax(mean_rise)]) * STEP / RATE_HZ


def _extend(times_s: Doubles, duration_s: float) -> Doubles:
    """The beats carried on at their end tempos to the edges of the track."""
    head, tail = times_s[1] - times_s[0], times_s[-1] - times_s[-2]
    before = times_s[0] - head * np.arange(int(times_s[0] / head) + 1, 0, -1)
    after = times_s[-1] + tail * np.arange(1, int((duration_s - times_s[-1]) / tail) + 2)
    edges = np.concatenate([before, times_s, after])
    edges = edges[(edges >= -NEAR_EDGE_S) & (edges <= duration_s + NEAR_EDGE_S)]
    edges[edges <= NEAR_EDGE_S] = 0.0
    edges[edges >= duration_s - NEAR_EDGE_S] = duration_s
    return np.asarray(edges)
