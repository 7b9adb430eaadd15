"""The decoder on a CPU: the compiled `kernels` over packed layers, in float32 or int8."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen import kernels
from pipeline.engines.musicgen.decoder import (
    UNKNOWN,
    Continuation,
    EmbeddingAndHead,
    StepInput,
    Tokens,
)
from pipeline.engines.musicgen.kv_cache import CpuKVCache, Indices, Slots, slot_bytes
from pipeline.engines.musicgen.layers import MATRICES, Stack
from pipeline.errors import EngineFailure
from pipeline.records import Samples

KNOWN_ENTRIES = 128  # of known steps in one pass, which takes half a second of the published model
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

    most_rows = 16  # eight variations with guidance; beyond that, time grows with the rows
    prefixes_at_once = 1
    steps_at_once = KNOWN_ENTRIES

    def __init__(self, stack: Stack, ends: EmbeddingAndHead, threads: int | None = None) -> None:
        """`threads` None: all cores."""
        self.stack = stack
        self.ends = replace(ends, heads=NO_NORM)  # in the kernels' layout they are `heads`
        self.shape, self.precision = stack.shape, str(stack.precision)
        self.heads = kernels.pack_columns(ends.heads)
        few = sum(array.size for array in stack.arrays.values()) < WORTH_A_THREAD
        self.threads = 1 if few else min(threads or cores(), cores())
        self._compiled: set[Any] = set()  # kernels

    def new_cache(self, rows: int, steps: int, prefixes: int, prefix_steps: int) -> CpuKVCache:
        """See `Decoder.new_cache`; a row or prefix that is not used takes no memory."""
        is_int8 = self.precision == "int8"
        return CpuKVCache(self.shape, rows, steps, prefixes, prefix_steps, is_int8=is_int8)

    def cache_bytes(self, steps: int) -> int:
        return slot_bytes(self.shape, steps, is_int8=self.precision == "int8")

    def prefill(self, cache: CpuKVCache, prefixes: Mapping[int, Samples]) -> None:
        for prefix, inputs in prefixes.items():
            x = inputs + self.ends.positions[: len(inputs)]
            self._run(x, cache.prefixes, Entries.without_prefix(prefix, len(x)), cache.prefixes)
            cache.prefix_lengths[prefix] = len(x)

    def generate(
        self, cache: CpuKVCache, continuations: Sequence[Continuation]
    ) -> list[Tokens | EngineFailure]:
        """See `Decoder.generate`: one step of each, or several at once as long as their inputs are known."""
        most = max(1, KNOWN_ENTRIES // sum(len(one.slots) for one in continuations))
        steps = [min(most, known_steps(one.inputs)) for one in continuations]
        inputs = [row for one, n in zip(continuations, steps, strict=True) for row in one.of_rows(n)]
        inputs.sort(key=lambda row: row.prefix)  # neighbours share what the processor's caches hold
        logits = self.advance(cache, inputs)
        by_slot = {row.slot: logits[index].astype(np.float64) for index, row in enumerate(inputs)}
        picked: list[Tokens | EngineFailure] = []
        for one, n in zip(continuations, steps, strict=True):
            tokens = np.full((n, self.shape.codebooks), UNKNOWN)
            try:
                tokens[-1] = one.sampler.pick(one.first_step + n - 1, *(by_slot[slot] for slot in one.slots))
            except EngineFailure as error:
                picked.append(error)
            else:
                picked.append(tokens)
        return picked

    def advance(self, cache: CpuKVCache, step_inputs: Sequence[StepInput]) -> Samples:
        """See `Decoder.advance`. Of several steps of a row it returns the logits of the last."""
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
        arguments = (
            x,
            self._layers,
            own.attended(part.slots, part.positions + 1),
            prefixes.attended(part.prefixes, part.prefix_lengths),
            kernels.LayerBuffers.empty(self._layers, len(x)),
            amx(),
        )
        scratch = [
            (kernels.ProductScratch.empty(len(x)), kernels.AttentionScratch.empty(self.shape.head_size))
            for _ in range(self.threads)
        ]
        self._share(kernels.run_layers, arguments, scratch)

    def logits(self, x: Samples) -> Samples:
        """The last normalization and the LM heads: (rows, hidden) to (rows, codebooks, vocabulary)."""
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

    def _share(self, kernel: Any, arguments: tuple[Any, ...], scratch: Sequence[Any]) -> None:
        """Run a kernel in all threads, each with scratch of its own; one that starts late has nothing to do.

        The first time it runs in this thread alone, as compiling it may need a large stack.
        """

        def take_part(thread: int) -> None:
            kernel(*arguments, scratch[thread])

        threads = self.threads if kernel in self._compiled else 1
        others = [_helpers().submit(take_part, thread) for thread in range(1, threads)]
        take_part(0)
        for other in others:
            if not other.cancel():  # it has begun, and ends soon
                other.result()
        self._compiled.add(kernel)

    @cached_property
    def _layers(self) -> kernels.Layers:
        shape, arrays = self.shape, self.stack.arrays
        no_norms = np.empty((shape.layers, 0, 0), np.float32)
        hidden, wide = self.stack.group(shape.hidden), self.stack.group(shape.feed_forward)
        return kernels.Layers(
            weights=tuple(arrays[name] for name in MATRICES),
            scales=tuple(arrays[f"{name}_scales"] for name in MATRICES),
            norms=(arrays["attention_norm"], no_norms, arrays["feed_forward_norm"], no_norms),
            groups=(hidden, hidden, hidden, wide),
        )


def known_steps(inputs: Tokens) -> int:
    """How many of the first of these steps, (steps, codebooks), are known."""
    unknown = (inputs == UNKNOWN).any(axis=1)
    return int(unknown.argmax()) if unknown.any() else len(inputs)


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
