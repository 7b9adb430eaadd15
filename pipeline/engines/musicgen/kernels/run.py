"""The two functions that the decoder calls, in all threads at once: the layers, and a single product.

Only these two are in numba's cache on disk, each with all the code that it calls. numba compiles a cached
function again when its own file changes, or a value in its closure. So both close over a digest of all files
of this package, and return it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from pipeline.engines.musicgen.kernels import attention, products
from pipeline.engines.musicgen.kernels.attention import Attended
from pipeline.engines.musicgen.kernels.intrinsics import borrowed
from pipeline.engines.musicgen.kernels.phases import COUNTERS
from pipeline.engines.musicgen.kernels.processor import FLOATS, LANES
from pipeline.engines.musicgen.kernels.products import ADD, GELU, STORE, PackedRows, Product

_MODES = (STORE, ADD, GELU, ADD)  # by matrix, see `Layers`
_PHASES = 2  # of a product, and of attention
_PHASES_PER_LAYER = _PHASES * (len(_MODES) + 1)
_QKV, _DOWN = 0, 3


class Layers(NamedTuple):
    """All layers. Tuples have an item per matrix: qkv, output, and the two of the feed-forward block."""

    weights: tuple[Any, ...]  # (layers, outputs / 16, inputs * 16), see `pack_columns`
    scales: tuple[Any, ...]  # float32 (layers, outputs), of int8 weights
    norms: tuple[Any, ...]  # float32 (layers, 2, inputs), of the matrix's inputs; (layers, 0, 0): none
    groups: tuple[int, ...]  # inputs that share a scale of the activations


class LayerBuffers(NamedTuple):
    """Scratch buffers that all threads share."""

    counters: Any  # int64 zeros, see `phases`
    packed: PackedRows  # of hidden inputs
    packed_wide: PackedRows  # of the feed-forward's inputs
    qkv: Any  # float32 (entries, 3 * hidden)
    attended: Any  # float32 (entries, hidden)
    inner: Any  # float32 (entries, feed-forward)

    @classmethod
    def empty(cls, layers: Layers, entries: int) -> LayerBuffers:
        n_layers, _, hidden = layers.norms[0].shape
        wide = layers.weights[_DOWN].shape[-1] // LANES
        return cls(
            np.zeros(COUNTERS * _PHASES_PER_LAYER * n_layers, np.int64),
            PackedRows.empty(entries, hidden, layers.groups[0]),
            PackedRows.empty(entries, wide, layers.groups[_DOWN]),
            np.empty((entries, 3 * hidden), np.float32),
            np.empty((entries, hidden), np.float32),
            np.empty((entries, wide), np.float32),
        )


def product_counters() -> np.ndarray:
    """`counters` of `run_product`."""
    return np.zeros(COUNTERS * _PHASES, np.int64)


def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _compiled(sources: str) -> tuple[Callable[..., str], Callable[..., str]]:
    @njit(nogil=True, cache=True, **FLOATS)
    def run_layers(x, layers, own, prefix, buffers, amx, scratch):
        """Run entries through all layers, in place, and add their keys and values to the cache.

        An entry is one position of one row. Entries of one row must stand in order, after all earlier
        positions were run. Each thread calls this with scratch of its own and otherwise the same
        arguments, and returns when all is done.

        Args:
            x: float32 (entries, hidden): the inputs, then the outputs of the last layer.
            layers: see `Layers`.
            own: the steps of the entry's own row, up to the entry itself, see `Attended`.
            prefix: the steps of its prefix; lengths are 0 for entries without one.
            buffers: see `LayerBuffers`.
            amx: `AMX` if this process may use it, otherwise an empty array.
            scratch: a `ProductScratch` and an `AttentionScratch`.
        """
        x, layers, own, prefix = borrowed(x), borrowed(layers), borrowed(own), borrowed(prefix)
        buffers, amx = borrowed(buffers), borrowed(amx)
        product_scratch, attention_scratch = borrowed(scratch)
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
                phase = products.run(buffers.counters, phase, product, packed[matrix], amx, product_scratch)
                if matrix == _QKV:
                    own_n = Attended(own.cache, own.heads[n], own.lengths)
                    prefix_n = Attended(prefix.cache, prefix.heads[n], prefix.lengths)
                    qkv, out = buffers.qkv, buffers.attended
                    phase = attention.run(
                        buffers.counters, phase, qkv, own_n, prefix_n, out, attention_scratch
                    )
        return sources

    @njit(nogil=True, cache=True, **FLOATS)
    def run_product(counters, product, packed, amx, scratch):
        """One product; see `product_counters`, `Product`, `PackedRows`, `ProductScratch`, `run_layers`."""
        counters, product, packed = borrowed(counters), borrowed(product), borrowed(packed)
        products.run(counters, np.int64(0), product, packed, borrowed(amx), borrowed(scratch))
        return sources

    return run_layers, run_product


run_layers, run_product = _compiled(_sources())
