"""Integrated loudness and true peak by ITU-R BS.1770-4, and the one gain that respects both.

The signal is processed in pieces, so that memory holds the signal and one scaled copy at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
# The 48 taps of the interpolating filter at 4 times the rate (Annex 2), as four phases of 12. The other two
# phases are these reversed.
_PHASES = np.array([
    [0.0017089843750, 0.0109863281250, -0.0196533203125, 0.0332031250000, -0.0594482421875, 0.1373291015625,
     0.9721679687500, -0.1022949218750, 0.0476074218750, -0.0266113281250, 0.0148925781250, -0.0083007812500],
    [-0.0291748046875, 0.0292968750000, -0.0517578125000, 0.0891113281250, -0.1665039062500, 0.4650878906250,
     0.7797851562500, -0.2003173828125, 0.1015625000000, -0.0582275390625, 0.0330810546875, -0.0189208984375],
], dtype=np.float32)  # fmt: skip
PHASES = np.concatenate([_PHASES, _PHASES[::-1, ::-1]])
CHUNK_FRAMES = 1 << 16
MARGIN_DB = 0.1  # kept below the ceiling: see `gain_to`


@dataclass(frozen=True)
class Levels:
    """How loud a sound is as a whole, and its highest peak."""

    loudness_lufs: float  # -inf: too quiet to have one
    true_peak_dbtp: float  # -inf: digital silence

    def amplified(self, gain_db: float) -> Levels:
        """The levels after a gain."""
        return Levels(self.loudness_lufs + gain_db, self.true_peak_dbtp + gain_db)


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
    above = power[power >= 10.0 ** ((ABSOLUTE_GATE_LUFS + LUFS_OFFSET_DB) / 10)]
    if not len(above):
        return -math.inf
    relative_gate = float(np.mean(above)) * 10.0 ** (RELATIVE_GATE_LU / 10)
    return 10 * math.log10(float(np.mean(above[above > relative_gate]))) - LUFS_OFFSET_DB


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


def true_peak_dbtp(audio: Audio) -> float:
    """The largest value of any channel at 4 times the sample rate, dB re full scale; -inf for silence.

    By the filter of BS.1770-4, Annex 2. From 96 kHz on it oversamples 2 times, from 192 kHz on not at all.
    """
    taps = PHASES.shape[1]
    phases = PHASES[:: max(1, audio.sample_rate // 48_000)]
    peak = 0.0
    for channel in audio.samples:
        padded = np.pad(channel, taps - 1)
        for start in range(0, audio.n_samples + taps - 1, CHUNK_FRAMES):
            chunk = padded[start : start + CHUNK_FRAMES + taps - 1]
            between = (interpolated(chunk, phase) for phase in phases)
            peak = max(peak, _magnitude(chunk), *map(_magnitude, between))
    return _db(peak)


def interpolated(samples: Samples, phase: Samples) -> Samples:
    """The values at one phase between the samples, (samples - taps + 1,).

    A sum of shifted products takes a quarter of the time of np.convolve, and its bits depend on no library.
    """
    n = samples.size - phase.size + 1
    total = np.zeros(n, np.float32)
    for shift, tap in enumerate(phase[::-1]):
        total += samples[shift : shift + n] * tap
    return total


def levels(audio: Audio) -> Levels:
    """Loudness and true peak, from which a gain is decided."""
    return Levels(loudness_lufs(audio), true_peak_dbtp(audio))


def gain_to(found: Levels, *, target_lufs: float, ceiling_dbtp: float) -> float:
    """The gain in dB to the target loudness, or the lower one at which the true-peak ceiling is reached.

    The peak stays `MARGIN_DB` below the ceiling, because other oversamplers read up to 0.03 dB more on music
    and dither to 16 bits adds 0.0003 dB. Sound too quiet to have a loudness gets no gain.
    """
    if math.isinf(found.loudness_lufs):
        return 0.0
    return min(target_lufs - found.loudness_lufs, ceiling_dbtp - MARGIN_DB - found.true_peak_dbtp)


def amplify(audio: Audio, gain_db: float) -> Audio:
    """Scale by one gain, so that the dynamics do not change; returns `audio` itself for 0 dB."""
    if gain_db == 0.0:
        return audio
    return Audio(audio.samples * np.float32(10.0 ** (gain_db / 20)), audio.sample_rate)


def to_loudness(audio: Audio, *, target_lufs: float = -14.0, ceiling_dbtp: float = -1.0) -> Audio:
    """Scale to the target loudness, or below it where the ceiling is reached first: see `gain_to`."""
    return amplify(audio, gain_to(levels(audio), target_lufs=target_lufs, ceiling_dbtp=ceiling_dbtp))


def _magnitude(values: Samples) -> float:
    return max(float(np.max(values, initial=0.0)), -float(np.min(values, initial=0.0)))


def _db(amplitude: float) -> float:
    return 20 * math.log10(amplitude) if amplitude > 0 else -math.inf
