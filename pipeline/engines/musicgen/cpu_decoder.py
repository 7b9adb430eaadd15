"""The decoder on a CPU: the compiled `kernels` over packed layers, in float32 or int8."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen import kernels
from pipeline.engines.musicgen.decoder import EmbeddingAndHead, StepInput
from pipeline.engines.musicgen.kv_cache import CpuKVCache, Indices, Slots, SlotShape
from pipeline.engines.musicgen.layers import MATRICES, NORMS, Stack, aligned
from pipeline.records import Samples

WORTH_A_THREAD = 1 << 22  # weights: with fewer, waking threads takes longer than they save
ENTRIES_AT_ONCE = 8 * kernels.ROW_BLOCK  # positions run together, which keeps the scratch buffers small
NO_NORM: Samples = np.empty((0, 0), np.float32)
NO_SCALES: Samples = np.empty(0, np.float32)

# A process on Linux has to ask for AMX's registers (arch/x86/include/uapi/asm/prctl.h).
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


@dataclass(frozen=True, eq=False)
class Entries:
    """Positions to be run through the layers, and where their keys and values go."""

    slots: Indices  # (entries,)
    positions: Indices  # (entries,), among the own steps of their row
    prefixes: Indices  # (entries,), slots of the prefixes
    prefix_lengths: Indices  # (entries,), 0 without a prefix

    @classmethod
    def without_prefix(cls, slot: int, steps: int) -> Entries:
        """All positions of one sequence."""
        zeros = np.zeros(steps, np.int64)
        return cls(zeros + slot, np.arange(steps, dtype=np.int64), zeros, zeros)

    def __getitem__(self, part: slice) -> Entries:
        return Entries(self.slots[part], self.positions[part], self.prefixes[part], self.prefix_lengths[part])


class CpuDecoder:
    """A stack of layers with its embedding and LM head."""

    def __init__(self, stack: Stack, ends: EmbeddingAndHead, threads: int | None = None) -> None:
        """`threads` None: all cores."""
        self.stack = stack
        self.ends = replace(ends, heads=NO_NORM)  # in the kernels' layout they are `heads`
        self.shape, self.precision = stack.shape, str(stack.precision)
        self.heads = kernels.pack_columns(ends.heads)
        few = sum(array.size for array in stack.arrays.values()) < WORTH_A_THREAD
        self.threads = 1 if few else min(threads or cores(), cores())
        self._compiled: set[Any] = set()  # kernels

    @property
    def _slot_shape(self) -> SlotShape:
        shape = self.shape
        return SlotShape(shape.layers, shape.heads, shape.head_size, self.precision == "int8")

    def new_cache(self, rows: int, steps: int, prefixes: int, prefix_steps: int) -> CpuKVCache:
        """See `Decoder.new_cache`; a row or prefix that is not used takes no memory."""
        return CpuKVCache(self._slot_shape, rows, steps, prefixes, prefix_steps)

    def cache_bytes(self, steps: int) -> int:
        return self._slot_shape.n_bytes(steps)

    def prefill(self, cache: CpuKVCache, prefix: int, inputs: Samples) -> None:
        x = inputs + self.ends.positions[: len(inputs)]
        self._run(x, cache.prefixes, Entries.without_prefix(prefix, len(x)), cache.prefixes)
        cache.prefix_lengths[prefix] = len(x)

    def advance(self, cache: CpuKVCache, step_inputs: Sequence[StepInput]) -> Samples:
        counts = [len(one.tokens) for one in step_inputs]
        prefixes = np.repeat(np.array([one.prefix for one in step_inputs], np.int64), counts)
        entries = Entries(
            slots=np.repeat(np.array([one.slot for one in step_inputs], np.int64), counts),
            positions=np.concatenate([one.position + np.arange(len(one.tokens)) for one in step_inputs]),
            prefixes=prefixes,
            prefix_lengths=cache.prefix_lengths[prefixes],
        )
        tokens = np.concatenate([one.tokens for one in step_inputs])
        x = self.ends.embed(tokens) + self.ends.positions[entries.prefix_lengths + entries.positions]
        self._run(x, cache.rows, entries, cache.prefixes)
        return self.logits(x[np.cumsum(counts) - 1])

    def run(self, x: Samples) -> None:
        """All positions of one sequence without a prefix, (steps, hidden), through the layers, in place."""
        cache = self.new_cache(1, len(x), 1, 1)
        self._run(x, cache.rows, Entries.without_prefix(0, len(x)), cache.prefixes)

    def _run(self, x: Samples, own: Slots, entries: Entries, prefixes: Slots) -> None:
        for start in range(0, len(x), ENTRIES_AT_ONCE):
            part = slice(start, start + ENTRIES_AT_ONCE)
            self._run_part(x[part], own, entries[part], prefixes)

    def _run_part(self, x: Samples, own: Slots, part: Entries, prefixes: Slots) -> None:
        """Entries through all layers, in place: x (entries, hidden)."""
        shape, arrays, entries = self.shape, self.stack.arrays, len(x)
        group, wide_group = self.stack.group(shape.hidden), self.stack.group(shape.feed_forward)
        scratch = (
            np.empty(entries * max(shape.hidden, shape.feed_forward), np.int32),
            np.empty((entries, 2 * (shape.hidden // group)), np.float32),
            np.empty((entries, 2 * (shape.feed_forward // wide_group)), np.float32),
            np.empty((entries, 3 * shape.hidden), np.float32),
            np.empty((entries, shape.hidden), np.float32),
            np.empty((entries, shape.feed_forward), np.float32),
            NO_NORM,
            self._thread_scratch(entries, shape.head_size),
        )
        self._share(
            kernels.run_layers,
            np.zeros(2 * kernels.PHASES_PER_LAYER * shape.layers, np.int64),
            x,
            shape.heads,
            tuple(arrays[name] for matrix in MATRICES for name in (matrix, f"{matrix}_scales")),
            tuple(arrays[name] for name in NORMS),
            (group, wide_group),
            own.arrays,
            own.first_heads(part.slots),
            prefixes.arrays,
            prefixes.first_heads(part.prefixes),
            part.positions,
            part.prefix_lengths,
            amx(),
            scratch,
        )

    def logits(self, x: Samples) -> Samples:
        """The last normalization and the LM heads: (rows, hidden) to (rows, codebooks, vocabulary)."""
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
            self._thread_scratch(rows, kernels.LANES),
        )
        return out.reshape(rows, self.shape.codebooks, self.shape.vocabulary)

    def _share(self, kernel: Any, *arguments: Any) -> None:
        """Run a kernel in all threads; a thread that starts late finds nothing left to do.

        The first time it runs in this thread alone, as compiling it may need a large stack.
        """

        def take_part(thread: int) -> None:
            kernel(thread, *arguments)

        threads = self.threads if kernel in self._compiled else 1
        others = [_helpers().submit(take_part, thread) for thread in range(1, threads)]
        take_part(0)
        for other in others:
            if not other.cancel():  # it has begun, and ends soon
                other.result()
        self._compiled.add(kernel)

    def _thread_scratch(self, entries: int, dim: int) -> Samples:
        return aligned((self.threads, kernels.scratch_size(entries, dim)), np.float32)


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    """The threads beside the calling one; they sleep while there is nothing to do."""
    return ThreadPoolExecutor(max(1, cores() - 1), thread_name_prefix="musicgen")


@functools.cache
def amx() -> NDArray[np.uint8]:
    """`kernels.AMX` if the system allows this process to use AMX, otherwise an empty array."""
    if kernels.AMX.size and sys.platform == "linux":
        call = ctypes.CDLL(None, use_errno=True).syscall
        if call(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
            return kernels.AMX
    return np.empty(0, np.uint8)
