"""Music of any length in windows that the model can make.

The model has never seen more than 30 s at once. What is longer is made in windows of that length,
each beginning with the last 12 s of the one before, given as they are, and going on from there
(a stride of 18 s: audiocraft's `extend_stride`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen.decoder import Tokens

STRIDE = 0.6  # of a window: 18 s of 30

UNKNOWN = -1


@dataclass(frozen=True)
class Window:
    """Frames `start` to `start + frames`, made in one go."""

    start: int
    frames: int


def windows(n_frames: int, longest: int, stride: int) -> tuple[Window, ...]:
    """Windows of `longest` frames at most that cover `n_frames`, each `stride` after the one before."""
    starts = [0]
    while starts[-1] + longest < n_frames:
        starts.append(starts[-1] + stride)
    return tuple(Window(start, min(longest, n_frames - start)) for start in starts)


@dataclass(frozen=True, eq=False)
class Delayed:
    """One window's tokens as the decoder sees them: codebook k stands `lags[k]` steps late.

    Step i picks frame i - lags[k] of each codebook k, and is told what step i - 1 picked (Copet et
    al. 2023, 2.3, the delay pattern).
    """

    codes: NDArray[np.int64]  # (codebooks, all frames), UNKNOWN where nothing was picked yet; a view
    window: Window
    lags: NDArray[np.int64]  # (codebooks,)
    pad: int  # the token that stands where there is no frame

    @property
    def steps(self) -> int:
        return self.window.frames + int(self.lags.max())

    @property
    def known_steps(self) -> int:
        """How many steps from the first have nothing left to pick."""
        start, frames = self.window.start, self.window.frames
        known = (self.codes[:, start : start + frames] != UNKNOWN).sum(axis=1)
        unfinished = known < frames
        return int((known + self.lags)[unfinished].min()) if unfinished.any() else self.steps

    @property
    def known(self) -> Tokens:
        """What those steps are told, (steps, codebooks)."""
        return self.told(0, self.known_steps)

    def told(self, first: int, last: int) -> Tokens:
        """What steps `first` to `last`, without it, are told: (steps, codebooks)."""
        frames = np.arange(first, last)[:, None] - 1 - self.lags
        inside = (frames >= 0) & (frames < self.window.frames)
        at = self.window.start + np.where(inside, frames, 0)
        return np.where(inside, self.codes[np.arange(len(self.lags)), at], self.pad)

    def put(self, step: int, picked: Tokens) -> None:
        """Keep what was picked at a step, (codebooks,), wherever it was not known."""
        frames = step - self.lags
        inside = (frames >= 0) & (frames < self.window.frames)
        books = np.flatnonzero(inside)
        at = self.window.start + frames[books]
        new = self.codes[books, at] == UNKNOWN
        self.codes[books[new], at[new]] = picked[books[new]]
