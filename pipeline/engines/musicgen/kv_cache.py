"""The KV cache of the CPU decoder: memory of the kernels' layout, one slot per row and per prefix."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen.kernels import Attended, KeysValues

STEPS_UNIT = 128  # the kernels take slots in multiples of so many steps

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class SlotShape:
    """What decides the size of a slot, beside its number of steps."""

    layers: int
    heads: int
    head_size: int
    is_int8: bool  # int8 with a 16 bit scale per position and head; otherwise float32

    def n_bytes(self, steps: int) -> int:
        """Size of a slot for so many steps."""
        per_head = self.head_size + 2 if self.is_int8 else 4 * self.head_size
        return 2 * self.layers * self.heads * per_head * whole_units(steps)


class Slots:
    """Keys and values of a number of slots.

    The memory of a slot is contiguous, and the system provides it when it is first written to: a
    slot that is never used takes none.
    """

    def __init__(self, shape: SlotShape, slots: int, steps: int) -> None:
        self.shape, self.n_slots = shape, slots
        heads, steps = slots * shape.layers * shape.heads, whole_units(steps)
        numbers = ((heads, steps * shape.head_size), np.int8 if shape.is_int8 else np.float32)
        scales = ((heads, steps if shape.is_int8 else 0), np.uint16)
        self._memory, self.arrays = zip(  # keys, scales of keys, values, scales of values
            *(_anonymous(size, kind) for size, kind in (numbers, scales) * 2), strict=True
        )

    def attended(self, slots: Indices, lengths: Indices) -> Attended:
        """The first `lengths` steps of these slots, as the kernels take them."""
        layers = np.arange(self.shape.layers, dtype=np.int64)[:, None]
        first_heads = (slots * self.shape.layers + layers) * self.shape.heads
        return Attended(KeysValues(*self.arrays), first_heads, lengths)

    def release(self, slot: int) -> None:
        """Give a slot's memory back to the system, as far as it is whole pages; it can be used again."""
        for memory, array in zip(self._memory, self.arrays, strict=True):
            size = array.nbytes // self.n_slots
            _release(memory, slot * size, (slot + 1) * size)


class CpuKVCache:
    """See `KVCache`."""

    def __init__(self, shape: SlotShape, rows: int, steps: int, prefixes: int, prefix_steps: int) -> None:
        self.rows = Slots(shape, rows, steps)
        self.prefixes = Slots(shape, prefixes, prefix_steps)
        self.prefix_lengths: Indices = np.zeros(prefixes, np.int64)

    def release(self, slot: int) -> None:
        self.rows.release(slot)


def whole_units(steps: int) -> int:
    return -(-steps // STEPS_UNIT) * STEPS_UNIT


def _anonymous(shape: tuple[int, int], kind: type) -> tuple[mmap.mmap, NDArray[Any]]:
    """An array of zeros in memory of the system's, in huge pages where it has them."""
    size = math.prod(shape)
    n_bytes = max(1, size * np.dtype(kind).itemsize)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, np.frombuffer(memory, kind, size).reshape(shape)


def _release(memory: mmap.mmap, first: int, last: int) -> None:
    """Give back bytes `first` to `last`, as far as they are whole pages."""
    first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        with suppress(OSError):  # memory of a kind that can't be given back
            memory.madvise(mmap.MADV_DONTNEED, first, last - first)
