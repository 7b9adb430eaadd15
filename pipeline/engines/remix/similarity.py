"""How natural it sounds to leave a track at one edge and to enter it at another.

A join leaves at edge i and enters at edge j. It is good if the beats before i resemble those before j and
the beats after i resemble those after j. The beats to both sides are therefore compared along the diagonal
of the self-similarity matrix (Foote 1999); the nearest have the largest weights.

It is bad, however similar the beats, if sound breaks off or the level jumps. Sound that lasts across an
edge is, in each band, the smaller of its magnitudes before and after it. What lasts across i but is not
there after j breaks off; what lasts across j but was not there before i sets in without an attack.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.music.spectra import FRAME_RATE_HZ, RATE_HZ, Doubles, Floats

CONTEXT_BEATS = 8  # to either side of a join
CONTEXT_FADE = 3.0  # beats: Gaussian width of the context's weights
BEFORE_S, AFTER_S = (-0.15, -0.02), (0.03, 0.2)  # around an edge, without the attack: what lasts across it
LEVEL_S = 1.0  # to either side of an edge, over which its level is measured
SILENCE_DB = -60.0  # levels below count as this
# Weights of the penalties, against a similarity of 1: from a logistic regression, on 27 tracks, of which of
# 2700 joins a classifier of cut and uncut music took for cut.
BREAK_OFF, SET_IN, LEVEL_STEP = 4.0, 1.5, 0.1  # per unit of log-compressed magnitude; per dB


def join_costs(distances: Floats) -> Floats:
    """Cost of leaving at edge i and entering at edge j, (edges, edges): weighted mean of beat distances.

    Edge i lies before beat i. Near the track's ends only the beats that exist are compared.
    """
    n = distances.shape[0]
    total, weight = np.zeros((n + 1, n + 1), np.float32), np.zeros((n + 1, n + 1), np.float32)
    for beat in range(-CONTEXT_BEATS, CONTEXT_BEATS):
        share = np.float32(np.exp(-0.5 * ((beat + 0.5) / CONTEXT_FADE) ** 2))
        low, high = max(0, -beat), min(n + 1, n - beat)
        if low >= high:
            continue
        inside = slice(low, high)
        shifted = slice(low + beat, high + beat)
        total[inside, inside] += share * distances[shifted, shifted]
        weight[inside, inside] += share
    return np.asarray(total / np.maximum(weight, 1e-9), np.float32)


def break_penalties(mel: Floats, levels_db: tuple[Floats, Floats], times_s: Doubles) -> Floats:
    """Penalty, from 0, for what breaks between leaving at one time and entering at another; (times, times).

    `mel` is the log-compressed spectrum of `spectra.Spectra`; `levels_db`: see `levels_around`.
    """
    before, after = (_band_means(mel, times_s, span) for span in (BEFORE_S, AFTER_S))
    lasting = np.minimum(before, after)
    penalty = np.zeros((times_s.size, times_s.size), np.float32)
    for band in range(mel.shape[0]):
        penalty += BREAK_OFF * np.maximum(0.0, lasting[band][:, None] - after[band])
        penalty += SET_IN * np.maximum(0.0, lasting[band] - before[band][:, None])
    penalty /= mel.shape[0]
    level_before, level_after = levels_db
    step = np.minimum(
        np.abs(level_before[:, None] - level_before), np.abs(level_after[:, None] - level_after)
    )  # a step that the track makes itself, at either edge, is no fault
    return np.asarray(penalty + LEVEL_STEP * step, np.float32)


def _band_means(mel: Floats, times_s: Doubles, span_s: tuple[float, float]) -> Floats:
    """Mean magnitude of each band in a span around each time, (bands, times)."""
    frames = np.round((times_s[:, None] + np.array(span_s)) * FRAME_RATE_HZ).astype(np.int64)
    start, stop = np.clip(frames, 0, mel.shape[1] - 1).T
    stop = np.maximum(stop, start + 1)
    sums = np.pad(np.cumsum(mel, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
    return np.asarray((sums[:, stop] - sums[:, start]) / (stop - start), np.float32)


def levels_around(mono: Floats, times_s: Doubles) -> tuple[Floats, Floats]:
    """Level before and after each time, dB, at least SILENCE_DB; (times,) each.

    Inside the track only, so both are equal at its ends. `mono` is the sound at RATE_HZ.
    """
    power = np.pad(np.cumsum(mono.astype(np.float64) ** 2), (1, 0))
    at = np.round(times_s * RATE_HZ).astype(np.int64)
    reach = round(LEVEL_S * RATE_HZ)

    def level(start: NDArray[np.int64], stop: NDArray[np.int64]) -> Floats:
        start, stop = np.clip(start, 0, mono.size), np.clip(stop, 0, mono.size)
        mean = (power[stop] - power[start]) / np.maximum(stop - start, 1)
        return np.asarray(np.maximum(10 * np.log10(np.maximum(mean, 1e-12)), SILENCE_DB), np.float32)

    before, after = level(at - reach, at), level(at, at + reach)
    return np.where(at <= 0, after, before), np.where(at >= mono.size, before, after)
