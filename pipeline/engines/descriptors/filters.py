"""Mel bands over the bins of a power spectrum.

The same numbers, to the bit, as librosa 0.11's `filters.mel`. Importing that compiles numba code, which takes
10 to 20 s while numba's cache is empty, as it is after each installation.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.records import Samples

Vector = NDArray[np.float64]

HZ_PER_MEL = 200 / 3  # below the corner of Slaney's mel scale (1998, "Auditory Toolbox")
CORNER_HZ = 1000.0
CORNER_MEL = CORNER_HZ / HZ_PER_MEL
LOG_STEP = float(np.log(6.4)) / 27  # of frequency per mel above the corner


@cache
def mel_bank(rate_hz: int, n_fft: int, n_mels: int, low_hz: float) -> Samples:
    """Triangles of equal area, evenly spaced on the mel scale, float32, (n_mels, n_fft // 2 + 1)."""
    low, high = _hz_to_mel(np.array([low_hz, rate_hz / 2]))
    edges_hz = _mel_to_hz(np.linspace(low, high, n_mels + 2))
    offsets_hz = np.subtract.outer(edges_hz, np.fft.rfftfreq(n_fft, 1 / rate_hz))
    widths_hz = np.diff(edges_hz)[:, np.newaxis]
    rising, falling = -offsets_hz[:-2] / widths_hz[:-1], offsets_hz[2:] / widths_hz[1:]
    bank = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    bank *= 2 / (edges_hz[2:] - edges_hz[:-2])[:, np.newaxis]
    return np.asarray(bank)


def _hz_to_mel(hz: Vector) -> Vector:
    return np.where(hz < CORNER_HZ, hz / HZ_PER_MEL, CORNER_MEL + np.log(hz / CORNER_HZ) / LOG_STEP)


def _mel_to_hz(mel: Vector) -> Vector:
    return np.where(mel < CORNER_MEL, HZ_PER_MEL * mel, CORNER_HZ * np.exp(LOG_STEP * (mel - CORNER_MEL)))
