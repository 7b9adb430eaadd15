"""Integrated loudness and true peak by ITU-R BS.1770-4, and the one gain that respects both.

The signal is processed in pieces, so that memory holds the signal and one scaled copy at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.audio.resampling import QUALITY
from pipeline.records import Audio, Samples

BLOCK_S, STEP_S = 0.4, 0.1  # the gating blocks of BS.1770-4
STEPS_PER_BLOCK = 4
STEPS_PER_CHUNK = 50  # filtered at once
# Gain (dB), Q and frequency (Hz) that give BS.1770's coefficients at 48 kHz (De Man, "Evaluation of
# implementations of the EBU R128 loudness measurement", AES 145, 2018). pyloudnorm's default filters are
# rounder numbers and read 0.04 LU lower.
_HIGH_SHELF = (3.99984385397, 0.7071752369554193, 1681.9744509555319)
_HIGH_PASS = (0.0, 0.5003270373253953, 38.13547087613982)
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
LUFS_OFFSET_DB = 0.691  # makes a full-scale 997 Hz sine in one channel -3.01 LUFS
OVERSAMPLING = 4
HALF_TAPS = 24  # input samples the interpolator looks to either side
KAISER_BETA = 8.0
CHUNK_FRAMES = 1 << 16
MARGIN_DB = 0.1  # kept below the ceiling: see `to_loudness`


def peak_dbfs(audio: Audio) -> float:
    """The largest sample of any channel, dB re full scale; -inf for digital silence."""
    return _db(float(np.max(np.abs(audio.samples), initial=0.0)))


def loudness_lufs(audio: Audio) -> float:
    """Integrated loudness of mono or stereo audio in LUFS; -inf when no block is above the gate at -70.

    The filters and the gating blocks are pyloudnorm's, but run over the signal in pieces: pyloudnorm itself
    holds several float64 copies of it. A signal shorter than one gating block of 400 ms is repeated up to
    that length, so that a short note is as loud as the same note held.
    """
    if not audio.n_samples:
        return -math.inf
    shortest = math.ceil(BLOCK_S * audio.sample_rate)
    samples = audio.samples
    if audio.n_samples < shortest:
        samples = np.resize(samples.T, (shortest, audio.channels)).T
    power = np.sum([_block_powers(channel, audio.sample_rate) for channel in samples], axis=0)
    above = power[power >= _power_of(ABSOLUTE_GATE_LUFS)]
    if not len(above):
        return -math.inf
    relative_gate = float(np.mean(above)) * 10.0 ** (RELATIVE_GATE_LU / 10)
    return _lufs_of(float(np.mean(above[above > relative_gate])))


def _block_powers(channel: Samples, sample_rate: int) -> NDArray[np.float64]:
    """Mean square of the K-weighted channel in blocks of 400 ms, one every 100 ms.

    As in pyloudnorm, a last block that is short by less than half a step is padded with silence.
    """
    from pyloudnorm import IIRfilter
    from scipy.signal import sosfilt

    high_shelf = IIRfilter(*_HIGH_SHELF, sample_rate, "high_shelf_DeMan")
    high_pass = IIRfilter(*_HIGH_PASS, sample_rate, "high_pass_DeMan")
    sections = np.array([[*high_shelf.b, *high_shelf.a], [*high_pass.b, *high_pass.a]])
    n_steps = round((len(channel) / sample_rate - BLOCK_S) / STEP_S) + STEPS_PER_BLOCK
    edges = (np.arange(n_steps + 1) * STEP_S * sample_rate + 1e-6).astype(np.int64)
    state = np.zeros((len(sections), 2))
    energy = np.zeros(n_steps)
    for first in range(0, n_steps, STEPS_PER_CHUNK):
        inner = edges[first : first + STEPS_PER_CHUNK + 1]
        weighted, state = sosfilt(sections, channel[inner[0] : inner[-1]].astype(np.float64), zi=state)
        starts = inner[:-1] - inner[0]
        energy[first : first + len(starts)] = np.add.reduceat(np.square(weighted), starts)
    blocks = np.convolve(energy, np.ones(STEPS_PER_BLOCK), mode="valid")
    return blocks / (BLOCK_S * sample_rate)


def _power_of(lufs: float) -> float:
    return float(10.0 ** ((lufs + LUFS_OFFSET_DB) / 10))


def _lufs_of(power: float) -> float:
    return 10 * math.log10(power) - LUFS_OFFSET_DB


def true_peak_dbtp(audio: Audio) -> float:
    """The largest value of any channel at 4 times the sample rate, dB re full scale; -inf for silence.

    Oversamplers disagree on what is near the Nyquist frequency: a short filter lets it pass, a sharp one
    takes it out and rings. The result is the larger of a 48-tap windowed sinc (BS.1770-4 Annex 2 has 12
    taps a phase) and libsoxr's VHQ, so no usual meter reads more than hundredths of a dB above it.
    """
    if not audio.n_samples:
        return -math.inf
    return _db(max(_sinc_peak(audio.samples), _soxr_peak(audio.samples)))


def to_loudness(audio: Audio, *, target_lufs: float = -14.0, ceiling_dbtp: float = -1.0) -> Audio:
    """Scale by one gain: to the target loudness, or below it where the true-peak ceiling is reached first.

    There is no limiter, so the dynamics do not change. The peak stays `MARGIN_DB` below the ceiling, because
    other oversamplers read up to 0.02 dB more (noise, square waves, music) and dither to 16 bits adds 0.0003.
    Audio too quiet to have a loudness is returned unchanged.
    """
    loudness = loudness_lufs(audio)
    if math.isinf(loudness):
        return audio
    gain_db = min(target_lufs - loudness, ceiling_dbtp - MARGIN_DB - true_peak_dbtp(audio))
    return Audio(audio.samples * np.float32(10.0 ** (gain_db / 20)), audio.sample_rate)


def _soxr_peak(samples: Samples) -> float:
    from soxr import ResampleStream

    stream = ResampleStream(1, OVERSAMPLING, len(samples), dtype="float32", quality=QUALITY)
    peak = 0.0
    for start in range(0, samples.shape[1], CHUNK_FRAMES):
        stop = start + CHUNK_FRAMES
        block = np.ascontiguousarray(samples[:, start:stop].T)
        dense = stream.resample_chunk(block, last=stop >= samples.shape[1])
        peak = max(peak, _magnitude(dense))
    return peak


def _sinc_peak(samples: Samples) -> float:
    """Of the samples and what a windowed sinc puts a quarter, a half and three quarters between them."""
    from scipy.signal import oaconvolve

    phases = _phases()
    peak = 0.0
    for channel in samples:
        for chunk in _overlapping(channel, HALF_TAPS):
            between = (oaconvolve(chunk, phase, mode="valid") for phase in phases)
            peak = max(peak, _magnitude(chunk), *map(_magnitude, between))
    return peak


def _magnitude(values: Samples) -> float:
    return max(float(np.max(values, initial=0.0)), -float(np.min(values, initial=0.0)))


def _phases() -> Samples:
    """Windowed-sinc interpolators for the three points between two samples, float32, (3, 2 * HALF_TAPS)."""
    at = np.arange(-HALF_TAPS + 1, HALF_TAPS + 1)
    rows = []
    for step in range(1, OVERSAMPLING):
        x = at - step / OVERSAMPLING
        window = np.i0(KAISER_BETA * np.sqrt(np.clip(1 - (x / HALF_TAPS) ** 2, 0, 1))) / np.i0(KAISER_BETA)
        row = np.sinc(x) * window
        rows.append(row / row.sum())
    return np.asarray(rows, dtype=np.float32)[:, ::-1]


def _overlapping(channel: Samples, margin: int) -> Iterator[Samples]:
    padded_end = len(channel) + margin
    for start in range(-margin, len(channel), CHUNK_FRAMES):
        stop = min(start + CHUNK_FRAMES + 2 * margin, padded_end)
        chunk = channel[max(0, start) : min(stop, len(channel))]
        yield np.pad(chunk, (max(0, -start), max(0, stop - len(channel))))


def _db(amplitude: float) -> float:
    return 20 * math.log10(amplitude) if amplitude > 0 else -math.inf
