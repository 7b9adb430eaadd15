"""The cost of a peer's run at every length: steps timed at a few lengths, and a sum over all steps.

A peer's own loop runs unchanged. A hook that it offers calls `StepTimer.step_done` at every step. Steps at
long contexts would take minutes to reach, so the timer makes the loop's KV cache longer in place,
repeating the positions it holds, and the loop continues from there: the cost of a step depends on how
many positions are cached, not on their values. The first steps are timed with the cache as it is, and
again at the same length with the cache copied, so that the two can be compared.

The time for a whole piece is the prefill plus a sum over its steps, interpolated between the
measured lengths. It is not one straight line: a loop that copies its cache at every step, as both
peers do, becomes slower where the keys of a layer outgrow the blocks that glibc's malloc reuses
(32 MiB), because each copy then is made in fresh pages. So both sides of that length are measured too.
Lengths that do not fit into this machine's memory are left out and named in the output; the time is
extrapolated in a straight line through the points on the same side of that length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from child import mapped_bytes, peak_bytes
from machine import GIB, available_bytes

if TYPE_CHECKING:
    import torch

FRAME_RATE = 50
CODEBOOKS = 4
HIDDEN, LAYERS = 1536, 48
DURATION_S = 30.0
OWN_STEPS = (375, 750, 1125, 1500)
WARM_STEPS, TIMED_STEPS = 1, 3
REUSED_BYTES = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX of glibc on 64 bits
MARGIN_STEPS = 10  # distance of the two measured lengths from that length
RESERVE_BYTES = 2 * GIB  # for the system, and for a step's memory beside the cache


@dataclass(frozen=True)
class Point:
    """Steps at one length of context."""

    context: int  # positions that a row attends to, at the middle one of these steps
    own: int  # positions after the prefix
    seconds: tuple[float, ...]  # of each step

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class PeerRun:
    """The time for a number of variations, made at once."""

    name: str
    variations: int
    rows: int  # two per variation, with guidance
    prefill_s: float  # from the call to the first token of all rows
    untouched: Point  # the loop's first steps, with the cache as it is
    points: tuple[Point, ...]  # with the cache copied: at the same length, then longer
    left_out: tuple[int, ...]  # own steps whose cache does not fit into memory
    load_s: float
    peak_bytes: int  # with the longest cache measured
    others_cores: float = 0.0  # cores that were busy with other work meanwhile

    def lm_s(self, duration_s: float = DURATION_S) -> float:
        """Seconds until all tokens of all variations are there, without EnCodec."""
        return self.prefill_s + float(self.step_s(np.arange(2, n_steps(duration_s) + 1)).sum())

    def step_s(self, own: np.ndarray) -> np.ndarray:
        """Seconds of a step by its number of own positions, as the module's docstring says."""
        known = sorted((self.untouched, *self.points), key=lambda point: point.own)
        lengths = np.array([point.own for point in known], float)
        medians = np.array([point.median_s for point in known])
        jump = jump_own(self.rows, self.untouched.context - self.untouched.own)
        alike = (lengths > jump) == (lengths[-1] > jump)
        # With one point there is no slope, which is in the peer's favour.
        slope = max(0.0, float(np.polyfit(lengths[alike], medians[alike], 1)[0])) if alike.sum() > 1 else 0.0
        beyond = np.maximum(0, own - lengths[-1])
        return np.asarray(np.interp(own, lengths, medians) + slope * beyond)

    def full_bytes(self, duration_s: float = DURATION_S) -> int:
        """Peak memory for whole pieces: the measured peak and the part of the cache that was missing."""
        longest = max(point.own + len(point.seconds) // 2 for point in (self.untouched, *self.points))
        missing = max(0, n_steps(duration_s) - longest)
        return self.peak_bytes + missing * self.rows * position_bytes()


@dataclass(frozen=True)
class Missing:
    """A peer that could not be measured."""

    name: str
    variations: int
    reason: str


def n_steps(duration_s: float) -> int:
    """Number of steps that pick tokens: the first is the prefill; the delay pattern takes three more."""
    return round(FRAME_RATE * duration_s) + CODEBOOKS - 1


def position_bytes() -> int:
    """Keys and values of one position of one row in all layers, float32."""
    return LAYERS * HIDDEN * 2 * 4


def jump_own(rows: int, prefix: int) -> int:
    """Number of own positions from which a layer's keys outgrow the blocks that malloc reuses."""
    return REUSED_BYTES // (rows * HIDDEN * 4) - prefix


class Cache(Protocol):
    """A loop's KV cache, (rows, heads, positions, head size) each, layer by layer."""

    def get(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]: ...

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None: ...


class Measured(Exception):
    """Raised to end a peer's loop when enough was measured."""


class StepTimer:
    """Records the time of each step, and makes the cache longer after enough steps at one length."""

    def __init__(
        self, cache: Cache, rows: int, own_steps: Sequence[int] = OWN_STEPS, timed: int = TIMED_STEPS
    ) -> None:
        self._cache, self._rows, self._timed = cache, rows, timed
        self._targets = [0, *own_steps]  # the first is the length that the loop has then
        self._prefill_s = 0.0
        self._prefix = 0
        self._seconds: list[float] = []
        self._points: list[Point] = []
        self._left_out: list[int] = []
        self._began_s = self._last_s = time.perf_counter()

    def start(self) -> None:
        """Call this right before the loop."""
        self._began_s = time.perf_counter()

    def step_done(self) -> None:
        """Call this once per step, as soon as its scores or its tokens are known.

        Raises:
            Measured: all lengths are measured.
        """
        now_s = time.perf_counter()
        if not self._prefix:
            self._prefill_s = now_s - self._began_s
            self._prefix = self._context() - 1  # the start token is the row's own
            self._targets = self._with_jump(self._targets)
        else:
            self._seconds.append(now_s - self._last_s)
        if len(self._seconds) == WARM_STEPS + self._timed:
            middle = self._context() - (self._timed - 1) // 2
            self._points.append(Point(middle, middle - self._prefix, tuple(self._seconds[WARM_STEPS:])))
            self._seconds.clear()
            self._lengthen()
        self._last_s = time.perf_counter()

    def result(self, name: str, load_s: float) -> PeerRun:
        """The measurements; `peak_bytes` is this process's."""
        return PeerRun(
            name=name,
            variations=self._rows // 2,
            rows=self._rows,
            prefill_s=self._prefill_s,
            untouched=self._points[0],
            points=tuple(self._points[1:]),
            left_out=tuple(self._left_out),
            load_s=load_s,
            peak_bytes=peak_bytes(),
        )

    def _with_jump(self, targets: list[int]) -> list[int]:
        """The targets, and one on either side of where a layer's keys outgrow malloc's blocks."""
        jump = jump_own(self._rows, self._prefix)
        if not 3 * MARGIN_STEPS < jump < max(targets) - MARGIN_STEPS:
            return targets
        return sorted({*targets, jump - MARGIN_STEPS, jump + MARGIN_STEPS})

    def _context(self) -> int:
        return int(self._cache.get(0)[0].shape[2])

    def _lengthen(self) -> None:
        import torch

        if not self._targets:
            raise Measured
        now = self._context()
        # The timed steps lie around the target; each adds a position.
        own = self._targets[0] - WARM_STEPS - (self._timed + 1) // 2
        positions = max(now, self._prefix + own)
        if not fits((positions - now) * self._rows * position_bytes()):
            self._left_out += self._targets
            raise Measured
        del self._targets[0]
        which = torch.arange(positions) % now
        for layer in range(LAYERS):
            keys, values = self._cache.get(layer)
            self._cache.put(layer, keys.index_select(2, which), values.index_select(2, which))


def fits(more_bytes: int) -> bool:
    """Whether so much more memory is available while the mapped weights stay resident."""
    free = available_bytes()
    return free is None or more_bytes <= free - mapped_bytes() - RESERVE_BYTES
