"""Splices of two passages of one sound: aligned to the sample, and crossfaded at a constant level.

The entered side is shifted to where it correlates best with the side that is left, around the splice (as in
the time-domain splicing of SOLA, Roucos and Wilgus 1985). Copies of one sample, which are usual in sequenced
music, then join in phase, and beats found a few milliseconds off are aligned.

The crossfade's law depends on the correlation r of the two sides. With gains (cos, sin) of a rising angle,
the sum of two sides of equal power has the power 1 + 2 r cos sin, so dividing by its root keeps the level
for any r: equal power for unrelated sides (r = 0), equal gain for the same sound (r = 1).
"""

from __future__ import annotations

import numpy as np
import scipy.signal

from pipeline.records import Audio, Samples, cut

ALIGN_S = 0.02  # largest shift to either side
ALIGN_WINDOW_S = 0.08  # compared to either side of the splice
ALIGN_PRIOR = 1.0  # correlation that a shift by ALIGN_S must gain over none; 0 without beats
GUARD_S = 0.005  # between the crossfade's end and the beat: attacks begin a little before their steepest rise


def alignment(
    source: Samples, left: int, entered: int, rate: int, *, has_beat: bool, reach_s: float = ALIGN_S
) -> int:
    """Shift of the entered side in samples; `source`: channels whose mean is the mono sound."""
    if left >= source.shape[1]:
        return 0
    reach, half = round(reach_s * rate), round(ALIGN_WINDOW_S * rate)
    here = cut(source, left - half, left + half).mean(axis=0, dtype=np.float64)
    there = cut(source, entered - reach - half, entered + reach + half).mean(axis=0, dtype=np.float64)
    inner = scipy.signal.correlate(there, here, mode="valid", method="fft")
    sums = np.concatenate([[0.0], np.cumsum(there**2)])
    power = np.maximum(sums[here.size :] - sums[: -here.size], 0.0) * (here**2).sum()
    correlation = inner / np.sqrt(np.maximum(power, 1e-9))
    shifts = np.arange(-reach, reach + 1)
    prior = ALIGN_PRIOR if has_beat else 0.0
    return int(shifts[np.argmax(correlation - prior * (shifts / max(reach, 1)) ** 2)])


def crossfade(audio: Audio, left: int, entered: int, n: int) -> Samples:
    """n samples, (channels, n), from the passage that begins at sample `left` to that at `entered`."""
    sides = [(start, start + n) for start in (left, entered)]
    a, b = (cut(audio.mono_channels, *side).mean(axis=0, dtype=np.float64) for side in sides)
    power = float((a**2).sum() * (b**2).sum())
    r = float(np.clip((a * b).sum() / np.sqrt(max(power, 1e-20)), 0.0, 1.0))
    angle = 0.5 * np.pi * (np.arange(n) + 0.5) / n
    level = np.sqrt(1.0 + 2.0 * r * np.cos(angle) * np.sin(angle))
    leaving, entering = (cut(audio.samples, *side) for side in sides)
    mixed = leaving * (np.cos(angle) / level) + entering * (np.sin(angle) / level)
    return np.asarray(mixed, np.float32)
