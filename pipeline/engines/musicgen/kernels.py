"""The arithmetic of the decoder on a CPU, compiled on first use by numba.

Everything rests on one micro-kernel, `_tile_*`: a few rows of activations times 16 columns of
weights, the columns side by side in memory, so that one load of weights serves all rows and each
row's sum stays in registers (the layout of Goto and van de Geijn 2008, "Anatomy of high-performance
matrix multiplication"). It is written in LLVM's portable vectors: LLVM makes vpmaddwd of it on AVX2,
vpdpwssd where there is VNNI, and what there is elsewhere. Keys and values of the attention are laid
out so that the same kernel does their products.

Two kinds, told apart by the type of the weights:
- float32: plain sums of products;
- int8: weights are int8 with one scale per output channel, activations int16 with a scale per row and
  group of inputs (`group`, 128 at most). Products are added as integers within a group (at most
  128 * 127 * 32767, below 2**31), groups in float32. On AVX2, int16 activations cost nothing over
  int8 ones, and the error of quantizing them all but vanishes.

A row's sums run in one order whatever other rows stand beside it, so a result can't depend on its
neighbours, nor on the number of threads: that is what makes variations reproducible in any batch.

All of this stands in one file because numba's cache on disk looks at the date of a function's own
file only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # output channels that stand side by side
ROW_BLOCK = 24  # rows of activations that are packed together
_TILE_ROWS = 6  # of one micro-kernel: 6 x 16 sums fill AVX2's registers

# Sums may be reordered for the vector units (the same way each time); infinities and NaN stay what they are.
_MATHS = {"contract", "reassoc", "nsz", "arcp"}

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


# -- the micro-kernel, as LLVM's intermediate representation ---------------------------------------


def _make_tile(rows: int) -> Any:
    """An intrinsic: `rows` rows times 16 columns, added to float32 sums, (rows, 16) at `out`.

    Of the array `weights` only the type counts. All other arguments are addresses or byte counts:
    weights at `w`, units in a row (a unit is an input, or a pair of them for int8); activations at
    `a`, one 32-bit word per row, `a_step` from unit to unit; `groups` groups of `units` units (an
    even number for int8); scales at `s`, float32, `s_step` from row to row (int8 only). At `ahead`, `ahead_step` per
    unit, stands what will be needed next.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        _: Any,
        weights: Any,
        w: Any,
        a: Any,
        a_step: Any,
        groups: Any,
        units: Any,
        s: Any,
        s_step: Any,
        out: Any,
        ahead: Any,
        ahead_step: Any,
    ) -> Any:
        quantized = weights.dtype == types.int8
        signature = types.void(weights, *[types.intp] * 10)

        def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            emit = _Int8Tile if quantized else _Float32Tile
            emit(builder, rows, *arguments[1:]).build()
            return context.get_dummy_value()

        return signature, codegen

    return tile


class _Tile:
    """Emits the loops; what a unit is, is the subclasses' business."""

    UNROLL: int  # units per turn of the inner loop
    WEIGHT_BYTES: int  # of 16 columns, per unit
    SUM: Any  # type of the sums within a group

    def __init__(self, builder: Any, rows: int, *arguments: Any) -> None:
        self.b, self.rows = builder, rows
        self.w, self.a, self.a_step, self.groups, self.units = arguments[:5]
        self.s, self.s_step, self.out, self.ahead, self.ahead_step = arguments[5:]

    def build(self) -> None:
        b = self.b
        totals = [cgutils.alloca_once(b, _vector(_F32)) for _ in range(self.rows)]
        for row, total in enumerate(totals):
            b.store(b.load(self.out_at(row), align=4), total)
        with cgutils.for_range(b, self.groups) as group:
            sums = self.group(group.index)
            for row, (total, value) in enumerate(zip(totals, sums, strict=True)):
                b.store(self.add_group(b.load(total), value, row, group.index), total)
        for row, total in enumerate(totals):
            b.store(b.load(total), self.out_at(row), align=4)

    def group(self, index: Any) -> list[Any]:
        """One loop over the units of a group, all sums in registers."""
        b = self.b
        before, loop, after = b.block, b.append_basic_block("units"), b.append_basic_block("units.end")
        first = b.mul(index, self.units)
        b.branch(loop)
        b.position_at_end(loop)
        unit = b.phi(_I64)
        unit.add_incoming(_I64(0), before)
        carried = [b.phi(self.SUM) for _ in range(self.rows)]
        sums: list[Any] = list(carried)
        for step in range(self.UNROLL):
            sums = self.unit(b.add(b.add(first, unit), _I64(step)), sums)
        where = self.address(self.ahead, b.mul(b.add(first, unit), self.ahead_step), _I8)
        prefetch = self.declare(
            "llvm.prefetch.p0", ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]
        )
        b.call(prefetch, [where, _I32(0), _I32(2), _I32(1)])  # for reading, into the second cache, data
        following = b.add(unit, _I64(self.UNROLL))
        unit.add_incoming(following, loop)
        for phi, value in zip(carried, sums, strict=True):
            phi.add_incoming(ir.Constant(self.SUM, [0] * LANES), before)
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, self.units), loop, after)
        b.position_at_end(after)
        return sums

    def unit(self, unit: Any, sums: list[Any]) -> list[Any]:
        b = self.b
        weights = self.load_weights(self.address(self.w, b.mul(unit, _I64(self.WEIGHT_BYTES)), _I8))
        word = b.add(self.a, b.mul(unit, self.a_step))
        words = [b.load(self.address(word, _I64(4 * row), _I32), align=4) for row in range(self.rows)]
        return [self.add_product(weights, value, total) for value, total in zip(words, sums, strict=True)]

    def load_weights(self, pointer: Any) -> Any:
        raise NotImplementedError

    def add_product(self, weights: Any, word: Any, total: Any) -> Any:
        raise NotImplementedError

    def add_group(self, total: Any, value: Any, row: int, group: Any) -> Any:
        raise NotImplementedError

    def out_at(self, row: int) -> Any:
        return self.address(self.out, _I64(4 * LANES * row), _vector(_F32))

    def address(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.b.inttoptr(self.b.add(base, offset), kind.as_pointer())

    def declare(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, arguments), name)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        kind = _vector(_F32)
        return self.b.call(self.declare(f"llvm.fma.v{LANES}f32", kind, [kind] * 3), [x, y, z])

    def everywhere(self, scalar: Any) -> Any:
        return _everywhere(self.b, scalar)


class _Float32Tile(_Tile):
    UNROLL, WEIGHT_BYTES = 1, 4 * LANES

    @property
    def SUM(self) -> Any:  # noqa: N802
        return _vector(_F32)

    def load_weights(self, pointer: Any) -> Any:
        return self.b.load(self.b.bitcast(pointer, _vector(_F32).as_pointer()), align=4)

    def add_product(self, weights: Any, word: Any, total: Any) -> Any:
        return self.fma(weights, self.everywhere(self.b.bitcast(word, _F32)), total)

    def add_group(self, total: Any, value: Any, row: int, group: Any) -> Any:
        return self.b.fadd(total, value)


class _Int8Tile(_Tile):
    UNROLL, WEIGHT_BYTES = 2, 2 * LANES

    @property
    def SUM(self) -> Any:  # noqa: N802
        return _vector(_I32)

    def load_weights(self, pointer: Any) -> Any:
        pairs = ir.VectorType(_I8, 2 * LANES)
        loaded = self.b.load(self.b.bitcast(pointer, pairs.as_pointer()), align=1)
        return self.b.sext(loaded, ir.VectorType(_I16, 2 * LANES))

    def add_product(self, weights: Any, word: Any, total: Any) -> Any:
        """Adds both products of a pair: the shape in which LLVM knows multiply-and-add instructions."""
        b, wide = self.b, ir.VectorType(_I32, 2 * LANES)
        pair = b.bitcast(self.everywhere(word), ir.VectorType(_I16, 2 * LANES))
        products = b.mul(b.sext(weights, wide), b.sext(pair, wide))
        nothing = ir.Constant(wide, ir.Undefined)
        even, odd = (
            b.shuffle_vector(
                products, nothing, ir.Constant(_vector(_I32), list(range(start, 2 * LANES, 2)))
            )
            for start in (0, 1)
        )
        return b.add(total, b.add(even, odd))

    def add_group(self, total: Any, value: Any, row: int, group: Any) -> Any:
        b = self.b
        offset = b.add(b.mul(_I64(row), self.s_step), b.mul(group, _I64(4)))
        scale = self.everywhere(b.load(self.address(self.s, offset, _F32), align=4))
        return self.fma(b.sitofp(value, _vector(_F32)), scale, total)


def _vector(kind: Any) -> Any:
    return ir.VectorType(kind, LANES)


def _everywhere(builder: Any, scalar: Any) -> Any:
    kind = _vector(scalar.type)
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, scalar, _I32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_vector(_I32), [0] * LANES))


@intrinsic  # type: ignore[untyped-decorator]
def _float_of_bits(_: Any, bits: Any) -> Any:
    """The float32 whose bits an int32 has."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), codegen


_tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = (_make_tile(rows) for rows in range(1, 7))


# -- functions of one number ------------------------------------------------------------------------

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E2, _E3, _E4, _E5, _E6 = (np.float32(1 / n) for n in (2, 6, 24, 120, 720))
_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_LEAST = np.float32(-87.0)  # e to this is the smallest normal float32, nearly


@njit(cache=True, inline="always")
def _exp(x):  # type: ignore[no-untyped-def]
    """e**x of a float32 x <= 0, to about 1e-7: 2**n times the series of a rest below ln(2)/2."""
    x = x if x > _LEAST else _LEAST
    n = np.floor(x * _LOG2_E + _HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = _ONE + r * (_ONE + r * (_E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * _E6)))))
    return series * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


# Abramowitz and Stegun 1964, 7.1.26: erf to 1.5e-7.
_ERF_P = np.float32(0.3275911)
_A1, _A2, _A3 = np.float32(0.254829592), np.float32(-0.284496736), np.float32(1.421413741)
_A4, _A5 = np.float32(-1.453152027), np.float32(1.061405429)
_SQRT_HALF = np.float32(0.7071067811865476)


@njit(cache=True, inline="always")
def _gelu(x):  # type: ignore[no-untyped-def]
    """x * Phi(x), the exact GELU (Hendrycks and Gimpel 2016), by erf."""
    z = abs(x) * _SQRT_HALF
    t = _ONE / (_ONE + _ERF_P * z)
    tail = t * (_A1 + t * (_A2 + t * (_A3 + t * (_A4 + t * _A5)))) * _exp(-z * z)
    below = _HALF * tail
    return x * (below if x < _ZERO else _ONE - below)


_EPSILON = np.float32(1e-5)  # torch.nn.LayerNorm's


@njit(cache=True, fastmath=_MATHS)
def _normalize(x, weight, bias, out):  # type: ignore[no-untyped-def]
    """Layer normalization of one row."""
    n = np.float32(x.shape[0])
    mean = _ZERO
    for k in range(x.shape[0]):
        mean += x[k]
    mean /= n
    variance = _ZERO
    for k in range(x.shape[0]):
        variance += (x[k] - mean) * (x[k] - mean)
    factor = _ONE / np.sqrt(variance / n + _EPSILON)
    for k in range(x.shape[0]):
        out[k] = (x[k] - mean) * factor * weight[k] + bias[k]


# -- products ---------------------------------------------------------------------------------------


@njit(cache=True, fastmath=_MATHS)
def _multiply(weights, w, a, rows, groups, units, s, s_step, out, ahead, ahead_bytes):  # type: ignore[no-untyped-def]
    """(rows, 16) += activations times 16 columns, chunk by chunk, so that both stay in the first cache.

    `a`: words, (groups * units, rows); `ahead`: the next columns, `ahead_bytes` of them.
    """
    unit_bytes = LANES * (2 if weights.itemsize == 1 else 4)
    chunk = max(1, 256 // units)
    tiles = (rows + _TILE_ROWS - 1) // _TILE_ROWS
    step = ahead_bytes // (groups * units * tiles)
    for group in range(0, groups, chunk):
        n = min(chunk, groups - group)
        row = 0
        for tile in range(tiles):
            count = (rows - row) // (tiles - tile)
            ww = w + group * units * unit_bytes
            aa = a + (group * units * rows + row) * 4
            ss = s + row * s_step + group * 4
            oo = out + row * LANES * 4
            pp = ahead + (group * tiles + tile * n) * units * step
            if count == 1:
                _tile_1(weights, ww, aa, rows * 4, n, units, ss, s_step, oo, pp, step)
            elif count == 2:
                _tile_2(weights, ww, aa, rows * 4, n, units, ss, s_step, oo, pp, step)
            elif count == 3:
                _tile_3(weights, ww, aa, rows * 4, n, units, ss, s_step, oo, pp, step)
            elif count == 4:
                _tile_4(weights, ww, aa, rows * 4, n, units, ss, s_step, oo, pp, step)
            elif count == 5:
                _tile_5(weights, ww, aa, rows * 4, n, units, ss, s_step, oo, pp, step)
            else:
                _tile_6(weights, ww, aa, rows * 4, n, units, ss, s_step, oo, pp, step)
            row += count


@njit(cache=True, fastmath=_MATHS)
def _pack_group(x, start, stop, words, first, step):  # type: ignore[no-untyped-def]
    """Quantize x[start:stop] to int16 pairs, a pair in every `step`-th word from `first`; its scale."""
    largest = np.float32(0.0)
    for k in range(start, stop):
        largest = abs(x[k]) if abs(x[k]) > largest else largest
    inverse = np.float32(32767.0) / largest if largest > 0 else np.float32(0.0)
    rounded = np.empty(stop - start, np.int16)
    for k in range(stop - start):
        rounded[k] = np.int16(np.floor(x[start + k] * inverse + _HALF))
    pairs = rounded.view(np.int32)
    for unit in range(pairs.shape[0]):
        words[first + (start // 2 + unit) * step] = pairs[unit]
    return largest * np.float32(1.0 / 32767.0)


@njit(cache=True, fastmath=_MATHS)
def _pack_row(weights, x, group, row, rows, words, scales):  # type: ignore[no-untyped-def]
    """Lay a row of activations out for `linear`: words in blocks of 24 rows, (inputs or pairs, rows)."""
    block = row // ROW_BLOCK
    in_block = min(ROW_BLOCK, rows - block * ROW_BLOCK)
    per_word = 2 if weights.itemsize == 1 else 1
    first = block * ROW_BLOCK * (x.shape[0] // per_word) + row - block * ROW_BLOCK
    if weights.itemsize == 1:
        for g in range(x.shape[0] // group):
            scales[row, g] = _pack_group(x, g * group, (g + 1) * group, words, first, in_block)
    else:
        floats = words.view(np.float32)
        for k in range(x.shape[0]):
            floats[first + k * in_block] = x[k]


STORE, ADD, GELU = 0, 1, 2


@njit(cache=True, parallel=True, fastmath=_MATHS)
def linear(weights, weight_scales, words, scales, rows, group, out, mode):  # type: ignore[no-untyped-def]
    """out (rows, outputs) = or += packed activations times weights, or GELU of it.

    `weights`: (outputs / 16, inputs * 16), see `pack_columns`; `weight_scales` (outputs,) for int8.
    """
    blocks, inputs = weights.shape[0], weights.shape[1] // LANES
    quantized = weights.itemsize == 1
    units_per_row = inputs // 2 if quantized else inputs
    groups = inputs // group
    block_bytes = weights.shape[1] * weights.itemsize
    for n in prange(blocks):
        sums = np.empty((ROW_BLOCK, LANES), np.float32)
        start = weights.ctypes.data + n * block_bytes
        following = start + block_bytes if n + 1 < blocks else start
        for row in range(0, rows, ROW_BLOCK):
            count = min(ROW_BLOCK, rows - row)
            sums[:count] = 0
            _multiply(
                weights,
                start,
                words.ctypes.data + row * units_per_row * 4,
                count,
                groups,
                units_per_row // groups,
                scales.ctypes.data + row * scales.shape[1] * 4,
                scales.shape[1] * 4,
                sums.ctypes.data,
                following,
                block_bytes if row == 0 else 0,
            )
            for r in range(count):
                if quantized:
                    for j in range(LANES):
                        sums[r, j] *= weight_scales[n * LANES + j]
                if mode == GELU:
                    for j in range(LANES):
                        sums[r, j] = _gelu(sums[r, j])
                if mode == ADD:
                    for j in range(LANES):
                        out[row + r, n * LANES + j] += sums[r, j]
                else:
                    for j in range(LANES):
                        out[row + r, n * LANES + j] = sums[r, j]


# -- attention --------------------------------------------------------------------------------------


_VALUE_GROUP = 128  # positions that share a scale of the attention's weights


@njit(cache=True, fastmath=_MATHS)
def _write(cache, scales, at, x, is_key):  # type: ignore[no-untyped-def]
    """Put one position of one head into its cache: (steps * dim,) of keys or values, scales (steps,)."""
    dim = x.shape[0]
    quantized = cache.itemsize == 1
    inverse = _ONE
    if quantized:
        largest = _ZERO
        for d in range(dim):
            largest = abs(x[d]) if abs(x[d]) > largest else largest
        scales[at] = largest * np.float32(1.0 / 127.0)
        inverse = np.float32(127.0) / largest if largest > 0 else _ZERO
    pair = 2 if quantized else 1
    for d in range(dim):
        if is_key:  # 16 positions are the columns, dimensions are the inputs
            column, where, block = at % LANES, d, (at // LANES) * dim * LANES
        else:  # 16 dimensions are the columns, the 128 positions of a group are the inputs
            column, where = d % LANES, at % _VALUE_GROUP
            block = (at // _VALUE_GROUP * dim + d // LANES * LANES) * _VALUE_GROUP
        index = block + (where // pair) * pair * LANES + column * pair + where % pair
        if quantized:
            cache[index] = np.int8(np.floor(x[d] * inverse + _HALF))
        else:
            cache[index] = x[d]


@njit(cache=True, fastmath=_MATHS)
def _score(keys, key_scales, query, query_scale, length, scores, ahead):  # type: ignore[no-untyped-def]
    """scores (length,), rounded up to 16s, of a packed query against keys (steps * dim,).

    `ahead` is the address of the values, as many bytes, which come next.
    """
    quantized = keys.itemsize == 1
    units = query.shape[0]
    block_bytes = units * LANES * (2 if quantized else 4)
    for block in range((length + LANES - 1) // LANES):
        start = block * LANES
        scores[start : start + LANES] = 0
        _tile_1(
            keys,
            keys.ctypes.data + block * block_bytes,
            query.ctypes.data,
            4,
            1,
            units,
            query_scale.ctypes.data,
            0,
            scores.ctypes.data + start * 4,
            ahead + block * block_bytes,
            block_bytes // units,
        )
        if quantized:
            for j in range(LANES):
                scores[start + j] *= key_scales[start + j]


@njit(cache=True, fastmath=_MATHS)
def _mix(values, value_scales, chances, length, words, scale, out, ahead):  # type: ignore[no-untyped-def]
    """out (dim,) += chances (length,) times values (steps * dim,); `ahead` as for `_score`."""
    quantized = values.itemsize == 1
    dim = out.shape[0]
    unit_bytes = LANES * (2 if quantized else 4)
    for start in range(0, length, _VALUE_GROUP):
        n = min(_VALUE_GROUP, length - start)
        units = n
        if quantized:
            rounded = (n + 3) // 4 * 4
            for t in range(n):
                chances[start + t] *= value_scales[start + t]
            for t in range(n, rounded):
                chances[start + t] = 0
            scale[0] = _pack_group(chances[start : start + rounded], 0, rounded, words, 0, 1)
            units = rounded // 2
        else:
            words[:n] = chances[start : start + n].view(np.int32)
        for block in range(dim // LANES):
            offset = (start * dim + block * LANES * _VALUE_GROUP) * values.itemsize
            _tile_1(
                values,
                values.ctypes.data + offset,
                words.ctypes.data,
                4,
                1,
                units,
                scale.ctypes.data,
                0,
                out.ctypes.data + block * LANES * 4,
                ahead + offset,
                unit_bytes,
            )


@njit(cache=True, fastmath=_MATHS)
def _attend(query, cache, length, prefix, p_length, ahead, out):  # type: ignore[no-untyped-def]
    """out (dim,) of one head at one position: over a shared prefix, then over the row's own steps.

    `ahead`: the keys that come next.
    """
    keys, key_scales, values, value_scales = cache
    p_keys, p_key_scales, p_values, p_value_scales = prefix
    quantized = keys.itemsize == 1
    dim = query.shape[0]
    p_room = (p_length + LANES - 1) // LANES * LANES
    room = (length + LANES - 1) // LANES * LANES
    scratch = np.empty(p_room + room + dim + max(_VALUE_GROUP, dim) + 1, np.float32)
    scores = scratch[: p_room + room]
    packed = scratch[p_room + room : p_room + room + dim].view(np.int32)
    words = scratch[p_room + room + dim : -1].view(np.int32)
    scale = scratch[-1:]
    units = dim
    if quantized:
        scale[0] = _pack_group(query, 0, dim, packed, 0, 1)
        units = dim // 2
    else:
        packed[:] = query.view(np.int32)
    _score(p_keys, p_key_scales, packed[:units], scale, p_length, scores[:p_room], p_values.ctypes.data)
    _score(keys, key_scales, packed[:units], scale, length, scores[p_room:], values.ctypes.data)
    for t in range(p_length, p_room):
        scores[t] = -np.inf
    for t in range(p_room + length, p_room + room):
        scores[t] = -np.inf
    largest = scores[p_room]
    for t in range(p_room + room):
        largest = scores[t] if scores[t] > largest else largest
    factor = _ONE / np.sqrt(np.float32(dim))
    total = _ZERO
    for t in range(p_room + room):
        scores[t] = _exp((scores[t] - largest) * factor)
        total += scores[t]
    out[:] = 0
    _mix(p_values, p_value_scales, scores[:p_room], p_length, words, scale, out, p_keys.ctypes.data)
    _mix(values, value_scales, scores[p_room:], length, words, scale, out, ahead)
    for d in range(dim):
        out[d] /= total


@njit(cache=True, parallel=True, fastmath=_MATHS)
def attention(qkv, heads, cache, own, prefixes, before, positions, prefix_lengths, out):  # type: ignore[no-untyped-def]
    """Attention of one layer: write the entries' keys and values, then attend.

    An entry is one position of one row; all entries of a row stand in order.

    Args:
        qkv: float32, (entries, 3 * hidden).
        cache: keys and values, (places, steps * dim), and their scales, (places, steps) as (keys,
            scales, values, scales); a place is one head of one slot of one layer; steps a multiple
            of 128.
        own: int64, (entries,): the place of an entry's first head.
        prefixes: the same of the prefixes.
        before: int64, (entries,): the place of the first head of its prefix.
        positions: int64, (entries,): its position among its row's own steps.
        prefix_lengths: int64, (entries,): 0 for none.
        out: float32, (entries, hidden).
    """
    keys, key_scales, values, value_scales = cache
    p_keys, p_key_scales, p_values, p_value_scales = prefixes
    entries, hidden = out.shape
    dim = hidden // heads
    for task in prange(entries * heads):
        head, m = task // entries, task % entries
        place, start = own[m] + head, hidden + head * dim
        _write(keys[place], key_scales[place], positions[m], qkv[m, start : start + dim], True)
        start += hidden
        _write(values[place], value_scales[place], positions[m], qkv[m, start : start + dim], False)
    for task in prange(entries * heads):
        head, m = task // entries, task % entries
        place, prefix, start = own[m] + head, before[m] + head, head * dim
        following = own[m + 1] + head if m + 1 < entries else place
        _attend(
            qkv[m, start : start + dim],
            (keys[place], key_scales[place], values[place], value_scales[place]),
            positions[m] + 1,
            (p_keys[prefix], p_key_scales[prefix], p_values[prefix], p_value_scales[prefix]),
            prefix_lengths[m],
            keys[following].ctypes.data,
            out[m, start : start + dim],
        )


# -- laying out activations ---------------------------------------------------------------------------


@njit(cache=True, fastmath=_MATHS)
def _pack_one(weights, x, norm, group, m, words, scales):  # type: ignore[no-untyped-def]
    if norm.shape[0] == 0:
        _pack_row(weights, x[m], group, m, x.shape[0], words, scales)
    else:
        normalized = np.empty(x.shape[1], np.float32)
        _normalize(x[m], norm[0], norm[1], normalized)
        _pack_row(weights, normalized, group, m, x.shape[0], words, scales)


@njit(cache=True, parallel=True, fastmath=_MATHS)
def pack(weights, x, norm, group, words, scales):  # type: ignore[no-untyped-def]
    """Lay activations (rows, inputs) out for `linear` with these weights.

    `norm`, float32 (2, inputs), is the weight and bias of a layer normalization that comes first;
    (0, 0) for none. `words` int32 takes rows * inputs, `scales` (rows, inputs / group).
    """
    for m in prange(x.shape[0]):
        _pack_one(weights, x, norm, group, m, words, scales)


@njit(cache=True, fastmath=_MATHS)
def pack_serially(weights, x, norm, group, words, scales):  # type: ignore[no-untyped-def]
    """`pack` in one thread."""
    for m in range(x.shape[0]):
        _pack_one(weights, x, norm, group, m, words, scales)


# -- layouts ----------------------------------------------------------------------------------------


def pack_columns(weights: np.ndarray) -> np.ndarray:
    """(outputs, inputs) to (outputs / 16, inputs * 16): inputs (int8: pairs of them) of 16 outputs together."""
    outputs, inputs = weights.shape
    pair = 2 if weights.dtype == np.int8 else 1
    split = weights.reshape(outputs // LANES, LANES, inputs // pair, pair)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(outputs // LANES, inputs * LANES)


def quantize_rows(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (outputs, inputs) to int8 and a scale per output, so that int8 * scale is near it."""
    scales = np.abs(weights).max(axis=1) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(weights * inverse[:, None]).astype(np.int8), scales.astype(np.float32)
