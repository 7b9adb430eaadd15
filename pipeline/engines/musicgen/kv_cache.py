"""The KV cache of the CPU decoder: memory of the kernels' layout, one slot per row and per prefix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen.decoder import Shape
from pipeline.engines.musicgen.kernels import Attended, KeysValues, aligned

STEPS_UNIT = 128  # the kernels take slots in multiples of so many steps

Indices = NDArray[np.int64]


class Slots:
    """Keys and values of a number of slots: int8 with a 16 bit scale per position and head, or float32.

    The memory of a slot is contiguous, and the system provides it when it is first written to: a
    slot that is never used takes none.
    """

    def __init__(self, shape: Shape, slots: int, steps: int, *, is_int8: bool) -> None:
        self.shape = shape
        heads, steps = slots * shape.layers * shape.heads, whole_units(steps)
        numbers = ((heads, steps * shape.head_size), np.int8 if is_int8 else np.float32)
        scales = ((heads, steps if is_int8 else 0), np.uint16)
        self.arrays = KeysValues(*(aligned(size, kind) for size, kind in (numbers, scales) * 2))

    def attended(self, slots: Indices, lengths: Indices) -> Attended:
        """The first `lengths` steps of these slots, as the kernels take them."""
        layers = np.arange(self.shape.layers, dtype=np.int64)[:, None]
        first_heads = (slots * self.shape.layers + layers) * self.shape.heads
        return Attended(self.arrays, first_heads, lengths)


class CpuKVCache:
    """The slots of rows and of prefixes."""

    def __init__(
        self, shape: Shape, rows: int, steps: int, prefixes: int, prefix_steps: int, *, is_int8: bool
    ) -> None:
        self.rows = Slots(shape, rows, steps, is_int8=is_int8)
        self.prefixes = Slots(shape, prefixes, prefix_steps, is_int8=is_int8)
        self.prefix_lengths: Indices = np.zeros(prefixes, np.int64)


def slot_bytes(shape: Shape, steps: int, *, is_int8: bool) -> int:
    """Size of a slot for so many steps."""
    per_head = shape.head_size + 2 if is_int8 else 4 * shape.head_size
    return 2 * shape.layers * shape.heads * per_head * whole_units(steps)


def whole_units(steps: int) -> int:
    return -(-steps // STEPS_UNIT) * STEPS_UNIT
