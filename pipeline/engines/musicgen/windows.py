"""Music of any length, made in windows that the model can make, and the delay pattern within a window.

The model was trained on 30 s. Longer music is made in windows of that length. Each begins with the
last 12 s of the one before, which stay as they are, and continues from there (a stride of 18 s, as
audiocraft's `extend_stride`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen.decoder import UNKNOWN, Tokens

STRIDE = 0.6  # of a window: 18 s of 30


@dataclass(frozen=True)
class Window:
    """Frames `start` to `start + frames` of a piece, made without a break."""

    start: int
    frames: int


def windows(n_frames: int, longest: int, stride: int) -> tuple[Window, ...]:
    """Windows of `longest` frames at most that cover `n_frames`, each `stride` after the one before."""
    starts = [0]
    while starts[-1] + longest < n_frames:
        starts.append(starts[-1] + stride)
    return tuple(Window(start, min(longest, n_frames - start)) for start in starts)


@dataclass(frozen=True, eq=False)
class DelayedWindow:
    """The tokens of one window as the decoder sees them: codebook k is `delays[k]` steps late.

    Step i picks frame i - delays[k] of each codebook k, and its input is what step i - 1 picked
    (Copet et al. 2023, section 2.3, the delay pattern).
    """

    codes: NDArray[np.int64]  # a view of (codebooks, all frames), UNKNOWN where no token was picked yet
    window: Window
    delays: NDArray[np.int64]  # (codebooks,)
    pad: int  # the token that stands where there is no frame

    @property
    def steps(self) -> int:
        return self.window.frames + int(self.delays.max())

    @property
    def known_steps(self) -> int:
        """How many steps, from the first, have no token left to pick."""
        start, frames = self.window.start, self.window.frames
        known = (self.codes[:, start : start + frames] != UNKNOWN).sum(axis=1)
        unfinished = known < frames
        return int((known + self.delays)[unfinished].min()) if unfinished.any() else self.steps

    def inputs(self, first: int, end: int) -> Tokens:
        """The inputs of steps `first` to `end`, excluded: (steps, codebooks)."""
        frames = np.arange(first, end)[:, None] - 1 - self.delays
        inside = (frames >= 0) & (frames < self.window.frames)
        at = self.window.start + np.where(inside, frames, 0)
        return np.where(inside, self.codes[np.arange(len(self.delays)), at], self.pad)

    def store(self, first: int, picked: Tokens) -> None:
        """Store the tokens (steps, codebooks) picked from step `first` on, except where a token was known."""
        frames = first + np.arange(len(picked))[:, None] - self.delays
        step, book = np.nonzero((frames >= 0) & (frames < self.window.frames))
        at = self.window.start + frames[step, book]
        new = self.codes[book, at] == UNKNOWN
        self.codes[book[new], at[new]] = picked[step[new], book[new]]
