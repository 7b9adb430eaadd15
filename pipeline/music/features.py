"""Features of each beat, and the distances of every two beats.

Features per beat (Ellis and Poliner 2007; Jehan 2005): harmony (chroma), timbre (shape of the log
spectrum), rhythm (onsets of the low, middle and high bands) and loudness. Each is measured in parts of
the beat, so that notes on the beat and off the beat differ. The distances of each kind are divided by
their median over the track before they are summed, so 1 is the distance of two typical beats of the track.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.fft

from pipeline.music.spectra import FRAME_RATE_HZ, N_PITCHES, TONE_RATE_HZ, Doubles, Floats, Spectra

TONE_PARTS, ONSET_PARTS = 2, 4  # parts of a beat in which spectra and onsets are averaged
N_TIMBRE = 12  # cosine coefficients of the mel spectrum; the first is the loudness and not counted
WEIGHTS = {"harmony": 0.4, "timbre": 0.3, "rhythm": 0.2, "loudness": 0.1}


@dataclass(frozen=True, eq=False)
class Features:
    """One row per beat."""

    harmony: Floats  # (beats, 12 * TONE_PARTS), each part of unit length
    timbre: Floats  # (beats, N_TIMBRE * TONE_PARTS)
    rhythm: Floats  # (beats, 3 * ONSET_PARTS): low, middle, high
    loudness: Floats  # (beats, TONE_PARTS)


def beat_features(spectra: Spectra, edges_s: Doubles) -> Features:
    """The features of the beats between the edges."""
    tone_edges = divide(edges_s, TONE_PARTS)
    mel = means_between(spectra.mel, tone_edges * FRAME_RATE_HZ)
    chroma = mean_chroma(spectra.pitches, tone_edges * TONE_RATE_HZ)
    onsets = np.sqrt(means_between(spectra.band_onsets, divide(edges_s, ONSET_PARTS) * FRAME_RATE_HZ))
    timbre = scipy.fft.dct(mel, axis=0, norm="ortho")
    return Features(
        harmony=_rows(chroma, TONE_PARTS),
        timbre=_rows(timbre[1 : N_TIMBRE + 1], TONE_PARTS),
        rhythm=_rows(onsets, ONSET_PARTS),
        loudness=_rows(timbre[:1], TONE_PARTS),
    )


def divide(edges: Doubles, parts: int) -> Doubles:
    """The edges with parts - 1 evenly spaced edges inserted between every two."""
    index = np.arange((edges.size - 1) * parts + 1) / parts
    return np.interp(index, np.arange(edges.size), edges)


def mean_chroma(pitches: Floats, edges: Doubles) -> Floats:
    """Chroma between fractional frame positions, (12, edges - 1), A first, each of unit length."""
    compressed = np.sqrt(means_between(pitches, edges))  # so that quieter notes count as well
    chroma = compressed.reshape(N_PITCHES // 12, 12, -1).sum(axis=0)
    return np.asarray(chroma / np.maximum(np.linalg.norm(chroma, axis=0), 1e-9))


def means_between(frames: Floats, edges: Doubles) -> Floats:
    """Means of (bands, frames) between fractional frame positions, (bands, edges - 1)."""
    sums = np.pad(np.cumsum(frames, axis=1, dtype=np.float64), ((0, 0), (1, 0)))
    at = np.clip(edges + 0.5, 0.0, frames.shape[1])  # frame k stands for k - 0.5 to k + 0.5
    below = np.minimum(at.astype(np.int64), frames.shape[1] - 1)
    integral = sums[:, below] + (at - below) * frames[:, below]
    return np.asarray(np.diff(integral, axis=1) / np.maximum(np.diff(at), 1e-6), np.float32)


def _rows(values: Floats, parts: int) -> Floats:
    """(values, beats * parts) rearranged to (beats, values * parts)."""
    return np.ascontiguousarray(values.T.reshape(-1, values.shape[0] * parts))


def beat_distances(features: Features, weights: Mapping[str, float] = WEIGHTS) -> Floats:
    """Distance of every two beats, (beats, beats): 0 for equal beats, about 1 for two random ones.

    `weights` of the kinds of features add up to 1.
    """
    total = np.zeros((features.harmony.shape[0],) * 2, np.float32)
    for kind, weight in weights.items():
        distances = _euclidean(getattr(features, kind))
        pairs = distances[np.triu_indices_from(distances, 1)]
        typical = float(np.median(pairs)) if pairs.size else 0.0
        if typical > 1e-6:
            total += np.float32(weight / typical) * distances
    return total


def _euclidean(rows: Floats) -> Floats:
    squares = (rows.astype(np.float64) ** 2).sum(axis=1)
    inner = rows @ rows.T
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2.0 * inner, 0.0)).astype(np.float32)
    np.fill_diagonal(distances, 0.0)
    return np.asarray(distances, np.float32)
