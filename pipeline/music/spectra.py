"""Short-time spectra in a few bands, and the onset envelopes made of them.

Everything is computed with numpy and scipy's FFT. librosa has the same building blocks, but importing
it compiles numba code, which takes 10 to 20 s with an empty cache: several times the analysis of a track.

Onset strength is the half-wave rectified rise of log-compressed band energies over three frames
(spectral flux after Bello et al. 2005; log compression and the longer difference after Böck and
Widmer 2013, "Maximum filter vibrato suppression for onset detection").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.fft
import scipy.sparse
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

RATE_HZ = 22050  # sample rate of all analysis
HOP = 128  # samples between frames of the onset envelopes: 5.8 ms
FRAME_RATE_HZ = RATE_HZ / HOP
ONSET_FFT = 1024
TONE_HOP = 512
TONE_RATE_HZ = RATE_HZ / TONE_HOP
TONE_FFT = 4096
N_MEL = 40
LOWEST_PITCH = 33  # MIDI: 55 Hz
N_PITCHES = 72  # six octaves, to 3.3 kHz
CHROMA_CENTRE_OCTAVE = 5.0  # above 27.5 Hz
FLUX_LAG = 3  # frames
LOW_BAND_HZ, HIGH_BAND_HZ = 150.0, 2500.0  # below: kick and bass; above: hi-hats and air
COMPRESSION = 100.0  # log(1 + 100 x): levels down to 40 dB below the track's loud parts matter
BLOCK_FRAMES = 2048  # frames transformed at once, which bounds the memory for long tracks


@dataclass(frozen=True, eq=False)
class Spectra:
    """A track's spectra and onset strengths over time; each frame is centred on its time."""

    onsets: Floats  # (frames,): onset strength of all bands, at FRAME_RATE_HZ
    band_onsets: Floats  # (3, frames): onset strength of the low, middle and high bands
    mel: Floats  # (N_MEL, frames): log-compressed band magnitudes, at FRAME_RATE_HZ
    pitches: Floats  # (N_PITCHES, tone frames): magnitude per semitone, at TONE_RATE_HZ


def compute_spectra(mono: Floats) -> Spectra:
    """The spectra of mono sound at RATE_HZ, (samples,)."""
    edges_hz = _mel_edges_hz()
    mel = _bands(mono, ONSET_FFT, HOP, _triangles(edges_hz, ONSET_FFT))
    loud = float(np.percentile(mel.max(axis=0), 90)) if mel.size else 0.0
    compressed = np.log1p(mel * np.float32(COMPRESSION / max(loud, 1e-9)))
    rise = np.zeros_like(compressed)
    rise[:, FLUX_LAG:] = np.maximum(0.0, compressed[:, FLUX_LAG:] - compressed[:, :-FLUX_LAG])
    centres_hz = edges_hz[1:-1]
    low, high = centres_hz < LOW_BAND_HZ, centres_hz > HIGH_BAND_HZ
    parts = np.stack([rise[mask].mean(axis=0) for mask in (low, ~low & ~high, high)])
    return Spectra(rise.mean(axis=0), parts, compressed, _bands(mono, TONE_FFT, TONE_HOP, _pitch_bank()))


def _bands(mono: Floats, n_fft: int, hop: int, bank: Floats) -> Floats:
    """Band magnitudes, (bands, frames): Hann-windowed frames centred on multiples of the hop."""
    n_frames = 1 + mono.size // hop
    padded = np.pad(mono, (n_fft // 2, n_fft // 2 + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][:n_frames]
    window = np.hanning(n_fft + 1)[:-1].astype(np.float32)
    out = np.empty((bank.shape[0], n_frames), np.float32)
    sparse = scipy.sparse.csr_array(
        bank
    )  # whose products don't depend on the number of threads, as BLAS's do
    for first in range(0, n_frames, BLOCK_FRAMES):
        block = frames[first : first + BLOCK_FRAMES] * window
        out[:, first : first + BLOCK_FRAMES] = sparse @ np.abs(scipy.fft.rfft(block, axis=1)).T
    return out


def _mel_edges_hz() -> Doubles:
    """Corners of the triangles, (N_MEL + 2,), evenly spaced on the mel scale 2595 log10(1 + f/700)."""
    mels = np.linspace(2595 * np.log10(1 + 30 / 700), 2595 * np.log10(1 + 10500 / 700), N_MEL + 2)
    return np.asarray(700 * (10 ** (mels / 2595) - 1))


def _pitch_bank() -> Floats:
    """One triangle per semitone that reaches a semitone to either side; equal temperament, A = 440 Hz."""
    midi = np.arange(LOWEST_PITCH - 1, LOWEST_PITCH + N_PITCHES + 1)
    return _triangles(440.0 * 2 ** ((midi - 69) / 12), TONE_FFT)


@cache
def chroma_bank(rate_hz: int, n_fft: int, octaves_wide: float) -> Floats:
    """(12, n_fft // 2 + 1): weight of each frequency for each pitch class, C first; A = 440 Hz.

    Each bin is spread over the classes by Gaussians as wide as a semitone or the bin's distance to the next
    (Ellis 2007, "Chroma feature analysis and synthesis"), and weighted by its octave: `octaves_wide` is the
    width of that Gaussian, around 880 Hz. To the bit as librosa 0.11's `filters.chroma`.
    """
    hz = np.linspace(0, rate_hz, n_fft, endpoint=False)[1:]
    semitones = 12 * np.log2(hz / 27.5)
    semitones = np.concatenate([[semitones[0] - 18], semitones])  # any value will do for 0 Hz
    widths = np.concatenate([np.maximum(np.diff(semitones), 1), [1]])
    distances = np.remainder(np.subtract.outer(semitones, np.arange(12.0)).T + 126, 12) - 6
    bank = np.exp(-0.5 * (2 * distances / widths) ** 2)
    bank /= np.linalg.norm(bank, axis=0)
    bank *= np.exp(-0.5 * ((semitones / 12 - CHROMA_CENTRE_OCTAVE) / octaves_wide) ** 2)
    from_c = np.roll(bank, -3, axis=0)[:, : n_fft // 2 + 1]
    return np.ascontiguousarray(from_c, dtype=np.float32)


def _triangles(edges_hz: Doubles, n_fft: int) -> Floats:
    """(len(edges) - 2, bins): triangles of unit sum whose sides are at least 1.01 bins wide."""
    bins_hz = np.arange(n_fft // 2 + 1) * (RATE_HZ / n_fft)
    left, centre, right = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    least_hz = 1.01 * RATE_HZ / n_fft
    up = (bins_hz - centre) / np.maximum(centre - left, least_hz)
    down = (bins_hz - centre) / np.maximum(right - centre, least_hz)
    bank = np.maximum(0.0, 1.0 - np.maximum(-up, down))
    return np.asarray(bank / bank.sum(axis=1, keepdims=True), dtype=np.float32)
