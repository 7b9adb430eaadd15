"""What is heard in each beat, and how alike the surroundings of two beats are.

Per beat: harmony (chroma), timbre (shape of the log spectrum), rhythm (onsets of the low, middle and high
bands) and loudness, each in parts of the beat, so that a note on the off-beat is not one on the beat (beat-
synchronous features: Ellis and Poliner 2007; Jehan 2005). Distances of each kind are divided by their own
median over the track before they are summed: the unit is "two beats of this track taken at random".

A join plays what led up to edge i and goes on with what follows edge j. It is good when what is heard
before i is like what led up to j, and what would have followed i is like what follows j, so the beats to both
sides are compared along the diagonal of the self-similarity matrix (Foote 1999), the nearest weighing most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from pipeline.engines.remix.spectra import FRAME_RATE_HZ, N_PITCHES, TONE_RATE_HZ, Floats, Spectra

Doubles = NDArray[np.float64]

TONE_PARTS, ONSET_PARTS = 2, 4  # parts of a beat
N_TIMBRE = 12  # cosine coefficients of the mel spectrum, after the first
WEIGHTS = {"harmony": 0.4, "timbre": 0.3, "rhythm": 0.2, "loudness": 0.1}
CONTEXT_BEATS = 8  # to either side of a join
CONTEXT_FADE = 3.0  # beats: Gaussian width of the context's weights


@dataclass(frozen=True, eq=False)
class Features:
    """One row per beat."""

    harmony: Floats  # (beats, 12 * TONE_PARTS), each part of unit length
    timbre: Floats  # (beats, N_TIMBRE * TONE_PARTS)
    rhythm: Floats  # (beats, 3 * ONSET_PARTS): low, middle, high
    loudness: Floats  # (beats, TONE_PARTS)


def describe(spectra: Spectra, edges_s: Doubles) -> Features:
    """The features of the beats between the edges."""
    tone_edges = _divide(edges_s, TONE_PARTS)
    mel = _means(spectra.mel, tone_edges * FRAME_RATE_HZ)
    pitches = np.sqrt(_means(spectra.pitches, tone_edges * TONE_RATE_HZ))  # loud notes rule, but not alone
    chroma = pitches.reshape(N_PITCHES // 12, 12, -1).sum(axis=0)
    chroma = chroma / np.maximum(np.linalg.norm(chroma, axis=0), 1e-9)
    onsets = np.sqrt(_means(spectra.band_onsets, _divide(edges_s, ONSET_PARTS) * FRAME_RATE_HZ))
    timbre = scipy.fft.dct(mel, axis=0, norm="ortho")
    return Features(
        harmony=_rows(chroma, TONE_PARTS),
        timbre=_rows(timbre[1 : N_TIMBRE + 1], TONE_PARTS),
        rhythm=_rows(onsets, ONSET_PARTS),
        loudness=_rows(timbre[:1], TONE_PARTS),
    )


def _divide(edges: Doubles, parts: int) -> Doubles:
    """The edges with parts - 1 even edges between every two."""
    index = np.arange((edges.size - 1) * parts + 1) / parts
    return np.interp(index, np.arange(edges.size), edges)


def _means(frames: Floats, edges: Doubles) -> Floats:
    """Mean of (bands, frames) between fractional frame edges, (bands, edges - 1)."""
    sums = np.pad(np.cumsum(frames, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
    at = np.clip(edges + 0.5, 0.0, frames.shape[1])  # frame k stands for k - 0.5 to k + 0.5
    below = np.minimum(at.astype(np.int64), frames.shape[1] - 1)
    integral = sums[:, below] + (at - below) * frames[:, below]
    return np.asarray(np.diff(integral, axis=1) / np.maximum(np.diff(at), 1e-6), np.float32)


def _rows(values: Floats, parts: int) -> Floats:
    """(values, beats * parts) as (beats, values * parts)."""
    return np.ascontiguousarray(values.T.reshape(-1, values.shape[0] * parts))


def distances(features: Features) -> Floats:
    """How different two beats are, (beats, beats); 0 for the same, about 1 for two at random."""
    total = np.zeros((features.harmony.shape[0],) * 2, np.float32)
    for kind, weight in WEIGHTS.items():
        apart = _euclidean(getattr(features, kind))
        typical = float(np.median(apart[np.triu_indices_from(apart, 1)])) if len(apart) > 1 else 0.0
        if typical > 1e-6:
            total += np.float32(weight / typical) * apart
    return total


def _euclidean(rows: Floats) -> Floats:
    squares = (rows.astype(np.float64) ** 2).sum(axis=1)
    inner = rows @ rows.T
    apart = np.sqrt(np.maximum(squares[:, None] + squares - 2.0 * inner, 0.0)).astype(np.float32)
    np.fill_diagonal(apart, 0.0)
    return np.asarray(apart, np.float32)


def join_costs(apart: Floats) -> Floats:
    """Cost of leaving at edge i to enter at edge j, (edges, edges): mean distance of the beats around.

    Edge i lies before beat i. Where one side runs off the track only the beats that are there count.
    """
    n = apart.shape[0]
    total, weight = np.zeros((n + 1, n + 1), np.float32), np.zeros((n + 1, n + 1), np.float32)
    for beat in range(-CONTEXT_BEATS, CONTEXT_BEATS):
        share = np.float32(np.exp(-0.5 * ((beat + 0.5) / CONTEXT_FADE) ** 2))
        low, high = max(0, -beat), min(n + 1, n - beat)
        if low >= high:
            continue
        inside = slice(low, high)
        total[inside, inside] += share * apart[low + beat : high + beat, low + beat : high + beat]
        weight[inside, inside] += share
    return np.asarray(total / np.maximum(weight, 1e-9), np.float32)
