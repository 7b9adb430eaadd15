"""Chroma as MusicGen and audiocraft's metric compute it, so that figures can be compared with published ones.

Power spectra of 0.5 s every 0.13 s, folded to pitch classes by the filters of Ellis (2007, "Chroma feature
analysis and synthesis", also in librosa), which weigh the octaves around 880 Hz most.
"""

from __future__ import annotations

import numpy as np
import scipy.fft

from pipeline.music.spectra import Floats, chroma_bank

RATE_HZ = 32_000
N_FFT = 16_384
HOP = N_FFT // 4
FRAME_RATE_HZ = RATE_HZ / HOP
OCTAVES_WIDE = 2.0  # of the weight of the octaves
SILENT_POWER = 1e-8  # of the track's loudest frame: below, a frame has no pitch
BLOCK_FRAMES = 256  # transformed at once


def compute_chroma(mono: Floats) -> Floats:
    """Chroma of mono sound at RATE_HZ: (frames, 12), C first, unit length; zeros where it is silent."""
    bank = chroma_bank(RATE_HZ, N_FFT, OCTAVES_WIDE)
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
