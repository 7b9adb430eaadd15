"""Which passages of a variation are near-identical copies of its source.

A fingerprint is made of both (Haitsma and Kalker 2002, "A highly robust audio fingerprinting system"). A
passage is a copy where the bits of a second differ from those of the source in a fifth at most, at one lag.
The paper's limit for a recording of unknown quality is 35 %; bits of unrelated sounds differ in 50 %. Gain,
MP3 and moderate noise leave the bits alone. The same notes on another instrument differ in more than a third.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.music.spectra import TONE_RATE_HZ, Floats

Bits = NDArray[np.int8]

CHANGE_LAG = 3  # spectra, 70 ms, over which changes are taken
SILENT_LEVEL = 1e-3  # of the track's loudest frame, magnitude: below, a frame has no bits
WINDOW = round(TONE_RATE_HZ)  # frames that must agree on average
MAX_BIT_ERRORS = 0.2
BLOCK_FRAMES = 64  # compared with the source at once


@dataclass(frozen=True)
class Copies:
    """How much of a variation is copied from its source."""

    longest_s: float  # the longest passage that is copied in one piece
    share: float  # of the variation that is in any copied passage, 0 to 1


def fingerprint(pitches: Floats) -> Bits:
    """The signs of the change over time of the power differences of neighbouring semitones.

    Args:
        pitches: magnitudes from 55 Hz to 3.3 kHz, (semitones, frames), of `compute_spectra`.

    Returns:
        +1 or -1, (frames, semitones - 1); zeros in frames without sound.
    """
    differences = np.diff(pitches**2, axis=0)
    change = np.zeros_like(differences)
    change[:, CHANGE_LAG:] = differences[:, CHANGE_LAG:] - differences[:, :-CHANGE_LAG]
    levels = pitches.sum(axis=0)
    is_heard = levels > SILENT_LEVEL * levels.max(initial=0.0)
    return np.ascontiguousarray((np.sign(change) * is_heard).T.astype(np.int8))


def find_copies(source: Bits, made: Bits, on_step: Callable[[], None] = lambda: None) -> Copies:
    """The passages of `made` that are found anywhere in `source`, by their fingerprints.

    All diagonals of the matrix of agreements (made frames by source frames) are followed at once, row by row,
    so that only WINDOW + BLOCK_FRAMES of its rows are in memory. `on_step` is called before every
    BLOCK_FRAMES, and may raise: two tracks of 20 minutes take half a minute.
    """
    window = min(WINDOW, len(source), len(made))
    needed, columns = _needed_agreement(made, window), source.T.astype(np.float32)
    recent = np.zeros((window, len(source)), np.float32)
    sums, runs = np.zeros(len(source), np.float32), np.zeros(len(source) + 1, np.int64)
    is_copied, longest = np.zeros(len(made), bool), 0
    for first in range(0, len(made), BLOCK_FRAMES):
        on_step()
        for at, agreement in enumerate(made[first : first + BLOCK_FRAMES] @ columns, first):
            earlier, sums = sums, agreement.copy()
            sums[1:] += earlier[:-1]
            sums[window:] -= recent[at % window, :-window]  # what has left the window, one diagonal each
            recent[at % window] = agreement
            is_match = sums >= needed[at]
            runs[1:] = (runs[:-1] + 1) * is_match
            if (run := int(runs.max())) > 0:
                is_copied[at - window + 1 : at + 1] = True
                longest = max(longest, run + window - 1)
    return Copies(longest / TONE_RATE_HZ, float(is_copied.mean()))


def shared_share(one: Bits, other: Bits) -> float:
    """Share of the sound that two variations have in common at the same time, 0 to 1; see `fingerprint`."""
    n = min(len(one), len(other))
    window = min(WINDOW, n)
    agreements = (one[:n] * other[:n]).sum(axis=1, dtype=np.float64)
    sums = np.cumsum(agreements)
    sums[window:] -= sums[:-window].copy()
    ends = np.flatnonzero(sums >= _needed_agreement(one[:n], window))
    is_shared = np.zeros(n, bool)
    is_shared[(ends[:, None] - np.arange(window)).ravel()] = True
    return float(is_shared.mean())


def _needed_agreement(made: Bits, window: int) -> NDArray[np.float64]:
    """Least sum of agreements of the window that ends at each frame, (frames,).

    Silent frames need none, but half of the window must be heard.
    """
    heard = np.cumsum(made.any(axis=1), dtype=np.float64)
    heard[window:] -= heard[:-window].copy()
    needed: NDArray[np.float64] = (1 - 2 * MAX_BIT_ERRORS) * made.shape[1] * np.maximum(heard, window / 2)
    needed[: window - 1] = np.inf
    return needed
