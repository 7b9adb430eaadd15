"""Whether the music around a join is like any passage of the source.

The window around the join is compared with all windows of the source, and the nearest one counts, as in a
matrix profile (Yeh et al. 2016, "Matrix profile I: all pairs similarity joins for time series"). A join that
breaks the bar or the harmony is like no passage of the source. The unit is how near the source's own passages
are to each other, because some music repeats itself more exactly than other music.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.music.spectra import N_PITCHES, TONE_RATE_HZ, Floats

POOLED = 2  # spectra in a frame: 46 ms
RATE_HZ = TONE_RATE_HZ / POOLED
HALF_FRAMES = round(0.4 * RATE_HZ)  # to either side of a join
WINDOW = 2 * HALF_FRAMES
SAMPLED = 60  # windows of the source by which its own distance is found
LEAST_DISTANCE = 0.1  # so that joins in music that repeats to the sample need not be exact


def context_frames(pitches: Floats) -> Floats:
    """Square roots of magnitudes per semitone, (N_PITCHES, frames), in (frames, N_PITCHES) of 46 ms."""
    n = pitches.shape[1] // POOLED
    pooled = np.sqrt(pitches[:, : n * POOLED]).reshape(N_PITCHES, n, POOLED).mean(axis=2)
    return np.ascontiguousarray(pooled.T)


def own_distance(source: Floats) -> float:
    """Median distance of windows of the source from the nearest that does not overlap."""
    starts = (
        np.linspace(0, len(source) - WINDOW, SAMPLED).astype(np.int64) if len(source) > 3 * WINDOW else ()
    )
    found = []
    for start in starts:
        distances = _distances(source[start : start + WINDOW], source)
        distances[max(0, start - WINDOW + 1) : start + WINDOW] = np.inf
        found.append(distances.min())
    return max(float(np.median(found)), LEAST_DISTANCE) if found else np.inf


def fit(made: Floats, source: Floats, own: float, at_s: float) -> float:
    """How well the music around a time fits the source, 0 to 1.

    1: as near to a passage of the source as the source's own are to each other (`own_distance`); 0: twice as
    far.

    Args:
        made, source: `context_frames` of the variation and of its source.
    """
    return 1.0 - min(max(_nearest_distance(made, source, at_s) / own - 1.0, 0.0), 1.0)


def _nearest_distance(made: Floats, source: Floats, at_s: float) -> float:
    """Distance of the window around a time from the nearest window of the source, 0 to 1."""
    start = min(max(0, round(at_s * RATE_HZ) - HALF_FRAMES), len(made) - WINDOW)
    if start < 0 or len(source) < WINDOW:
        return 0.0
    return float(_distances(made[start : start + WINDOW], source).min())


def _distances(window: Floats, source: Floats) -> NDArray[np.float64]:
    """Root of one minus the cosine of a window with each window of the source, (windows,), 0 to 1."""
    n = len(source) - WINDOW + 1
    products = window @ source.T
    inner = np.sum([products[k, k : k + n] for k in range(WINDOW)], axis=0, dtype=np.float64)
    powers = np.convolve((source**2).sum(axis=1, dtype=np.float64), np.ones(WINDOW), "valid")
    cosines = inner / np.sqrt(np.maximum(powers * float((window**2).sum()), 1e-12))
    return np.asarray(np.sqrt(np.maximum(1.0 - cosines, 0.0)))
