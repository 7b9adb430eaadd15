"""The decoder on a CPU: `kernels` over packed layers, in float32 or int8."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen import kernels
from pipeline.engines.musicgen.decoder import Ends, Feed
from pipeline.engines.musicgen.layers import MATRICES, NORMS, Stack, aligned
from pipeline.records import Samples

WORTH_A_THREAD = 1 << 22  # weights: with fewer, waking threads takes longer than they save
STEPS_UNIT = 128  # the caches' lengths are multiples of this
ENTRIES_AT_ONCE = 8 * kernels.ROW_BLOCK  # of a prefill
NO_NORM: Samples = np.empty((0, 0), np.float32)
NO_SCALES: Samples = np.empty(0, np.float32)

# Linux, x86-64 (arch/x86/include/uapi/asm/prctl.h): a process asks for AMX's registers before it uses them.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18

Indices = NDArray[np.int64]


class CpuDecoder:
    """A stack of layers between two ends."""

    def __init__(self, stack: Stack, ends: Ends, threads: int | None = None) -> None:
        """`threads` None: all cores."""
        self.stack = stack
        self.ends = replace(ends, heads=NO_NORM)  # packed, they are `heads`
        self.shape, self.precision = stack.shape, str(stack.precision)
        self.heads = kernels.pack_columns(ends.heads)
        few = sum(array.size for array in stack.arrays.values()) < WORTH_A_THREAD
        self.threads = 1 if few else min(threads or cores(), cores())
        self._compiled: set[Any] = set()  # kernels

    def memory(self, rows: int, steps: int, prefixes: int, prefix_steps: int) -> CpuMemory:
        """See `Decoder.memory`; a row or prefix that isn't used takes no room."""
        return CpuMemory(self, rows, steps, prefixes, prefix_steps)

    def bytes_of(self, steps: int) -> int:
        shape = self.shape
        dim = shape.hidden // shape.heads
        of_a_step = 2 * shape.layers * shape.heads * (dim + 2 if self.precision == "int8" else 4 * dim)
        return of_a_step * _whole_units(steps)

    def run(self, x: Samples, cache: Cache, slots: Indices, positions: Indices, prefixes: Prefixes) -> None:
        """Entries through all layers, in place: x (entries, hidden), slots and positions (entries,)."""
        shape, arrays, entries = self.shape, self.stack.arrays, len(x)
        group, wide_group = self.stack.group(shape.hidden), self.stack.group(shape.wide)
        room = (
            np.empty(entries * max(shape.hidden, shape.wide), np.int32),
            np.empty((entries, 2 * (shape.hidden // group)), np.float32),
            np.empty((entries, 2 * (shape.wide // wide_group)), np.float32),
            np.empty((entries, 3 * shape.hidden), np.float32),
            np.empty((entries, shape.hidden), np.float32),
            np.empty((entries, shape.wide), np.float32),
            NO_NORM,
            self._desks(entries, shape.hidden // shape.heads),
        )
        self._share(
            kernels.run_layers,
            np.zeros(2 * kernels.PHASES_PER_LAYER * shape.layers, np.int64),
            x,
            shape.heads,
            tuple(arrays[name] for matrix in MATRICES for name in (matrix, f"{matrix}_scales")),
            tuple(arrays[name] for name in NORMS),
            (group, wide_group),
            cache.arrays,
            cache.places(slots),
            prefixes.cache.arrays,
            prefixes.cache.places(prefixes.slots),
            positions,
            prefixes.lengths,
            amx(),
            room,
        )

    def logits(self, x: Samples) -> Samples:
        """The last normalization and the output matrix: (rows, hidden) to (rows, codebooks, vocabulary)."""
        rows, hidden = x.shape
        out = np.empty((rows, self.shape.codebooks * self.shape.vocabulary), np.float32)
        self._share(
            kernels.run_product,
            np.zeros(4, np.int64),
            self.heads,
            NO_SCALES,
            x,
            self.ends.norm,
            self.stack.group(hidden),
            np.empty(rows * hidden, np.int32),
            np.empty((rows, 2), np.float32),
            out,
            kernels.STORE,
            amx(),
            self._desks(rows, kernels.LANES),
        )
        return out.reshape(rows, self.shape.codebooks, self.shape.vocabulary)

    def _share(self, kernel: Any, *arguments: Any) -> None:
        """Run a kernel in all threads: those that come late find nothing left to do.

        The first time it runs in this thread alone, as it may have to be compiled, which takes a large stack.
        """

        def take_part(thread: int) -> None:
            kernel(thread, *arguments)

        threads = self.threads if kernel in self._compiled else 1
        others = [_helpers().submit(take_part, thread) for thread in range(1, threads)]
        take_part(0)
        for other in others:
            if not other.cancel():  # it has begun: it finds nothing left to do
                other.result()
        self._compiled.add(kernel)

    def _desks(self, entries: int, dim: int) -> Samples:
        return aligned((self.threads, kernels.desk_size(entries, dim)), np.float32)


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    """The threads beside the one that calls; they sleep when there is nothing to do."""
    return ThreadPoolExecutor(max(1, cores() - 1), thread_name_prefix="musicgen")


@functools.cache
def amx() -> NDArray[np.uint8]:
    """`kernels.AMX`, once the system has allowed this process its use, or an empty array."""
    if kernels.AMX.size and sys.platform == "linux":
        call = ctypes.CDLL(None, use_errno=True).syscall
        if call(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
            return kernels.AMX
    return np.empty(0, np.uint8)


def _whole_units(steps: int) -> int:
    return -(-steps // STEPS_UNIT) * STEPS_UNIT


class Cache:
    """Keys and values of a number of slots, as the kernels want them."""

    def __init__(self, decoder: CpuDecoder, slots: int, steps: int) -> None:
        shape, steps = decoder.shape, _whole_units(steps)
        quantized = decoder.precision == "int8"
        self.layers, self.heads = shape.layers, shape.heads
        places, dim = slots * shape.layers * shape.heads, shape.hidden // shape.heads
        kind = np.int8 if quantized else np.float32
        self._numbers = [Pages(places * steps * dim * np.dtype(kind).itemsize) for _ in range(2)]
        self._scales = [Pages(places * steps * 2 if quantized else 0) for _ in range(2)]
        keys, values = (pages.array(kind).reshape(places, steps * dim) for pages in self._numbers)
        key_scales, value_scales = (
            pages.array(np.uint16).reshape(places, steps if quantized else 0) for pages in self._scales
        )
        self.arrays = (keys, key_scales, values, value_scales)
        self.slots = slots

    def places(self, slots: Indices) -> Indices:
        """Where the first head of these slots is, in each layer: (layers, slots).

        A slot's places stand together, so that one that isn't used takes no memory.
        """
        layers = np.arange(self.layers, dtype=np.int64)[:, None]
        return np.asarray((slots * self.layers + layers) * self.heads)

    def release(self, slot: int) -> None:
        """Give a slot's memory back; it can be used again."""
        for pages in (*self._numbers, *self._scales):
            size = pages.n_bytes // self.slots
            pages.release(slot * size, (slot + 1) * size)


class Pages:
    """Memory that is the system's until it is written to."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._memory = mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system that has none
                self._memory.madvise(mmap.MADV_HUGEPAGE)

    def array(self, kind: type) -> NDArray[Any]:
        return np.frombuffer(self._memory, np.uint8, self.n_bytes).view(kind)

    def release(self, first: int, last: int) -> None:
        """Bytes `first` to `last`, as far as they are whole pages."""
        first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Which prefix each entry has."""

    cache: Cache
    slots: Indices  # (entries,)
    lengths: Indices  # (entries,): 0 for none


class CpuMemory:
    """See `Memory`."""

    def __init__(self, decoder: CpuDecoder, rows: int, steps: int, prefixes: int, prefix_steps: int) -> None:
        self.decoder = decoder
        self.rows, self.prefixes = Cache(decoder, rows, steps), Cache(decoder, prefixes, prefix_steps)
        self.lengths = np.zeros(prefixes, np.int64)

    def prefill(self, prefix: int, inputs: Samples) -> None:
        positions = np.arange(len(inputs), dtype=np.int64)
        x = inputs + self.decoder.ends.positions[positions]
        nothing = np.zeros_like(positions)
        self._run(x, self.prefixes, np.full_like(positions, prefix), positions, self._without_prefix(nothing))
        self.lengths[prefix] = len(inputs)

    def advance(self, feeds: Sequence[Feed]) -> Samples:
        ends, counts = self.decoder.ends, [len(feed.tokens) for feed in feeds]
        slots = np.repeat(np.array([feed.slot for feed in feeds], np.int64), counts)
        prefixes = np.repeat(np.array([feed.prefix for feed in feeds], np.int64), counts)
        positions = np.concatenate([feed.position + np.arange(len(feed.tokens)) for feed in feeds])
        lengths = self.lengths[prefixes]
        x = (
            ends.embedded(np.concatenate([feed.tokens for feed in feeds]))
            + ends.positions[lengths + positions]
        )
        self._run(x, self.rows, slots, positions, Prefixes(self.prefixes, prefixes, lengths))
        return self.decoder.logits(x[np.cumsum(counts) - 1])

    def release(self, slot: int) -> None:
        self.rows.release(slot)

    def run(self, x: Samples) -> None:
        """All positions of one sequence without a prefix, (steps, hidden), through the layers, in place."""
        positions = np.arange(len(x), dtype=np.int64)
        nothing = np.zeros_like(positions)
        self._run(x, self.rows, nothing, positions, self._without_prefix(nothing))

    def _without_prefix(self, nothing: Indices) -> Prefixes:
        return Prefixes(self.prefixes, nothing, nothing)

    def _run(self, x: Samples, cache: Cache, slots: Indices, positions: Indices, before: Prefixes) -> None:
        """Through the layers, in parts that keep the working arrays small."""
        for start in range(0, len(x), ENTRIES_AT_ONCE):
            part = slice(start, start + ENTRIES_AT_ONCE)
            its = Prefixes(before.cache, before.slots[part], before.lengths[part])
            self.decoder.run(x[part], cache, slots[part], positions[part], its)
