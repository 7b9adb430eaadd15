"""Matrix products: activations are packed and multiplied by blocks of columns."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from pipeline.engines.musicgen.kernels.amx import (
    AMX_LEAST_ROWS,
    AMX_SUMS,
    AMX_UNIT,
    amx_tile,
    begin_amx,
    end_amx,
)
from pipeline.engines.musicgen.kernels.arithmetic import at, quantize, statistics
from pipeline.engines.musicgen.kernels.functions import apply_gelu
from pipeline.engines.musicgen.kernels.intrinsics import address_of, fma
from pipeline.engines.musicgen.kernels.packing import aligned
from pipeline.engines.musicgen.kernels.phases import tasks
from pipeline.engines.musicgen.kernels.processor import (
    LANES,
    OPTIONS,
    QUAD_WORDS,
    ROW_BLOCK,
    TILE_BLOCKS,
    TILE_ROWS,
    TILES_OF,
)
from pipeline.engines.musicgen.kernels.tile import Activations, Ahead, Columns, Sums, multiply

STORE, ADD, GELU = 0, 1, 2  # what happens to the sums of a product
LARGEST_GROUP = 128  # inputs that share a scale of the activations, at most

_BLOCKS_PER_TASK = 8  # of 16 outputs
_CHUNK_BYTES = 8192  # of weights of 16 outputs; with as many of activations they fit the first cache
_LARGEST_INT8 = np.float32(127)


class Product(NamedTuple):
    """out = x @ weights.T, or added to `out`, or GELU of it."""

    weights: Any  # (outputs / 16, inputs * 16), see `pack_columns`
    scales: Any  # float32 (outputs,), of int8 weights
    group: int  # inputs that share a scale of the activations
    norm: Any  # float32 (2, inputs): weight and bias of a layer normalization of x; empty: none
    x: Any  # float32 (rows, inputs)
    out: Any  # float32 (rows, outputs)
    mode: int  # STORE, ADD or GELU


class PackedRows(NamedTuple):
    """Activations in the layout of the micro-kernel; all threads share it.

    For AMX the words are int8 (rows, inputs), otherwise blocks of `ROW_BLOCK` rows, each (units, rows).
    """

    words: Any  # int32 (rows * inputs,)
    scales: Any  # float32 (rows, 2 * groups), per group a scale and the int32 that its sum begins with

    @classmethod
    def empty(cls, rows: int, inputs: int, group: int) -> PackedRows:
        scales = np.empty((rows, 2 * (inputs // group)), np.float32)
        return cls(np.empty(rows * inputs, np.int32), scales)


class ProductScratch(NamedTuple):
    """Scratch buffers of one thread."""

    sums: Any  # float32 (`_BLOCKS_PER_TASK`, `ROW_BLOCK`, 16)
    amx_sums: Any  # float32 (`AMX_SUMS`,)
    numbers: Any  # float32 (128,): a group of inputs
    integers: Any  # int8 (128,): the same, quantized
    statistics: Any  # float32 (rows, 2): mean and factor of the layer normalization

    @classmethod
    def empty(cls, rows: int) -> ProductScratch:
        return cls(
            aligned((_BLOCKS_PER_TASK, ROW_BLOCK, LANES), np.float32),
            aligned((AMX_SUMS,), np.float32),
            aligned((LARGEST_GROUP,), np.float32),
            aligned((LARGEST_GROUP,), np.int8),
            aligned((rows, 2), np.float32),
        )


@njit(**OPTIONS)
def run(counters, phase, product, packed, amx, scratch):
    """Pack the activations, then multiply: two phases. Returns the number of the next phase."""
    rows, inputs = product.x.shape
    blocks = product.weights.shape[0]
    by_amx = amx.shape[0] > 0 and product.weights.itemsize == 1 and rows >= AMX_LEAST_ROWS
    by_amx = by_amx and product.group % AMX_UNIT == 0 and blocks % 2 == 0
    if product.norm.shape[0] > 0:  # in each thread, which is faster than another phase
        for row in range(rows):
            scratch.statistics[row, 0], scratch.statistics[row, 1] = statistics(product.x[row])
    row_blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
    for task, _ in tasks(counters, phase, row_blocks * (inputs // product.group)):
        _pack(product, packed, task, scratch, by_amx)
    if by_amx:
        begin_amx(address_of(amx))
    for task, following in tasks(counters, phase + 1, (blocks + _BLOCKS_PER_TASK - 1) // _BLOCKS_PER_TASK):
        first = task * _BLOCKS_PER_TASK
        then = min(following * _BLOCKS_PER_TASK, blocks)
        _multiply_blocks(product, packed, first, min(first + _BLOCKS_PER_TASK, blocks), then, scratch, by_amx)
    if by_amx:
        end_amx()
    return phase + 2


@njit(**OPTIONS)
def _pack(product, packed, task, scratch, by_amx):
    """Pack one group of inputs of a block of rows; `task` counts groups within blocks."""
    x, norm, group, numbers = product.x, product.norm, product.group, scratch.numbers
    inputs = x.shape[1]
    block, group_index = task // (inputs // group), task % (inputs // group)
    start, first_row = group_index * group, block * ROW_BLOCK
    rows = min(ROW_BLOCK, x.shape[0] - first_row)
    words, initial = packed.words, packed.scales.view(np.int32)
    floats, quads = words.view(np.float32), scratch.integers.view(np.int32)
    for r in range(rows):
        row = first_row + r
        if norm.shape[0] == 0:
            for k in range(group):
                numbers[at(k)] = x[at(row), at(start + k)]
        else:
            mean, factor = scratch.statistics[at(row), 0], scratch.statistics[at(row), 1]
            for k in range(group):
                normal = (x[at(row), at(start + k)] - mean) * factor
                numbers[at(k)] = fma(normal, norm[0, at(start + k)], norm[1, at(start + k)])
        if product.weights.itemsize != 1:
            first = first_row * inputs + start * rows + r
            for k in range(group):
                floats[at(first + k * rows)] = numbers[at(k)]
            continue
        scale, integers_sum = quantize(numbers, group, _LARGEST_INT8, scratch.integers)
        packed.scales[at(row), at(2 * group_index)] = scale
        initial[at(row), at(2 * group_index + 1)] = np.int32(-128) * integers_sum
        if by_amx or QUAD_WORDS == 1:
            first, step = (first_row * inputs + start * rows) // 4 + r, rows
            if by_amx:
                first, step = (row * inputs + start) // 4, 1
            for k in range(group // 4):
                words[at(first + k * step)] = quads[at(k)]
        else:
            first = (first_row * inputs + start * rows) // 2 + r
            _pack_pairs(scratch.integers, group, first, rows, words.view(np.int16))


@njit(**OPTIONS)
def _pack_pairs(integers, n, first, step, pairs):
    """Of each four int8 the first and third as a pair of int16, then the others, `step` pairs apart."""
    for k in range(n // 4):
        for which in range(4):
            pair = first + (2 * k + which % 2) * step
            pairs[at(2 * pair + which // 2)] = integers[at(4 * k + which)]


@njit(**OPTIONS)
def _multiply_blocks(product, packed, first, last, then, scratch, by_amx):
    """Blocks `first` to `last` of 16 outputs, for all rows."""
    rows = product.x.shape[0]
    for first_row in range(0, rows, ROW_BLOCK):
        count = min(ROW_BLOCK, rows - first_row)
        scratch.sums[: last - first] = 0
        if by_amx:
            _multiply_rows_by_amx(product, packed, first_row, count, first, last, scratch)
        else:
            _multiply_rows(product, packed, first_row, count, first, last, then, scratch.sums)


@njit(**OPTIONS)
def _multiply_rows(product, packed, first_row, count, first, last, then, sums):
    """With more rows than a tile has, inputs are taken in chunks whose activations stay in the cache."""
    weights, inputs = product.weights, product.x.shape[1]
    is_int8 = weights.itemsize == 1
    units = product.group // 4 if is_int8 else product.group
    unit_bytes = 4 * (QUAD_WORDS if is_int8 else 1)  # of one row
    groups, group_bytes = inputs // product.group, units * 4 * LANES
    block_bytes = groups * group_bytes
    chunk = groups if product.x.shape[0] <= TILE_ROWS[0] else max(1, _CHUNK_BYTES // group_bytes)
    words = address_of(packed.words) + first_row * groups * units * unit_bytes
    scale_step = packed.scales.shape[1] * 4
    scales = address_of(packed.scales) + first_row * scale_step
    unit_ahead = 4 * LANES // TILES_OF[count] if first_row == 0 else 0
    for group in range(0, groups, chunk):
        n_groups = min(chunk, groups - group)
        rows = Activations(
            words + group * units * unit_bytes * count, unit_bytes * count, scales + group * 8, scale_step
        )
        for n in range(first, last, TILE_BLOCKS):
            blocks = min(TILE_BLOCKS, last - n)
            start = address_of(weights) + n * block_bytes + group * group_bytes
            following = start  # what is read next: the next blocks, or the next chunk of the first ones
            if n + blocks < last:
                following = start + blocks * block_bytes
            elif group + chunk < groups:
                following = start - (n - first) * block_bytes + chunk * group_bytes
            elif then < weights.shape[0]:
                following = address_of(weights) + then * block_bytes
            columns = Columns(start, block_bytes, n_groups, units)
            out = Sums(address_of(sums) + (n - first) * ROW_BLOCK * LANES * 4, ROW_BLOCK * LANES * 4)
            multiply(weights, count, blocks, columns, rows, out, Ahead(following, block_bytes, unit_ahead))
            if group + chunk >= groups:
                _finish(sums, n - first, blocks, count, product, first_row, n)


@njit(**OPTIONS)
def _multiply_rows_by_amx(product, packed, first_row, count, first, last, scratch):
    """As `_multiply_rows`, two blocks at a time."""
    inputs, group, scale_step = product.x.shape[1], product.group, packed.scales.shape[1] * 4
    scales = address_of(packed.scales) + first_row * scale_step
    rows = Activations(address_of(packed.words) + first_row * inputs, inputs, scales, scale_step)
    block_bytes, sums_bytes, amx_sums = inputs * LANES, ROW_BLOCK * LANES * 4, address_of(scratch.amx_sums)
    for n in range(first, last, 2):
        start = address_of(product.weights) + n * block_bytes
        columns = Columns(start, block_bytes, inputs // group, group // AMX_UNIT)
        out = Sums(address_of(scratch.sums) + (n - first) * sums_bytes, sums_bytes)
        ahead = start + 2 * block_bytes if first_row == 0 and n + 2 < product.weights.shape[0] else 0
        amx_tile(count, columns, rows, out, amx_sums, ahead)
        _finish(scratch.sums, n - first, 2, count, product, first_row, n)


@njit(**OPTIONS)
def _finish(sums, first_sums, blocks, count, product, first_row, first_block):
    """Store or add the sums of `count` rows and `blocks` blocks of 16 outputs.

    This comes after each multiplication, as meanwhile the next weights are on their way.
    """
    out, scales, mode = product.out, product.scales, product.mode
    for block in range(blocks):
        here, first = sums[first_sums + block], (first_block + block) * LANES
        for r in range(count):
            if product.weights.itemsize == 1:
                for j in range(LANES):
                    here[at(r), at(j)] *= scales[at(first + j)]
            if mode == GELU:
                apply_gelu(address_of(here) + 4 * LANES * r)
            if mode == ADD:
                for j in range(LANES):
                    out[at(first_row + r), at(first + j)] += here[at(r), at(j)]
            else:
                for j in range(LANES):
                    out[at(first_row + r), at(first + j)] = here[at(r), at(j)]
