"""What is wrong with a sound whatever it was made from: silence, clipping, an offset, collapse.

Collapse is how generators fail: into noise, or a tone that is stuck. The flatness of a spectrum, the
geometric over the arithmetic mean of its power (Johnston 1988, "Transform coding of audio signals using
perceptual noise criteria"), is near 1 for white noise and 0 for tones. So is the entropy of a spectrum (Misra
et al. 2004, "Spectral entropy based feature for robust ASR"). A stuck sound keeps its spectrum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from pipeline.music.spectra import RATE_HZ, Doubles, Floats
from pipeline.records import Audio, Samples

LEVEL_S = 0.05
SILENT_DBFS = -60.0  # RMS of 50 ms that counts as silence
CLIPPED_RUN = 3  # successive samples at the channel's peak
SAME_VALUE = 2e-5  # of the peak, less than a step of 16 bits: samples that differ less are equal
N_FFT, HOP = 2048, 1024  # at RATE_HZ
PARTS, PART_FRAMES = 7, 3  # of a second: spectra of 0.14 s
RANGE_HZ = (50.0, 10_000.0)
FLOOR_DB = -60.0  # below the strongest bin: quieter bins don't count as changed
NOISE_FLATNESS = 0.5  # 27 pieces of music have 0.44 at most
STUCK_DB = 0.5  # least change of a spectrum, within a second and from one second to the next


@dataclass(frozen=True)
class Defects:
    """Shares are 0 to 1, of the duration unless stated."""

    silent_share: float
    silent_longest_s: float
    clipped_share: float  # of the samples: in runs of CLIPPED_RUN or more at the channel's peak
    dc_offset: float  # mean of the channel that is furthest from 0, 0 to 1 of full scale
    flatness: float | None  # median over the seconds with sound, 0 to 1; None: no such second
    entropy: float | None  # likewise
    noise_share: float  # seconds as flat as noise
    stuck_share: float  # seconds whose spectrum does not change


def find_defects(audio: Audio, mono: Floats) -> Defects:
    """The defects of a sound; `mono` is its mono signal at RATE_HZ, (samples,)."""
    silent = _is_silent(audio)
    seconds = [_describe(power) for power in _seconds(mono)]
    heard = [one for one in seconds if one is not None]
    flatness, entropy = [one.flatness for one in heard], [one.entropy for one in heard]
    n_seconds = max(1, len(seconds))
    return Defects(
        silent_share=float(silent.mean()),
        silent_longest_s=min(_longest_run(silent) * LEVEL_S, audio.duration_s),
        clipped_share=float(np.mean([_clipped_share(channel) for channel in audio.samples])),
        dc_offset=float(np.abs(audio.samples.mean(axis=1, dtype=np.float64)).max()),
        flatness=float(np.median(flatness)) if heard else None,
        entropy=float(np.median(entropy)) if heard else None,
        noise_share=sum(value > NOISE_FLATNESS for value in flatness) / n_seconds,
        stuck_share=_n_stuck(seconds) / n_seconds,
    )


def _is_silent(audio: Audio) -> NDArray[np.bool_]:
    """Of each LEVEL_S, whether all channels are silent."""
    size = max(1, round(LEVEL_S * audio.sample_rate))
    starts = np.arange(0, max(1, audio.n_samples), size)
    lengths = np.diff(starts, append=audio.n_samples)
    power = np.add.reduceat(np.square(audio.samples), starts, axis=1) / lengths
    return np.asarray(power.max(axis=0) < 10 ** (SILENT_DBFS / 10))


def _clipped_share(channel: Samples) -> float:
    peak = float(np.abs(channel).max())
    is_peak = np.abs(channel) >= (1 - SAME_VALUE) * peak
    runs = _runs(is_peak)
    return float(runs[runs >= CLIPPED_RUN].sum() / channel.size) if peak > 0 else 0.0


def _longest_run(flags: NDArray[np.bool_]) -> int:
    return int(_runs(flags).max(initial=0))


def _runs(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The lengths of the runs of true values."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return np.asarray(edges[1::2] - edges[::2], np.int64)


@dataclass(frozen=True, eq=False)
class _Second:
    """The spectrum of one second with sound."""

    flatness: float
    entropy: float
    levels_db: Doubles  # (bins,)
    change_db: float  # mean deviation of the bins' levels within the second


def _seconds(mono: Floats) -> Iterator[Doubles]:
    """Power spectra of the parts of each second, (PARTS, bins), within RANGE_HZ; without a shorter rest."""
    window = np.hanning(N_FFT + 1)[:-1]
    hz = np.arange(N_FFT // 2 + 1) * (RATE_HZ / N_FFT)
    inside = (hz >= RANGE_HZ[0]) & (hz <= RANGE_HZ[1])
    step = PARTS * PART_FRAMES * HOP
    for first in range(0, mono.size - step - N_FFT + HOP + 1, step):
        stretch = mono[first : first + step + N_FFT - HOP]
        frames = np.lib.stride_tricks.sliding_window_view(stretch, N_FFT)[::HOP]
        power = np.abs(scipy.fft.rfft(frames * window, axis=1)[:, inside]) ** 2
        yield power.reshape(PARTS, PART_FRAMES, -1).mean(axis=1) / (window**2).sum()


def _describe(parts: Doubles) -> _Second | None:
    """One second by its power spectra, (PARTS, bins); None if it is silent."""
    power = parts.mean(axis=0)
    if power.mean() < 10 ** (SILENT_DBFS / 10):
        return None
    floor = power.max() * 10 ** (FLOOR_DB / 10)
    share = power / power.sum()
    return _Second(
        flatness=float(np.exp(np.log(power + 1e-30).mean()) / power.mean()),
        entropy=float(-(share * np.log(share + 1e-30)).sum() / np.log(share.size)),
        levels_db=10 * np.log10(power + floor),
        change_db=float((10 * np.log10(parts + floor)).std(axis=0).mean()),
    )


def _n_stuck(seconds: list[_Second | None]) -> int:
    """How many seconds have the spectrum of the one before or after them throughout."""
    same = [
        a is not None and b is not None and float(np.abs(a.levels_db - b.levels_db).mean()) < STUCK_DB
        for a, b in pairwise(seconds)
    ]
    return sum(
        one is not None and one.change_db < STUCK_DB and any(same[max(0, k - 1) : k + 1])
        for k, one in enumerate(seconds)
    )
