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
from pipeline.engines.musicgen.layers import MATRICES, Stack
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
        layers, head_size = self._layers, self.shape.hidden // self.shape.heads
        before = prefixes.cache.places(prefixes.slots)
        arguments = (
            x,
            layers,
            kernels.Attended(kernels.KeysValues(*cache.arrays), cache.places(slots), positions + 1),
            kernels.Attended(kernels.KeysValues(*prefixes.cache.arrays), before, prefixes.lengths),
            kernels.LayerBuffers.empty(layers, len(x)),
            amx(),
        )
        scratch = [
            (kernels.ProductScratch.empty(len(x)), kernels.AttentionScratch.empty(head_size))
            for _ in range(self.threads)
        ]
        self._share(kernels.run_layers, arguments, scratch)

    def logits(self, x: Samples) -> Samples:
        """The last normalization and the output matrix: (rows, hidden) to (rows, codebooks, vocabulary)."""
        rows, hidden = x.shape
        out = np.empty((rows, self.shape.codebooks * self.shape.vocabulary), np.float32)
        group = self.stack.group(hidden)
        arguments = (
            kernels.product_counters(),
            kernels.Product(self.heads, NO_SCALES, group, self.ends.norm, x, out, kernels.STORE),
            kernels.PackedRows.empty(rows, hidden, group),
            amx(),
        )
        scratch = [kernels.ProductScratch.empty(rows) for _ in range(self.threads)]
        self._share(kernels.run_product, arguments, scratch)
        return out.reshape(rows, self.shape.codebooks, self.shape.vocabulary)

    def _share(self, kernel: Any, arguments: tuple[Any, ...], scratch: list[Any]) -> None:
        """Run a kernel in all threads, each with its own scratch buffers.

        A thread that starts late finds nothing left to do.

        The first time it runs in this thread alone, as it may have to be compiled, which takes a large stack.
        """

        def take_part(thread: int) -> None:
            kernel(*arguments, scratch[thread])

        threads = self.threads if kernel in self._compiled else 1
        others = [_helpers().submit(take_part, thread) for thread in range(1, threads)]
        take_part(0)
        for other in others:
            if not other.cancel():  # it has begun: it finds nothing left to do
                other.result()
        self._compiled.add(kernel)

    @property
    def _layers(self) -> kernels.Layers:
        shape, arrays = self.shape, self.stack.arrays
        none = np.empty((shape.layers, 0, 0), np.float32)
        hidden, wide = self.stack.group(shape.hidden), self.stack.group(shape.wide)
        return kernels.Layers(
            weights=tuple(arrays[name] for name in MATRICES),
            scales=tuple(arrays[f"{name}_scales"] for name in MATRICES),
            norms=(arrays["attention_norm"], none, arrays["feed_forward_norm"], none),
            groups=(hidden, hidden, hidden, wide),
        )


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
