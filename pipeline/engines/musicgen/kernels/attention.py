"""Attention over cached keys and values, block by block.

The products are those of `tile`. For scores q k, 16 positions are the columns and the dimensions of the head
are the inputs; for sums of values, 16 dimensions are the columns and positions are the inputs. Keys and
values are stored in that layout, so that blocks of steps are read in one pass. The softmax is found in the
same pass (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"): with m the highest
score so far, an entry keeps S = sum exp(s_t - m) and V = sum exp(s_t - m) v_t. When a block raises m to m',
S and V are multiplied by exp(m - m') before the block's own terms are added. In the end V / S is the result.

int8 keys and values have a scale per position and head. A key's scale multiplies its score, a value's scale
its softmax weight, so products are of int8 with int16 queries and softmax weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from pipeline.engines.musicgen.kernels.arithmetic import (
    HALF,
    ONE,
    SMALLEST,
    ZERO,
    at,
    from_bfloat16,
    largest,
    quantize,
    to_bfloat16,
)
from pipeline.engines.musicgen.kernels.functions import exp
from pipeline.engines.musicgen.kernels.intrinsics import address_of, fma, prefetch
from pipeline.engines.musicgen.kernels.packing import aligned
from pipeline.engines.musicgen.kernels.phases import tasks
from pipeline.engines.musicgen.kernels.processor import HAS_AVX512, LANES, OPTIONS, TILE_BLOCKS, TILES_OF
from pipeline.engines.musicgen.kernels.softmax import round_to_int16, scale_scores, take_exponentials
from pipeline.engines.musicgen.kernels.tile import Activations, Ahead, Columns, Sums, multiply

_BLOCK = 128  # positions that are attended to at a time, and share a scale of their softmax weights
_TOGETHER = 16 if HAS_AVX512 else 12  # entries in a task, at most: those with the same keys read them once
_FEW = 8  # entries in a task if there are few, so that all threads get some
_LARGEST_INT8, _LARGEST_INT16 = np.float32(127), np.float32(32767)

# Columns of the state of an entry: the highest score so far, the sum of softmax weights, and the scales of
# the int16 query and of the int16 softmax weights.
_TOP, _SUM, _QUERY_SCALE, _WEIGHT_SCALE = 0, 1, 2, 3
_STATE_BYTES = 4 * 4


class KeysValues(NamedTuple):
    """Keys and values by head; the first axis counts the heads of all slots and layers."""

    keys: Any  # int8 or float32 (heads, steps * dim), steps a multiple of 128
    key_scales: Any  # bfloat16 bits in uint16 (heads, steps); (heads, 0) for float32
    values: Any
    value_scales: Any


class Attended(NamedTuple):
    """The steps that entries attend to: their row's own, or those of its prefix."""

    cache: KeysValues
    heads: Any  # int64 (layers, entries) or of one layer (entries,): index of an entry's first head
    lengths: Any  # int64 (entries,): how many steps an entry sees; ascending where heads are the same


class Block(NamedTuple):
    """Steps of one head that are attended to at a time."""

    head: int
    start: int  # a multiple of 128
    steps: int  # 128 at most


class AttentionScratch(NamedTuple):
    """Scratch buffers of one thread."""

    state: Any  # float32 (entries, 4), see `_TOP`; entries: `_TOGETHER`
    queries: Any  # int32 (dim * entries,): float32, or pairs of int16, (units, entries)
    scores: Any  # float32 (128 * entries,)
    words: Any  # int32 (128 * entries,): softmax weights as activations, (units, entries)
    mixed: Any  # float32 (dim / 16, entries, 16): weighted sums of values so far
    numbers: Any  # float32, (128,) or a head's dimensions if these are more
    integers: Any  # int16: the same, quantized

    @classmethod
    def empty(cls, dim: int) -> AttentionScratch:
        longest = max(_BLOCK, dim)
        return cls(
            aligned((_TOGETHER, 4), np.float32),
            aligned((dim * _TOGETHER,), np.int32),
            aligned((_BLOCK * _TOGETHER,), np.float32),
            aligned((_BLOCK * _TOGETHER,), np.int32),
            aligned((dim // LANES, _TOGETHER, LANES), np.float32),
            aligned((longest,), np.float32),
            aligned((2 * longest,), np.int16),
        )


@njit(**OPTIONS)
def run(counters, phase, qkv, own, prefix, out, scratch):
    """Store keys and values, then attend: two phases. Returns the number of the next phase.

    `qkv` is float32 (entries, 3 * hidden), `out` (entries, hidden); `own` and `prefix` are of one layer.
    The last step that an entry sees of its own is the entry itself. If each is the only one of its row, no
    other sees what it stores: then one task does both, and what it stores is still in its caches.
    """
    entries, hidden = out.shape
    dim = scratch.mixed.shape[0] * LANES
    per_task = _TOGETHER if entries >= 4 * _TOGETHER else _FEW
    tasks_per_head = (entries + per_task - 1) // per_task
    count = tasks_per_head * (hidden // dim)
    is_single = np.all(own.heads[1:] != own.heads[:-1])  # those of one row are neighbours
    if not is_single:
        for task, _ in tasks(counters, phase, count):
            head, begin = task // tasks_per_head, task % tasks_per_head * per_task
            _store_entries(qkv, own, head, begin, min(begin + per_task, entries), dim)
    for task, following in tasks(counters, phase + 1, count):
        head, begin = task // tasks_per_head, task % tasks_per_head * per_task
        end = min(begin + per_task, entries)
        if is_single:
            _store_entries(qkv, own, head, begin, end, dim)
        then = following if following < count else task
        then_head, then_begin = then // tasks_per_head, then % tasks_per_head * per_task
        _attend(qkv, own, prefix, head, begin, end, own.heads[then_begin] + then_head, out, scratch)
    return phase + 2


@njit(**OPTIONS)
def _store_entries(qkv, own, head, begin, end, dim):
    """Write the keys and values of one head of entries `begin` to `end`."""
    hidden = qkv.shape[1] // 3
    for entry in range(begin, end):
        to, position, start = own.heads[entry] + head, own.lengths[entry] - 1, hidden + head * dim
        keys = qkv[entry, start : start + dim]
        values = qkv[entry, start + hidden : start + hidden + dim]
        _store(own.cache.keys, own.cache.key_scales, to, position, keys, True)
        _store(own.cache.values, own.cache.value_scales, to, position, values, False)


@njit(**OPTIONS)
def _store(numbers, scales, head, position, x, is_key):
    """Write the key or value of one head at a position, x (dim,), and its scale."""
    dim, is_int8 = x.shape[0], numbers.itemsize == 1
    inverse = ONE
    if is_int8:
        size = largest(x, dim)
        scale = to_bfloat16(size * (ONE / _LARGEST_INT8)) if size > SMALLEST else np.uint16(0)
        scales[at(head), at(position)] = scale
        inverse = ONE / from_bfloat16(scale) if scale > 0 else ZERO
    pair = 2 if is_int8 else 1
    if is_key:  # 16 positions are the columns, pairs of dimensions are the units
        first = position // LANES * dim * LANES + position % LANES * pair
        run_length, run_step, step = pair, pair * LANES, 1
    else:  # 16 dimensions are the columns, pairs of the 128 positions of a block are the units
        where = position % _BLOCK
        first = position // _BLOCK * dim * _BLOCK + where // pair * pair * LANES + where % pair
        run_length, run_step, step = LANES, _BLOCK * LANES, pair
    for begin in range(0, dim, run_length):
        to = first + begin // run_length * run_step
        for k in range(run_length):
            number = x[at(begin + k)]
            if is_int8:
                numbers[at(head), at(to + k * step)] = np.int8(np.floor(fma(number, inverse, HALF)))
            else:
                numbers[at(head), at(to + k * step)] = number


@njit(**OPTIONS)
def _prefetch_scales(cache, head, start):
    for scales in (cache.key_scales, cache.value_scales):
        if scales.shape[1] > 0:
            first = (head * scales.shape[1] + start) * scales.itemsize
            for offset in range(0, _BLOCK * scales.itemsize, 64):
                prefetch(address_of(scales) + first + offset)


@njit(**OPTIONS)
def _attend(qkv, own, prefix, head, begin, end, following, out, scratch):
    """One head of entries `begin` to `end`, `_TOGETHER` at most, over their own steps and their prefixes.

    This thread reads the own steps of the head `following` next.
    """
    rows, dim = end - begin, scratch.mixed.shape[0] * LANES
    mixed, state = scratch.mixed, scratch.state
    for r in range(rows):
        _pack_query(qkv[begin + r, head * dim : (head + 1) * dim], r, own.cache.keys.itemsize == 1, scratch)
        state[at(r), at(_TOP)], state[at(r), at(_SUM)] = -np.inf, ZERO
        for block in range(mixed.shape[0]):
            for k in range(LANES):
                mixed[at(block), at(r), at(k)] = ZERO
    if prefix.lengths[begin] > 0:
        _attend_to(own, head, begin, end, prefix.cache, prefix.heads[begin] + head, scratch)
    else:
        _attend_to(own, head, begin, end, own.cache, following, scratch)
    _attend_to(prefix, head, begin, end, own.cache, following, scratch)
    for r in range(rows):
        inverse = ONE / state[at(r), at(_SUM)]
        for block in range(mixed.shape[0]):
            for k in range(LANES):
                out[at(begin + r), at(head * dim + block * LANES + k)] = (
                    mixed[at(block), at(r), at(k)] * inverse
                )


@njit(**OPTIONS)
def _pack_query(x, r, is_int8, scratch):
    """Lay a query (dim,) out for `_score`, as row r."""
    dim = x.shape[0]
    for d in range(dim):
        scratch.numbers[at(d)] = x[at(d)]
    units, words = dim, scratch.numbers.view(np.int32)
    if is_int8:
        scale, _ = quantize(scratch.numbers, dim, _LARGEST_INT16, scratch.integers)
        scratch.state[at(r), at(_QUERY_SCALE)] = scale
        units, words = dim // 2, scratch.integers.view(np.int32)
    for k in range(units):
        scratch.queries[at(k * _TOGETHER + r)] = words[at(k)]


@njit(**OPTIONS)
def _attend_to(attended, head, begin, end, next_cache, next_head, scratch):
    """Entries `begin` to `end` over one kind of steps; neighbours that see the same head go together."""
    first = begin
    while first < end:
        last = first + 1
        while last < end and attended.heads[last] == attended.heads[first]:
            last += 1
        if last < end:
            following = attended.heads[last] + head
            _attend_together(attended, head, first, last, begin, attended.cache, following, scratch)
        else:
            _attend_together(attended, head, first, last, begin, next_cache, next_head, scratch)
        first = last


@njit(**OPTIONS)
def _attend_together(attended, head, first, last, begin, next_cache, next_head, scratch):
    """Entries `first` to `last`, which see steps of the same head; their rows are counted from `begin`.

    `next_cache` and `next_head` are read after this.
    """
    cache, index, row, rows = attended.cache, attended.heads[first] + head, first - begin, last - first
    dim, most = scratch.mixed.shape[0] * LANES, attended.lengths[last - 1]
    for start in range(0, most, _BLOCK):
        block = Block(index, start, min(_BLOCK, most - start))
        ahead_cache, ahead_head, ahead_start = cache, index, start + _BLOCK
        if ahead_start >= most:
            ahead_cache, ahead_head, ahead_start = next_cache, next_head, 0
        _prefetch_scales(ahead_cache, ahead_head, ahead_start)
        offset = (ahead_head * ahead_cache.keys.shape[1] + ahead_start * dim) * cache.keys.itemsize
        _score(cache.keys, block, row, rows, scratch, address_of(ahead_cache.keys) + offset)
        for r in range(rows):
            _weigh(cache, block, attended.lengths[first + r] - start, row, r, rows, scratch)
        _mix(cache.values, block, row, rows, scratch, address_of(ahead_cache.values) + offset)


@njit(**OPTIONS)
def _score(keys, block, row, rows, scratch, ahead):
    """Scores (steps / 16, rows, 16) of `rows` queries from `row` on; the keys at `ahead` are read next."""
    item, dim = keys.itemsize, scratch.mixed.shape[0] * LANES
    columns_bytes = dim * LANES * item
    start = address_of(keys) + (block.head * keys.shape[1] + block.start * dim) * item
    scales = address_of(scratch.state) + _STATE_BYTES * row + 4 * _QUERY_SCALE
    queries = Activations(address_of(scratch.queries) + 4 * row, 4 * _TOGETHER, scales, _STATE_BYTES)
    units = dim // 2 if item == 1 else dim
    unit_ahead, sums_step = columns_bytes // (units * TILES_OF[rows]), 4 * LANES * rows
    count = (block.steps + LANES - 1) // LANES
    for j in range(count * LANES * rows):
        scratch.scores[at(j)] = ZERO
    for j in range(0, count, TILE_BLOCKS):
        columns = Columns(start + j * columns_bytes, columns_bytes, 1, units)
        sums = Sums(address_of(scratch.scores) + j * sums_step, sums_step)
        following = Ahead(ahead + j * columns_bytes, columns_bytes, unit_ahead)
        multiply(keys, rows, min(TILE_BLOCKS, count - j), columns, queries, sums, following)


@njit(**OPTIONS)
def _weigh(cache, block, seen, row, r, rows, scratch):
    """Make softmax weights of row `r` of the scores, of which the entry sees `seen` steps, for `_mix`."""
    numbers, words, entry = scratch.numbers, scratch.words, row + r
    is_int8 = cache.keys.itemsize == 1
    units = (block.steps + LANES - 1) // LANES * (LANES // 2) if is_int8 else block.steps
    filled, column = np.int64(0), numbers.view(np.int32)
    if seen <= 0:
        scratch.state[at(entry), at(_WEIGHT_SCALE)] = ZERO
        _put_column(column, filled, units, r, rows, words)
        return
    seen = min(seen, block.steps)
    state, to = scratch.state, address_of(numbers)
    first_scale = 2 * (cache.key_scales.shape[1] * block.head + block.start)
    key_scales = address_of(cache.key_scales) + first_scale
    value_scales = address_of(cache.value_scales) + first_scale
    factor, before = ONE / np.sqrt(np.float32(scratch.mixed.shape[0] * LANES)), state[at(entry), at(_TOP)]
    scores, step = address_of(scratch.scores) + 4 * LANES * r, 4 * LANES * rows
    top = scale_scores(cache.keys, scores, step, key_scales, seen, before, to)
    shrink = exp((before - top) * factor)
    weights_sum, size = take_exponentials(cache.keys, to, value_scales, seen, top, factor)
    state[at(entry), at(_TOP)] = top
    state[at(entry), at(_SUM)] = fma(state[at(entry), at(_SUM)], shrink, weights_sum)
    for columns in range(scratch.mixed.shape[0]):
        for k in range(LANES):
            scratch.mixed[at(columns), at(entry), at(k)] *= shrink
    filled = seen
    if is_int8:
        inverse = _LARGEST_INT16 / size if size > SMALLEST else ZERO
        state[at(entry), at(_WEIGHT_SCALE)] = size * (ONE / _LARGEST_INT16)
        round_to_int16(to, seen, inverse, address_of(scratch.integers))
        filled = (seen + LANES - 1) // LANES * LANES // 2
        column = scratch.integers.view(np.int32)
    _put_column(column, filled, units, r, rows, words)


@njit(**OPTIONS)
def _put_column(column, filled, units, r, rows, words):
    """Write the first `filled` words of a column, then zeros, as row r of (units, rows)."""
    for k in range(filled):
        words[at(k * rows + r)] = column[at(k)]
    for k in range(filled, units):
        words[at(k * rows + r)] = 0


@njit(**OPTIONS)
def _mix(values, block, row, rows, scratch, ahead):
    """Add the values of a block, times the softmax weights, to the sums of `rows` entries from `row` on."""
    item, mixed = values.itemsize, scratch.mixed
    dim = mixed.shape[0] * LANES
    units, unit_bytes = block.steps, 4 * LANES
    if item == 1:
        units, unit_bytes = (block.steps + LANES - 1) // LANES * (LANES // 2), 2 * LANES
    start = address_of(values) + (block.head * values.shape[1] + block.start * dim) * item
    scales = address_of(scratch.state) + _STATE_BYTES * row + 4 * _WEIGHT_SCALE
    weights = Activations(address_of(scratch.words), 4 * rows, scales, _STATE_BYTES)
    columns_bytes, sums_step = LANES * _BLOCK * item, mixed.shape[1] * LANES * 4
    for j in range(0, mixed.shape[0], TILE_BLOCKS):
        columns = Columns(start + j * columns_bytes, columns_bytes, 1, units)
        sums = Sums(address_of(mixed) + j * sums_step + row * LANES * 4, sums_step)
        ahead_step = units * unit_bytes
        following = Ahead(ahead + j * ahead_step, ahead_step, unit_bytes // TILES_OF[rows])
        multiply(values, rows, min(TILE_BLOCKS, mixed.shape[0] - j), columns, weights, sums, following)
