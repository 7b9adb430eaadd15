"""How well joins are hidden, and where a sound has a seam.

A poor join can be a click, a step of the level, or an onset. A click is a sample off the line through its
neighbours, much further than those of the sound around it (Godsill and Rayner 1998, "Digital audio
restoration", with a fixed predictor). Onsets are measured by spectral flux (see `pipeline.music.spectra`).
Music has all three without any join, so each is compared with what is usual in the source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.music.spectra import FRAME_RATE_HZ, Doubles, Floats

NEAR_FRAMES = 8  # 46 ms to either side of a join's time, in which its effect is looked for
CLICK_FRAMES = 4  # 23 ms to either side, which a click stands out of
LEVEL_FRAMES = 35  # 0.2 s to either side, whose levels are compared
LEVEL_FLOOR_DB = -50.0  # of the track's loudest frame: what is quieter makes no step
ONSET_FRAMES = 43  # 0.25 s: the strongest onset of each stands for the track's own onsets
USUAL_PERCENT = 95.0  # of the track's own onsets: a join may be as strong
BLOCK_FRAMES = 4096  # measured at once
TINY = 1e-7  # keeps the logarithm of silence finite
LOWEST_DB = -100.0
# In the order click, rise, fall, onset, dB: medians of `usual` and `most` over 27 pieces of music. What is
# below is no seam, whatever the source has. What is AUDIBLE above both has the quality 0.
TYPICAL_USUAL = (22.0, 8.0, 6.0, -2.5)
TYPICAL_MOST = (28.0, 20.0, 14.0, 0.0)
AUDIBLE = (12.0, 12.0, 6.0, 6.0)


@dataclass(frozen=True)
class Seam:
    """One moment of a variation."""

    at_s: float
    quality: float  # 0 to 1; 1: no more of a seam than the source has by itself


@dataclass(frozen=True, eq=False)
class SeamCurves:
    """What can give a seam away, dB, at FRAME_RATE_HZ: click, rise of level, fall of level, onset."""

    curves: Floats  # (4, frames)

    def usual(self) -> Floats:
        """What the track's own onsets have, (4,): a percentile of the largest value in each 0.25 s."""
        whole = self.curves.shape[1] // ONSET_FRAMES * ONSET_FRAMES
        if not whole:
            return self.most()
        largest = self.curves[:, :whole].reshape(len(self.curves), -1, ONSET_FRAMES).max(axis=2)
        return np.asarray(np.percentile(largest, USUAL_PERCENT, axis=1), np.float32)

    def most(self) -> Floats:
        """The largest value of each curve, (4,)."""
        return np.asarray(self.curves.max(axis=1))


def seam_curves(mono: Floats, sample_rate: int, onsets: Floats) -> SeamCurves:
    """The curves of mono sound, (samples,), with its onset strengths, (frames,), of `compute_spectra`."""
    edges = np.round(np.arange(onsets.size + 1) * (sample_rate / FRAME_RATE_HZ)).astype(np.int64)
    edges = np.minimum(edges, max(0, mono.size - 1))
    blocks = [edges[first : first + BLOCK_FRAMES + 1] for first in range(0, onsets.size, BLOCK_FRAMES)]
    peak, error, power = np.concatenate([_of_frames(mono, block) for block in blocks], axis=1)
    rise = _rise_db(power)
    curves = np.stack([_click_db(peak, error), rise, -rise, 20 * np.log10(onsets + 1e-3)])
    curves[:, :NEAR_FRAMES] = curves[:, -NEAR_FRAMES:] = LOWEST_DB  # a file's ends are no seams
    return SeamCurves(curves.astype(np.float32))


def smoothness(made: SeamCurves, source: SeamCurves, at_s: float) -> float:
    """How smooth a known join is, 0 to 1: what is near it against what the source's own onsets have."""
    frame = round(at_s * FRAME_RATE_HZ)
    near = made.curves[:, max(0, frame - NEAR_FRAMES) : frame + NEAR_FRAMES + 1]
    if not near.shape[1]:
        return 1.0
    return float(_quality(near, source.usual(), TYPICAL_USUAL).min())


def worst_seam(made: SeamCurves, source: SeamCurves) -> Seam:
    """The worst moment, against the most that the source has and the variation's own usual onsets."""
    own = np.maximum(source.most(), made.usual())
    quality = _quality(made.curves, own, TYPICAL_MOST)
    at = int(np.argmin(quality))
    return Seam(at / FRAME_RATE_HZ, float(quality[at]))


def _quality(curves: Floats, own: Floats, typical: tuple[float, ...]) -> Floats:
    """Quality of each frame, 0 to 1, by the curve that is furthest above what the music has."""
    limits = np.maximum(own, typical)[:, None]
    excess = (curves - limits) / np.array(AUDIBLE)[:, None]
    return np.asarray(1.0 - np.clip(excess.max(axis=0), 0.0, 1.0), np.float32)


def _of_frames(mono: Floats, edges: NDArray[np.int64]) -> Doubles:
    """Largest and mean prediction error and mean power of the samples between the edges, (3, edges - 1)."""
    first, last = int(edges[0]), int(edges[-1])
    around = np.pad(mono[max(0, first - 1) : last + 1], (int(first == 0), 0), mode="edge")
    error = np.abs(np.diff(around, 2))[: last - first]
    starts = np.minimum(edges[:-1] - first, max(0, error.size - 1))
    lengths = np.maximum(np.diff(edges), 1)
    power = np.square(mono[first:last])
    means = [np.add.reduceat(values, starts, dtype=np.float64) / lengths for values in (error, power)]
    return np.stack([np.maximum.reduceat(error, starts), *means])


def _click_db(peak: Doubles, error: Doubles) -> Doubles:
    """The largest prediction error of each frame over the mean error of the louder side of it."""
    before, after = _sides(error, CLICK_FRAMES)
    return np.asarray(20 * np.log10((peak + TINY) / (np.maximum(before, after) + TINY)))


def _rise_db(power: Doubles) -> Doubles:
    """The level of the LEVEL_FRAMES after each frame less the level of as many before it."""
    floor = max(float(power.max(initial=0.0)) * 10 ** (LEVEL_FLOOR_DB / 10), TINY)
    before, after = _sides(power, LEVEL_FRAMES)
    return np.asarray(10 * np.log10((after + floor) / (before + floor)))


def _sides(values: Doubles, n: int) -> tuple[Doubles, Doubles]:
    """The means of the n values before and after each one; beyond the ends the outermost value goes on."""
    sums = np.cumsum(np.pad(values, (n + 1, n), mode="edge"))
    means = (sums[n:] - sums[:-n]) / n
    return means[: values.size], means[n + 1 : n + 1 + values.size]
