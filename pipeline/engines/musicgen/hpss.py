"""Harmonic-percussive separation (HPSS), and how percussive a track is.

Medians of the spectrogram along time and along frequency decide which share of each bin is harmonic
and which is percussive (Fitzgerald 2010, "Harmonic/percussive separation using median filtering": its
soft mask). A high-pass removes the register of bass and kick drum, and does most of the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.base import StopFn, check_stop
from pipeline.records import Audio, cut

HOP_S = 0.0232  # 1024 samples at 44.1 kHz; frames are four of them long: 93 ms
OVERLAP = 4  # frames that cover each sample
TOP_HZ = 8000.0  # the pitch of a melody is below; what is above is discarded
BLOCK_FRAMES = 1024  # in memory at once: 24 s

HARMONIC_S = 0.2  # length of the medians along time: a tone of half this length still counts as harmonic
PERCUSSIVE_HZ = 500.0  # width of the medians along frequency
BASS_HZ, BASS_ORDER = 200.0, 8  # -6 dB there, 48 dB an octave below

# Of `percussive_share`:
EXCERPTS, EXCERPT_S = 6, 5.0  # spread evenly over a longer track
LONG_HARMONIC_S = 0.5  # longer medians miss no drum, at the expense of short tones
FLOOR_HZ = 100.0  # above it, all octaves have the same weight
SOUNDING = 1e-4  # -40 dB of the loudest frame: quieter frames do not count

Mags = NDArray[np.float32]


@dataclass(frozen=True)
class _Grid:
    """Hann frames over a track: `overlap` frames cover each sample, and the track begins in the last hop
    of frame 0."""

    sample_rate: int
    n_samples: int
    hop: int
    overlap: int

    @property
    def fft(self) -> int:
        return self.hop * self.overlap

    @property
    def n_frames(self) -> int:
        return math.ceil(self.n_samples / self.hop) + self.overlap - 1

    @property
    def bins_hz(self) -> Mags:
        """Frequencies of the bins up to TOP_HZ."""
        n_bins = min(int(TOP_HZ * self.fft / self.sample_rate), self.fft // 2) + 1
        return np.arange(n_bins, dtype=np.float32) * (self.sample_rate / self.fft)

    @property
    def window(self) -> Mags:
        return np.hanning(self.fft + 1)[:-1].astype(np.float32)


def _grid(audio: Audio, overlap: int) -> _Grid:
    from scipy.fft import next_fast_len

    fft = next_fast_len(max(OVERLAP, round(HOP_S * audio.sample_rate)), real=True) * OVERLAP
    return _Grid(audio.sample_rate, audio.n_samples, fft // overlap, overlap)


def harmonic(audio: Audio, should_stop: StopFn, n_samples: int | None = None) -> Audio:
    """The harmonic part of a track above the bass, in one channel.

    Blocks of frames are filtered together with as many frames on either side as the medians reach, so
    the result is that of the whole track at once. Memory: the result and some 50 MB.

    Args:
        n_samples: of a longer track, only so many from its beginning; they are the same bits.
    """
    import scipy.fft

    grid = _grid(audio, OVERLAP)
    n_samples = min(audio.n_samples, n_samples or audio.n_samples)
    n_blocks = math.ceil((math.ceil(n_samples / grid.hop) + OVERLAP - 1) / BLOCK_FRAMES)
    n_frames = min(grid.n_frames, n_blocks * BLOCK_FRAMES)
    reach = _odd(HARMONIC_S * audio.sample_rate / grid.hop) // 2
    gain = _above_bass(grid.bins_hz)
    scale = grid.window / np.float32(0.375 * OVERLAP)  # 3/8: the mean of a squared Hann window
    out = np.zeros((n_frames + OVERLAP - 1, grid.hop), np.float32)
    for first in range(0, n_frames, BLOCK_FRAMES):
        check_stop(should_stop)
        last = min(first + BLOCK_FRAMES, n_frames)
        start, end = max(0, first - reach), min(grid.n_frames, last + reach)
        spectra = _spectra(audio, grid, start, end)
        inner = slice(first - start, last - start)
        kept = spectra[inner] * (1 - _percussive_mask(np.abs(spectra), grid, HARMONIC_S)[inner]) * gain
        frames = scipy.fft.irfft(kept, grid.fft, axis=1) * scale
        for k in range(OVERLAP):
            out[first + k : last + k] += frames[:, k * grid.hop : (k + 1) * grid.hop]
    begin = (OVERLAP - 1) * grid.hop
    return Audio(out.reshape(1, -1)[:, begin : begin + n_samples], audio.sample_rate)


def percussive_share(audio: Audio) -> float | None:
    """Share of the energy of a usual moment that is percussive, in [0, 1]; None if the track is silent.

    It is measured in six excerpts of 5 s, or in the whole of a shorter track. An excerpt's share is the
    mean over the frames that are not silent; the track's is the upper quartile of its excerpts, because
    drums may pause for whole sections.
    """
    length = min(round(EXCERPT_S * audio.sample_rate), audio.n_samples)
    n_excerpts = min(EXCERPTS, audio.n_samples // max(1, length))
    starts = np.linspace(0, audio.n_samples - length, n_excerpts).astype(int)
    excerpts = [_frames(Audio(audio.samples[:, at : at + length], audio.sample_rate)) for at in starts]
    loudest = max((float(energy.max(initial=0.0)) for energy, _ in excerpts), default=0.0)
    shares = []
    for energy, percussive in excerpts:
        sounding = energy > SOUNDING * loudest
        if sounding.any():
            shares.append(percussive[:, sounding].mean(axis=1, dtype=np.float64).max())
    return float(np.percentile(shares, 75)) if shares else None


def _frames(excerpt: Audio) -> tuple[Mags, Mags]:
    """Energy (frames,) and percussive share (2, frames) of the frames that are wholly inside an excerpt.

    All octaves have the same weight (a kick drum has few bins, hats have many). The first share is of
    all octaves, the second of those above the bass, because a strong bass would mask the rest. Drums
    are told from plucked strings by the mean of the frames' shares, not of their energy: a pluck is
    loud, but short.
    """
    grid = _grid(excerpt, overlap=2)
    inside = grid.overlap - 1 if excerpt.n_samples > 4 * grid.fft else 0  # all frames of a short one
    magnitudes = np.abs(_spectra(excerpt, grid, inside, grid.n_frames - inside))
    even = 1 / np.maximum(grid.bins_hz, FLOOR_HZ)
    weights = np.stack([even, even * _above_bass(grid.bins_hz)])
    energy = magnitudes.T**2
    percussive = weights @ (energy * _percussive_mask(magnitudes, grid, LONG_HARMONIC_S).T)
    return energy.sum(axis=0), percussive / np.maximum(weights @ energy, np.finfo(np.float32).tiny)


def _spectra(audio: Audio, grid: _Grid, first: int, last: int) -> NDArray[np.complex64]:
    """Spectra (frames, bins) of frames `first` to `last`, excluded, of the channels' mean."""
    import scipy.fft

    sound = cut(audio.mono_channels, (first - grid.overlap + 1) * grid.hop, last * grid.hop).mean(axis=0)
    frames = np.lib.stride_tricks.sliding_window_view(sound, grid.fft)[:: grid.hop] * grid.window
    return np.asarray(scipy.fft.rfft(frames, axis=1)[:, : grid.bins_hz.size])


def _percussive_mask(magnitudes: Mags, grid: _Grid, harmonic_s: float) -> Mags:
    """Percussive share of each bin, [0, 1], (frames, bins); `harmonic_s` is the length of the medians."""
    harmonic = _medians(magnitudes.T, _odd(harmonic_s * grid.sample_rate / grid.hop)).T
    percussive = _medians(magnitudes, _odd(PERCUSSIVE_HZ * grid.fft / grid.sample_rate))
    return np.asarray(percussive**2 / np.maximum(percussive**2 + harmonic**2, np.finfo(np.float32).tiny))


def _medians(values: Mags, size: int) -> Mags:
    """Running medians of odd length along the last axis, with mirrored ends.

    The rows are filtered as one long row: scipy's algorithm for one dimension is several times as fast.
    """
    from scipy.ndimage import median_filter

    half = size // 2
    padded = np.pad(values, ((0, 0), (half, half)), mode="symmetric")
    return np.asarray(median_filter(padded.ravel(), size).reshape(padded.shape)[:, half : -half or None])


def _above_bass(bins_hz: Mags) -> Mags:
    """Gain of a Butterworth high-pass of half BASS_ORDER, applied forwards and backwards."""
    return (1.0 / (1.0 + (BASS_HZ / np.maximum(bins_hz, 1.0)) ** BASS_ORDER)).astype(np.float32)


def _odd(length: float) -> int:
    """The nearest odd number, 3 at least."""
    return max(3, 2 * math.floor(length / 2) + 1)
