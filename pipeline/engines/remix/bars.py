"""Where bars and sections begin.

A downbeat is louder in the low band and brings the change of harmony more often than other beats (Klapuri
et al. 2006, "Analysis of the meter of acoustic musical signals"). Bars have four beats unless the
self-similarity at multiples of three, five or seven beats stands out more clearly. Sections begin where a
checkerboard moved along the self-similarity matrix peaks (Foote 2000, "Automatic audio segmentation
using a measure of audio novelty").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.remix.similarity import ONSET_PARTS, TONE_PARTS, Features
from pipeline.engines.remix.spectra import Floats

Doubles = NDArray[np.float64]

METERS = {4: 0.0, 3: 0.02, 5: 0.04, 7: 0.04}  # by how much of the typical distance each must beat four
LONGEST_LAG = 36  # beats
SECTION_BARS = 4  # to either side of a section's edge
SECTION_PEAK = 1.0  # deviations above the mean


@dataclass(frozen=True)
class Bars:
    """The bar lines, as indices of edges."""

    meter: int  # beats a bar
    phase: int  # the first downbeat's edge: 0 <= phase < meter
    sections: tuple[int, ...]  # downbeats where something new begins, without the track's first


def find(features: Features, apart: Floats) -> Bars:
    """The bars of beats with these features and distances, (beats, beats)."""
    meter = _meter(apart)
    evidence = _accents(features)
    shares = [float(evidence[phase::meter].mean()) for phase in range(meter)]
    phase = int(np.argmax(shares))
    return Bars(meter, phase, _sections(apart, meter, phase))


def without_beats(apart: Floats) -> Bars:
    """The same of pseudo-beats: every edge is as good as any other."""
    return Bars(1, 0, _sections(apart, 4, 0))


def _meter(apart: Floats) -> int:
    """Beats a bar: the number whose multiples beats most prefer to be alike at."""
    reach = min(LONGEST_LAG, apart.shape[0] // 2)
    known = [meter for meter in METERS if 2 * meter <= reach]  # seen twice
    if 4 not in known:
        return 4
    by_lag = np.array([float(np.diagonal(apart, lag).mean()) for lag in range(1, reach + 2)])
    dips = 0.5 * (by_lag[:-2] + by_lag[2:]) - by_lag[1:-1]  # of lag 2 and up, against both neighbours
    return max(known, key=lambda m: float(dips[m - 2 :: m].mean()) - METERS[m])


def _accents(features: Features) -> Doubles:
    """How much each beat sounds like a downbeat, (beats,)."""
    low, _, high = _first_onsets(features)
    return _standard(low) + 0.3 * _standard(high) + 1.5 * _standard(_harmonic_change(features))


def _first_onsets(features: Features) -> Floats:
    """Onset strength of the three bands in the first part of each beat, (3, beats)."""
    return np.ascontiguousarray(features.rhythm.reshape(-1, ONSET_PARTS, 3)[:, 0].T)


def _harmonic_change(features: Features) -> Doubles:
    """Distance between the chroma of the two beats before each beat and of it and the next."""
    beats = features.harmony.reshape(-1, TONE_PARTS, 12).mean(axis=1).astype(np.float64)
    padded = np.concatenate([beats[:1], beats[:1], beats, beats[-1:]])
    pairs = padded[:-1] + padded[1:]
    pairs /= np.maximum(np.linalg.norm(pairs, axis=1, keepdims=True), 1e-9)
    return np.asarray(1.0 - (pairs[:-2] * pairs[2:]).sum(axis=1))


def _standard(values: Floats | Doubles) -> Doubles:
    values = np.asarray(values, np.float64)
    return np.asarray((values - values.mean()) / max(float(values.std()), 1e-9))


def _sections(apart: Floats, meter: int, phase: int) -> tuple[int, ...]:
    """Downbeats at the peaks of novelty, at least SECTION_BARS from each other and from both ends."""
    n, half = apart.shape[0], SECTION_BARS * meter
    lines = np.arange(phase, n, meter)
    lines = lines[(lines >= half) & (lines <= n - half)]
    if lines.size < 3:
        return ()
    taper = np.exp(-0.5 * ((np.arange(-half, half) + 0.5) / (half / 2)) ** 2)
    sign = np.sign(np.arange(-half, half) + 0.5)
    kernel = -np.outer(taper * sign, taper * sign)
    novelty = np.array([(kernel * apart[e - half : e + half, e - half : e + half]).sum() for e in lines])
    least = novelty.mean() + SECTION_PEAK * novelty.std()
    chosen: list[int] = []
    for line in lines[np.argsort(-novelty, kind="stable")]:
        if novelty[lines == line][0] >= least and all(abs(line - other) >= half for other in chosen):
            chosen.append(int(line))
    return tuple(sorted(chosen))
