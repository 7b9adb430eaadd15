"""The two functions that the decoder calls, in all threads at once: the layers, and a single product.

Only these two are in numba's cache on disk, with all that they call. Its key knows changes of this file
alone, and the values that a function closes over; so both close over a digest of the package's files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from pipeline.engines.musicgen.kernels import attention, products
from pipeline.engines.musicgen.kernels.attention import (
    Attended,
    AttentionScratch,
    attention_scratch_of,
)
from pipeline.engines.musicgen.kernels.intrinsics import borrowed
from pipeline.engines.musicgen.kernels.phases import COUNTERS
from pipeline.engines.musicgen.kernels.processor import LANES, OPTIONS
from pipeline.engines.musicgen.kernels.products import (
    ADD,
    GELU,
    STORE,
    PackedRows,
    Product,
    ProductScratch,
    product_scratch_of,
)

_PHASES_PER_PRODUCT, _PHASES_PER_LAYER = 2, 10
_MODES = (STORE, ADD, GELU, ADD)  # by matrix, see `Layers`
_QKV, _DOWN = 0, 3


class Layers(NamedTuple):
    """All layers. Tuples are by matrix: queries with keys and values, output, and the feed-forward's two."""

    weights: tuple[Any, ...]  # (layers, outputs / 16, inputs * 16), see `pack_columns`
    scales: tuple[Any, ...]  # float32 (layers, outputs), of int8 weights
    norms: tuple[Any, ...]  # float32 (layers, 2, inputs), of the matrix's inputs; (layers, 0, 0): none
    groups: tuple[int, ...]  # inputs that share a scale of the activations


class LayerBuffers(NamedTuple):
    """Scratch buffers: shared by all threads, and of each thread."""

    packed: PackedRows  # of hidden inputs
    packed_wide: PackedRows  # of the feed-forward's inputs
    qkv: Any  # float32 (entries, 3 * hidden)
    attended: Any  # float32 (entries, hidden)
    inner: Any  # float32 (entries, feed-forward)
    products: ProductScratch
    attention: AttentionScratch

    @classmethod
    def empty(cls, layers: Layers, entries: int, heads: int, threads: int) -> LayerBuffers:
        hidden, wide = layers.norms[0].shape[-1], layers.weights[_DOWN].shape[-1] // LANES
        return cls(
            PackedRows.empty(entries, hidden, layers.groups[0]),
            PackedRows.empty(entries, wide, layers.groups[_DOWN]),
            np.empty((entries, 3 * hidden), np.float32),
            np.empty((entries, hidden), np.float32),
            np.empty((entries, wide), np.float32),
            ProductScratch.empty(threads, entries),
            AttentionScratch.empty(threads, hidden // heads),
        )


def layer_counters(layers: int) -> np.ndarray:
    """`counters` of `run_layers`."""
    return np.zeros(COUNTERS * _PHASES_PER_LAYER * layers, np.int64)


def product_counters() -> np.ndarray:
    """`counters` of `run_product`."""
    return np.zeros(COUNTERS * _PHASES_PER_PRODUCT, np.int64)


def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _compiled(sources: str) -> tuple[Callable[..., str], Callable[..., str]]:
    @njit(nogil=True, cache=True, **OPTIONS)
    def run_layers(thread, counters, x, layers, own, prefix, buffers, amx):
        """Run entries through all layers, in place, and add their keys and values to the cache.

        An entry is one position of one row. Entries of one row must stand in order, after all earlier
        positions were run. Each thread calls this with the same arrays, and returns when all is done.

        Args:
            thread: number of the calling thread.
            counters: see `layer_counters`.
            x: float32 (entries, hidden): the inputs, then the outputs of the last layer.
            layers: see `Layers`.
            own: the steps of the entry's own row, up to the entry itself, see `Attended`.
            prefix: the steps of its prefix; lengths are 0 for entries without one.
            buffers: see `LayerBuffers`.
            amx: `AMX` if this process may use it, otherwise an empty array.
        """
        counters, x, layers, amx = borrowed(counters), borrowed(x), borrowed(layers), borrowed(amx)
        own, prefix, buffers = borrowed(own), borrowed(prefix), borrowed(buffers)
        product_scratch = product_scratch_of(buffers.products, thread)
        attention_scratch = attention_scratch_of(buffers.attention, thread)
        inputs = (x, buffers.attended, x, buffers.inner)
        outputs = (buffers.qkv, x, buffers.inner, x)
        packed = (buffers.packed, buffers.packed, buffers.packed, buffers.packed_wide)
        phase = np.int64(0)
        for n in range(layers.weights[0].shape[0]):
            for matrix in range(4):  # one call in a loop takes a quarter of the time of four to compile
                product = Product(
                    layers.weights[matrix][n],
                    layers.scales[matrix][n],
                    layers.groups[matrix],
                    layers.norms[matrix][n],
                    inputs[matrix],
                    outputs[matrix],
                    _MODES[matrix],
                )
                phase = products.run(counters, phase, product, packed[matrix], amx, product_scratch)
                if matrix == _QKV:
                    own_of_layer = Attended(own.cache, own.heads[n], own.lengths)
                    prefix_of_layer = Attended(prefix.cache, prefix.heads[n], prefix.lengths)
                    phase = attention.run(
                        counters,
                        phase,
                        buffers.qkv,
                        own_of_layer,
                        prefix_of_layer,
                        buffers.attended,
                        attention_scratch,
                    )
        return sources

    @njit(nogil=True, cache=True, **OPTIONS)
    def run_product(thread, counters, product, packed, scratch, amx):
        """One product; see `Product`, `PackedRows`, `ProductScratch`, and `run_layers` for the rest."""
        mine = product_scratch_of(borrowed(scratch), thread)
        amx, product, packed = borrowed(amx), borrowed(product), borrowed(packed)
        products.run(borrowed(counters), np.int64(0), product, packed, amx, mine)
        return sources

    return run_layers, run_product


run_layers, run_product = _compiled(_sources())
