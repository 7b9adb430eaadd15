"""Chroma as MusicGen and audiocraft's metric compute it, so that figures can be compared with published ones.

Power spectra of 0.5 s every 0.13 s, folded to pitch classes by the filters of Ellis (2007, "Chroma feature
analysis and synthesis", also in librosa), which weigh the octaves around 440 Hz most.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import scipy.fft

from pipeline.music.spectra import Floats

RATE_HZ = 32_000
N_FFT = 16_384
HOP = N_FFT // 4
FRAME_RATE_HZ = RATE_HZ / HOP
CENTRE_OCTAVE, OCTAVES_WIDE = 5.0, 2.0  # above 27.5 Hz; the Gaussian weight of the octaves
SILENT_POWER = 1e-8  # of the track's loudest frame: below, a frame has no pitch
BLOCK_FRAMES = 256  # transformed at once


def compute_chroma(mono: Floats) -> Floats:
    """Chroma of mono sound at RATE_HZ: (frames, 12), C first, unit length; zeros where it is silent."""
    bank = chroma_filters()
    n_frames = 1 + mono.size // HOP
    padded = np.pad(mono, (N_FFT // 2, N_FFT // 2 + HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP][:n_frames]
    window = np.hanning(N_FFT + 1)[:-1].astype(np.float32)
    power = np.empty((n_frames, 12), np.float32)
    for first in range(0, n_frames, BLOCK_FRAMES):
        spectra = scipy.fft.rfft(frames[first : first + BLOCK_FRAMES] * window, axis=1)
        powers = spectra.real**2 + spectra.imag**2
        # Not a product of matrices, which BLAS rounds differently for another number of threads
        power[first : first + BLOCK_FRAMES] = np.einsum("fb,cb->fc", powers, bank, optimize=False)
    lengths = np.linalg.norm(power, axis=1, keepdims=True)
    is_heard = lengths > SILENT_POWER * lengths.max(initial=0.0)
    return np.where(is_heard, power / np.maximum(lengths, 1e-30), np.float32(0.0))


@cache
def chroma_filters(rate_hz: int = RATE_HZ) -> Floats:
    """(12, bins): weight of each frequency for each pitch class, C first; equal temperament, A = 440 Hz.

    For spectra of N_FFT samples at that rate.
    """
    frequencies_hz = np.arange(1, N_FFT) * (rate_hz / N_FFT)
    semitones = 12 * np.log2(frequencies_hz / 27.5)
    semitones = np.concatenate([[semitones[0] - 18], semitones])  # 0 Hz: an octave and a half below the first
    widths = np.concatenate([np.maximum(np.diff(semitones), 1.0), [1.0]])
    away = np.remainder(semitones - np.arange(12)[:, None] + 6, 12) - 6
    weights = np.exp(-0.5 * (2 * away / widths) ** 2)
    weights /= np.linalg.norm(weights, axis=0)
    weights *= np.exp(-0.5 * ((semitones / 12 - CENTRE_OCTAVE) / OCTAVES_WIDE) ** 2)
    return np.asarray(np.roll(weights, -3, axis=0)[:, : N_FFT // 2 + 1], np.float32)
