"""The embedder: cuts a track into windows, whose raw features are computed block by block from one STFT."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.base import StopFn, check_stop
from pipeline.engines.descriptors import VERSION
from pipeline.engines.descriptors.filters import Vector, mel_bank
from pipeline.engines.descriptors.layout import DIM, scaled
from pipeline.music.spectra import chroma_bank
from pipeline.records import Audio, Embedding, Samples

RATE_HZ = 22050
WINDOW_S = 10.0
SHORTEST_S = 5.0  # a shorter tail joins the window before it
N_FFT, HOP = 4096, 512
FRAMES_PER_S = RATE_HZ / HOP
N_MELS, N_MFCC = 40, 13
LOWEST_HZ = 30.0  # of the mel bands
OCTAVES_WIDE = 1.0  # of the weight of the octaves in the chroma
FLOOR = 1e-5  # relative to a window's mean power: 50 dB below it counts as silence
CONTRAST_EDGES_HZ = 200.0 * 2.0 ** np.arange(6)  # six octaves; the last one is open
CHORD_FRAMES = 16  # 0.37 s
SLOWEST_BPM, TEMPO_OCTAVES, BANDS_PER_OCTAVE = 37.5, 3, 8


def power_spectra(samples: Samples) -> Samples:
    """Power of all frames that lie entirely inside the window, float32, (frames, N_FFT // 2 + 1)."""
    from scipy import fft, signal

    padded = np.pad(samples, (0, max(0, N_FFT - samples.size)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    window = signal.get_window("hann", N_FFT).astype(np.float32)
    spectra = fft.rfft(frames * window, axis=1)
    return np.asarray(spectra.real**2 + spectra.imag**2, dtype=np.float32)


def band_sums(spectra: Samples, bank: Samples) -> Samples:
    """Sums over bins weighted by the bank, (frames, bins) and (bands, bins) to (frames, bands).

    A matrix product would go through BLAS, whose rounding depends on the number of threads.
    """
    return np.asarray(np.einsum("tf,bf->tb", spectra, bank))


def decibels(power: NDArray[Any]) -> Vector:
    """Power in dB relative to its mean, not below FLOOR."""
    mean = float(power.mean(dtype=np.float64)) or 1.0
    return np.asarray(10 * np.log10(power.astype(np.float64) / mean + FLOOR))


def mean_and_deviation(values: Vector) -> Vector:
    """Over frames, (frames, n) to (2 n,)."""
    return np.concatenate([values.mean(axis=0), values.std(axis=0)])


def timbre(mel_db: Vector) -> Vector:
    """Blocks timbre and motion, without the zeroth coefficient, which is the level."""
    from scipy import fft

    return mean_and_deviation(fft.dct(mel_db, type=2, norm="ortho", axis=1)[:, 1 : N_MFCC + 1])


def spectrum(power: Samples, mel: Samples, hz: Vector) -> Vector:
    """Block spectrum. Octaves are relative to 1 kHz."""
    weights = power[:, 1:] + FLOOR * float(power.mean()) + np.finfo(np.float32).tiny
    weights = weights / weights.sum(axis=1, keepdims=True)
    octaves = np.log2(hz[1:] / 1000).astype(np.float32)
    centroid = band_sums(weights, octaves[None])[:, 0]
    spread = np.sqrt(np.maximum(band_sums(weights, octaves[None] ** 2)[:, 0] - centroid**2, 0))
    flatness = decibels(mel).mean(axis=1) - 10 * np.log10(mel.mean(axis=1) / (mel.mean() or 1.0) + FLOOR)
    shape = np.stack([centroid, spread, flatness], axis=1).astype(np.float64)
    return np.concatenate([mean_and_deviation(shape), contrast(power, hz)])


def contrast(power: Samples, hz: Vector) -> Vector:
    """Mean of each octave's strongest fifth of bins over that of its weakest fifth, in dB."""
    edges = np.searchsorted(hz, [*CONTRAST_EDGES_HZ, hz[-1]])
    floor = FLOOR * float(power.mean()) + np.finfo(np.float32).tiny
    contrasts = []
    for low, high in pairwise(edges):
        fifth = max(1, (high - low) // 5)
        ordered = np.partition(power[:, low:high], (fifth - 1, high - low - fifth), axis=1)
        peak, valley = ordered[:, -fifth:].mean(axis=1), ordered[:, :fifth].mean(axis=1)
        contrasts.append(float(np.mean(10 * np.log10((peak + floor) / (valley + floor)))))
    return np.array(contrasts)


def harmony(power: Samples) -> Vector:
    """Blocks chords and key."""
    chroma = band_sums(np.sqrt(power), chroma_bank(RATE_HZ, N_FFT, OCTAVES_WIDE))
    chroma = chroma - chroma.min(axis=1, keepdims=True)  # drums and noise raise all classes equally
    starts = np.arange(0, chroma.shape[0], CHORD_FRAMES)
    chords = unit_sum(np.add.reduceat(chroma, starts, axis=0).astype(np.float64))
    whole = unit_sum(chroma.sum(axis=0, dtype=np.float64)[None])
    planes = np.fft.rfft(chords, axis=1)[:, 1:]
    steps = np.linalg.norm(np.diff(planes, axis=0), axis=1) if len(chords) > 1 else np.zeros(1)
    entropy = -np.sum(whole * np.log2(whole + 1e-12))
    invariant = [np.abs(planes).mean(axis=0), np.abs(np.fft.rfft(whole[0]))[1:]]
    return np.concatenate([*invariant, [entropy, steps.mean(), steps.std()], whole[0] - 1 / 12])


def unit_sum(chroma: Vector) -> Vector:
    """Each row divided by its sum; a row of zeros becomes uniform."""
    total = chroma.sum(axis=1, keepdims=True)
    return np.asarray(np.where(total > 0, chroma / np.where(total > 0, total, 1), 1 / 12))


def rhythm(mel_db: Vector, mel_hz: Vector) -> Vector:
    """Blocks tempo and pulse, from the increases of the mel bands' levels."""
    from scipy import signal

    rises = np.maximum(np.diff(mel_db, axis=0, prepend=mel_db[:1]), 0)
    onsets = rises.mean(axis=1)
    tempo = periodicity(onsets)
    level = float(onsets.mean())
    peaks, _ = signal.find_peaks(onsets, height=1.5 * level + 1e-6, distance=round(0.07 * FRAMES_PER_S))
    by_band = rises.mean(axis=0)
    total = float(by_band.sum()) or 1.0
    low, high = by_band[mel_hz < 250].sum() / total, by_band[mel_hz > 2500].sum() / total
    density = peaks.size * FRAMES_PER_S / onsets.size
    return np.concatenate([tempo, [tempo.max(), density, onsets.std() / (level or 1.0), low, high]])


def periodicity(onsets: Vector) -> Vector:
    """Normalized autocorrelation, the largest value within each band of lags, slowest band first."""
    from scipy import signal

    curve = onsets - onsets.mean()
    n = curve.size
    correlation = signal.correlate(curve, curve, method="fft")[n - 1 :] / np.arange(n, 0, -1)
    correlation /= correlation[0] if correlation[0] > 1e-9 else 1.0
    points = TEMPO_OCTAVES * BANDS_PER_OCTAVE * 4
    bpm = SLOWEST_BPM * 2.0 ** ((np.arange(points) + 0.5) / (4 * BANDS_PER_OCTAVE))
    lags = 60 * FRAMES_PER_S / bpm
    at_lags = np.where(lags < 0.75 * n, np.interp(lags, np.arange(n), correlation), 0.0)
    return np.asarray(at_lags.reshape(-1, 4).max(axis=1))


def dynamics(samples: Samples, power: Samples) -> Vector:
    """Block dynamics."""
    level_db = decibels(power.sum(axis=1))
    p10, p50, p95 = np.percentile(level_db, [10, 50, 95])
    steps = np.abs(np.diff(level_db)).mean() if level_db.size > 1 else 0.0
    crest_db = 20 * np.log10(float(np.abs(samples).max()) + 1e-3)
    return np.array([level_db.std(), p95 - p50, p50 - p10, steps, np.mean(level_db < -6), crest_db])


def raw_features(samples: Samples) -> Vector:
    """The features of one window of mono at RATE_HZ before scaling, float64, (DIM,)."""
    rms = float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))
    level = samples / np.float32(rms) if rms > 1e-7 else np.zeros_like(samples)
    power = power_spectra(level)
    hz = np.arange(N_FFT // 2 + 1, dtype=np.float64) * RATE_HZ / N_FFT
    to_mel = mel_bank(RATE_HZ, N_FFT, N_MELS, LOWEST_HZ)
    bands = band_sums(power, to_mel)
    mel_db = decibels(bands)
    return np.concatenate(
        [
            timbre(mel_db),
            spectrum(power, bands, hz),
            harmony(power),
            rhythm(mel_db, hz[to_mel.argmax(axis=1)]),
            dynamics(level, power),
        ]
    )


class DescriptorsEmbedder:
    """An `Embedder`: see `pipeline.engines.base`."""

    name = "descriptors"
    version = VERSION
    dim = DIM

    def embed(self, audio: Audio, *, should_stop: StopFn) -> Embedding:
        """Embed one track of any rate, length and number of channels.

        Raises:
            Stopped: at most one window after `should_stop` turned true.
        """
        from pipeline.audio import resample

        mono = resample(Audio(audio.mono()[None], audio.sample_rate), RATE_HZ).samples[0]
        edges = window_edges(mono.size)
        rows = []
        for start, stop in edges:
            check_stop(should_stop)
            rows.append(unit(scaled(raw_features(mono[start:stop]))))
        windows = np.stack(rows)
        times_s = np.minimum(np.array(edges) / RATE_HZ, audio.duration_s)
        return Embedding(
            track=unit(np.diff(edges, axis=1)[:, 0] @ windows).astype(np.float32),
            windows=windows.astype(np.float32),
            times_s=times_s.astype(np.float32),
        )


def unit(vector: Vector) -> Vector:
    """Scaled to length 1."""
    return np.asarray(vector / np.linalg.norm(vector))


def window_edges(n_samples: int) -> list[tuple[int, int]]:
    """First and last sample (exclusive) of each window at RATE_HZ; see the package for the tail."""
    size, shortest = round(WINDOW_S * RATE_HZ), round(SHORTEST_S * RATE_HZ)
    starts = list(range(0, max(1, n_samples - shortest + 1), size))
    return list(zip(starts, [*starts[1:], n_samples], strict=True))
