"""Where music without a beat may be cut: an even grid whose edges are moved onto onsets nearby.

Onsets of notes and chords are peaks of novelty: the spectral flux, and the change of harmony (distance of the
chroma before and after, Harte et al. 2006, "Detecting harmonic change in musical audio"). An edge is put
where the flux begins to rise before the peak, as librosa's `onset_backtrack` does, so that the attack lies
after it.
"""

from __future__ import annotations

import numpy as np
import scipy.ndimage

from pipeline.music.spectra import FRAME_RATE_HZ, N_PITCHES, TONE_RATE_HZ, Doubles, Floats, Spectra

GRID_S = 0.5
MIN_EDGES = 8  # intervals of the shortest track
REACH = 0.4  # intervals by which an edge is moved at most
CHORD_S = 0.25  # to either side of a change of harmony
FLUX_WIDTH_S = 0.02  # Gaussian, of the smoothing of the flux
ATTACK_S = 0.1  # longest rise of the flux before its peak


def onset_edges_s(spectrum: Spectra, duration_s: float) -> Doubles:
    """Edges from 0 to the track's end, (edges,), rising; each is less than half an interval off the grid."""
    n = max(MIN_EDGES, round(duration_s / GRID_S))
    edges_s = np.linspace(0.0, duration_s, n + 1)
    flux = scipy.ndimage.gaussian_filter1d(spectrum.onsets.astype(np.float64), FLUX_WIDTH_S * FRAME_RATE_HZ)
    novelty = _scaled(flux) + _scaled(_harmonic_change(spectrum.pitches, flux.size))
    reach = REACH * duration_s / n * FRAME_RATE_HZ
    for k, edge in enumerate(edges_s[1:-1] * FRAME_RATE_HZ, start=1):
        low, high = round(edge - reach), round(edge + reach) + 1
        peak = low + int(np.argmax(novelty[low:high]))
        rise = max(low, peak - round(ATTACK_S * FRAME_RATE_HZ))
        edges_s[k] = (rise + int(np.argmin(flux[rise : peak + 1]))) / FRAME_RATE_HZ
    return edges_s


def _scaled(values: Doubles) -> Doubles:
    return np.asarray(values / max(float(np.percentile(values, 95)), 1e-9))


def _harmonic_change(pitches: Floats, n_frames: int) -> Doubles:
    """Distance of the chroma before and after each onset frame, (n_frames,)."""
    chroma = np.sqrt(pitches).reshape(N_PITCHES // 12, 12, -1).sum(axis=0).astype(np.float64)
    chroma /= np.maximum(np.linalg.norm(chroma, axis=0), 1e-9)
    width = max(1, round(CHORD_S * TONE_RATE_HZ))
    means = scipy.ndimage.uniform_filter1d(chroma, width, axis=1, mode="nearest")
    padded = np.pad(means, ((0, 0), (width, width)), mode="edge")
    # means of the `width` frames that end and begin half a width away from each frame
    half = width // 2
    n = chroma.shape[1]
    before, after = padded[:, width - half - 1 :][:, :n], padded[:, width + half + 1 :][:, :n]
    change = np.sqrt(((after - before) ** 2).sum(axis=0))
    frames_s = np.arange(n_frames) / FRAME_RATE_HZ
    return np.asarray(np.interp(frames_s, np.arange(n) / TONE_RATE_HZ, change))
