"""Filter banks over the bins of a power spectrum: mel bands and pitch classes.

The same numbers, to the bit, as librosa 0.11's `filters.mel` and `filters.chroma`. Importing those compiles
numba code, which takes 10 to 20 s while numba's cache is empty, as it is after each installation.
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
A4_HZ = 440.0
CHROMA_CENTER, CHROMA_WIDTH = 5.0, 1.0  # octaves above 27.5 Hz: a Gaussian weight of each bin


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


@cache
def chroma_bank(rate_hz: int, n_fft: int) -> Samples:
    """Pitch classes, C first, float32, (12, n_fft // 2 + 1).

    Each bin is spread over the classes by Gaussians as wide as a semitone or the bin's distance to the next
    (Ellis 2007, "Chroma feature analysis and synthesis"), and weighted by its octave.
    """
    hz = np.linspace(0, rate_hz, n_fft, endpoint=False)[1:]
    semitones = 12 * np.log2(hz / (A4_HZ / 16))
    semitones = np.concatenate([[semitones[0] - 18], semitones])  # any value will do for 0 Hz
    widths = np.concatenate([np.maximum(np.diff(semitones), 1), [1]])
    distances = np.remainder(np.subtract.outer(semitones, np.arange(12.0)).T + 126, 12) - 6
    bank = np.exp(-0.5 * (2 * distances / widths) ** 2)
    bank /= np.linalg.norm(bank, axis=0)
    bank *= np.exp(-0.5 * ((semitones / 12 - CHROMA_CENTER) / CHROMA_WIDTH) ** 2)
    from_c = np.roll(bank, -3, axis=0)[:, : n_fft // 2 + 1]
    return np.ascontiguousarray(from_c, dtype=np.float32)
