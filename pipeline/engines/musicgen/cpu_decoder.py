"""The decoder on a CPU: `kernels` over packed layers, in float32 or int8."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen import kernels
from pipeline.engines.musicgen.decoder import Ends
from pipeline.engines.musicgen.kv_cache import Cache, CpuMemory, Indices, Prefixes, whole_units
from pipeline.engines.musicgen.layers import MATRICES, NORMS, Stack, aligned
from pipeline.engines.musicgen.shm import Files, Sizes
from pipeline.records import Samples

WORTH_A_THREAD = 1 << 22  # weights: with fewer, waking threads takes longer than they save
NO_NORM: Samples = np.empty((0, 0), np.float32)
NO_SCALES: Samples = np.empty(0, np.float32)

# Linux, x86-64 (arch/x86/include/uapi/asm/prctl.h): a process asks for AMX's registers before it uses them.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


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

    def memory(
        self, rows: int, steps: int, prefixes: int, prefix_steps: int, files: Files | None = None
    ) -> CpuMemory:
        """See `Decoder.memory`; a row or prefix that isn't used takes no room."""
        return CpuMemory(self, Sizes(rows, steps, prefixes, prefix_steps), files)

    def bytes_of(self, steps: int) -> int:
        shape = self.shape
        dim = shape.hidden // shape.heads
        of_a_step = 2 * shape.layers * shape.heads * (dim + 2 if self.precision == "int8" else 4 * dim)
        return of_a_step * whole_units(steps)

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
            self._scratch(entries, shape.hidden // shape.heads),
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
            self._scratch(rows, kernels.LANES),
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

    def _scratch(self, entries: int, dim: int) -> Samples:
        return aligned((self.threads, kernels.scratch_size(entries, dim)), np.float32)


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
