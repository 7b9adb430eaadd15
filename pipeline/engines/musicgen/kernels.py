"""The arithmetic of the decoder on a CPU, compiled on first use by numba.

Everything rests on one micro-kernel, `_tile`: a few rows of activations times 16 columns of
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

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # output channels that stand side by side
ROW_BLOCK = 24  # rows of activations that are packed together
# Rows that the micro-kernel can take. The most, times 16 sums, fill the registers: AVX-512 has 32 for 16
# numbers each, AVX2 a quarter of that.
_WIDE = bool(get_host_cpu_features().get("avx512f"))
_TILE_ROWS = (16, 12, 8, 6, 4, 3, 2, 1) if _WIDE else (6, 5, 4, 3, 2, 1)


def _tiles_of(rows: int) -> int:
    return 1 + _tiles_of(rows - int(_TILE_OF[rows])) if rows else 0


# By a number of rows: those that the next tile takes, and how many tiles it takes in all.
_TILE_OF = np.array([max((n for n in _TILE_ROWS if n <= rows), default=0) for rows in range(ROW_BLOCK + 1)])
_TILES_OF = np.array([_tiles_of(rows) for rows in range(ROW_BLOCK + 1)])

# Sums may be reordered for the vector units (the same way each time); infinities and NaN stay what they are.
# Division checks nothing: an exception in a loop keeps it from the vector units.
_OPTIONS: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
}

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


# -- the micro-kernel, as LLVM's intermediate representation ---------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    _: Any,
    weights: Any,
    rows: Any,
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
    """`rows` rows (one of `_TILE_ROWS`) times 16 columns, added to float32 sums, (rows, 16) at `out`.

    Of the array `weights` only the type counts. All other arguments are addresses or byte counts:
    weights at `w`, units in a row (a unit is an input, or a pair of them for int8); activations at
    `a`, one 32-bit word per row, `a_step` from unit to unit; `groups` groups of `units` units (a
    multiple of 8 for int8); scales at `s`, float32, `s_step` from row to row (int8 only). At
    `ahead`, `ahead_step` per unit, stands what will be needed next.
    """
    emit = _Int8Tile if weights.dtype == types.int8 else _Float32Tile
    signature = types.void(weights, *[types.intp] * 11)

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        end = builder.append_basic_block("tile.end")
        choice = builder.switch(arguments[1], end)
        for count in _TILE_ROWS:
            block = builder.append_basic_block(f"tile.{count}")
            choice.add_case(_I64(count), block)
            builder.position_at_end(block)
            emit(builder, count, *arguments[2:]).build()
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


class _Tile:
    """Emits the loops; what a unit is, is the subclasses' business."""

    CHAINS: int  # sums per row and column at once, 1 if their order counts
    WEIGHT_BYTES: int  # of 16 columns, per unit
    SUM: Any  # type of the sums within a group

    def __init__(self, builder: Any, rows: int, *arguments: Any) -> None:
        self.b, self.rows = builder, rows
        self.w, self.a, self.a_step, self.groups, self.units = arguments[:5]
        self.s, self.s_step, self.out, self.ahead, self.ahead_step = arguments[5:]
        # A product takes several cycles: with few rows, the next unit's must not wait for it.
        chains = (2**n for n in range(4) if rows * 2**n <= _TILE_ROWS[0])
        self.chains = min(max(chains), self.CHAINS)

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
        """One loop over the units of a group, all sums in registers; the sum of each row."""
        b = self.b
        before, loop, after = b.block, b.append_basic_block("units"), b.append_basic_block("units.end")
        first = b.mul(index, self.units)
        b.branch(loop)
        b.position_at_end(loop)
        unit = b.phi(_I64)
        unit.add_incoming(_I64(0), before)
        carried = [[b.phi(self.SUM) for _ in range(self.rows)] for _ in range(self.chains)]
        sums = []
        for chain, its in enumerate(carried):
            here = b.add(b.add(first, unit), _I64(chain))
            sums.append(self.unit(here, its))
            if chain % 2 == 0:
                self.prefetch(here)
        following = b.add(unit, _I64(self.chains))
        unit.add_incoming(following, loop)
        for its, values in zip(carried, sums, strict=True):
            for phi, value in zip(its, values, strict=True):
                phi.add_incoming(ir.Constant(self.SUM, [0] * LANES), before)
                phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, self.units), loop, after)
        b.position_at_end(after)
        return [self.total(list(its)) for its in zip(*sums, strict=True)]

    def unit(self, unit: Any, sums: list[Any]) -> list[Any]:
        b = self.b
        weights = self.load_weights(self.address(self.w, b.mul(unit, _I64(self.WEIGHT_BYTES)), _I8))
        word = b.add(self.a, b.mul(unit, self.a_step))
        words = [b.load(self.address(word, _I64(4 * row), _I32), align=4) for row in range(self.rows)]
        return [self.add_product(weights, value, total) for value, total in zip(words, sums, strict=True)]

    def prefetch(self, unit: Any) -> None:
        """For reading, into the second cache, data."""
        where = self.address(self.ahead, self.b.mul(unit, self.ahead_step), _I8)
        prefetch = self.declare("llvm.prefetch.p0", ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        self.b.call(prefetch, [where, _I32(0), _I32(2), _I32(1)])

    def load_weights(self, pointer: Any) -> Any:
        raise NotImplementedError

    def add_product(self, weights: Any, word: Any, total: Any) -> Any:
        raise NotImplementedError

    def total(self, sums: list[Any]) -> Any:
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
    CHAINS, WEIGHT_BYTES = 1, 4 * LANES

    @property
    def SUM(self) -> Any:  # noqa: N802
        return _vector(_F32)

    def load_weights(self, pointer: Any) -> Any:
        return self.b.load(self.b.bitcast(pointer, _vector(_F32).as_pointer()), align=4)

    def add_product(self, weights: Any, word: Any, total: Any) -> Any:
        return self.fma(weights, self.everywhere(self.b.bitcast(word, _F32)), total)

    def total(self, sums: list[Any]) -> Any:
        (only,) = sums
        return only

    def add_group(self, total: Any, value: Any, row: int, group: Any) -> Any:
        return self.b.fadd(total, value)


class _Int8Tile(_Tile):
    CHAINS, WEIGHT_BYTES = 8, 2 * LANES

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
            b.shuffle_vector(products, nothing, ir.Constant(_vector(_I32), list(range(start, 2 * LANES, 2))))
            for start in (0, 1)
        )
        return b.add(total, b.add(even, odd))

    def total(self, sums: list[Any]) -> Any:
        return functools.reduce(self.b.add, sums)

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


@intrinsic  # type: ignore[untyped-decorator]
def _bits_of_float(_: Any, number: Any) -> Any:
    """The bits of a float32 as an int32."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _address(_: Any, array: Any) -> Any:
    """Where an array's data begins. (`array.ctypes` counts references, which threads contend for.)"""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(held.data, _I64)

    return types.intp(array), codegen


# -- functions of one number ------------------------------------------------------------------------

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E2, _E3, _E4, _E5, _E6 = (np.float32(1 / n) for n in (2, 6, 24, 120, 720))
_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_LEAST = np.float32(-87.0)  # e to this is the smallest normal float32, nearly


@njit(inline="always", **_OPTIONS)
def _exp(x):
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


@njit(inline="always", **_OPTIONS)
def _gelu(x):
    """x * Phi(x), the exact GELU (Hendrycks and Gimpel 2016), by erf: max(x, 0) less what the tail takes."""
    size = abs(x)
    z = size * _SQRT_HALF
    t = _ONE / (_ONE + _ERF_P * z)
    tail = t * (_A1 + t * (_A2 + t * (_A3 + t * (_A4 + t * _A5)))) * _exp(-z * z)
    return (x + size) * _HALF - size * tail * _HALF


_EPSILON = np.float32(1e-5)  # torch.nn.LayerNorm's

# An index of an array that is known not to be negative: numba then looks for no end to count from, and
# loops become vectors (eight times as quick).
_at = np.uint64


@njit(**_OPTIONS)
def _statistics(x, m):
    """Mean of a row, and what its layer normalization multiplies by."""
    n = np.float32(x.shape[1])
    mean = _ZERO
    for k in range(x.shape[1]):
        mean += x[_at(m), _at(k)]
    mean /= n
    variance = _ZERO
    for k in range(x.shape[1]):
        difference = x[_at(m), _at(k)] - mean
        variance += difference * difference
    return mean, _ONE / np.sqrt(variance / n + _EPSILON)


# -- products ---------------------------------------------------------------------------------------


@njit(**_OPTIONS)
def _multiply(weights, w, a, rows, groups, units, s, s_step, out, ahead, ahead_bytes):
    """(rows, 16) += activations times 16 columns, chunk by chunk, so that both stay in the first cache.

    `a`: words, (groups * units, rows); `ahead`: the next columns, `ahead_bytes` of them.
    """
    unit_bytes = LANES * (2 if weights.itemsize == 1 else 4)
    chunk = max(1, 256 // units)
    tiles = _TILES_OF[rows]
    step = ahead_bytes // (groups * units * tiles)
    for group in range(0, groups, chunk):
        n = min(chunk, groups - group)
        row = 0
        for tile in range(tiles):
            count = _TILE_OF[rows - row]
            _tile(
                weights,
                count,
                w + group * units * unit_bytes,
                a + (group * units * rows + row) * 4,
                rows * 4,
                n,
                units,
                s + row * s_step + group * 4,
                s_step,
                out + row * LANES * 4,
                ahead + (group * tiles + tile * n) * units * step,
                step,
            )
            row += count


_BITS = np.int32(0x7FFFFFFF)  # of a float32, without the sign


@njit(**_OPTIONS)
def _largest(x, x_from, n):
    """The largest of n numbers without their signs.

    Found by bits, in which such numbers are in order: so it can be done by vectors, and NaN is the
    largest of all.
    """
    bits = np.int32(0)
    for k in range(n):
        bits = max(bits, np.int32(_bits_of_float(x[_at(x_from + k)]) & _BITS))
    return _float_of_bits(bits)


@njit(**_OPTIONS)
def _quantize(x, x_from, n, out):
    """n numbers to int16, out[:n], and their scale."""
    largest = _largest(x, x_from, n)
    inverse = np.float32(32767.0) / largest if largest > 0 else _ZERO
    for k in range(n):
        out[_at(k)] = np.int16(np.floor(x[_at(x_from + k)] * inverse + _HALF))
    return largest * np.float32(1.0 / 32767.0)


@njit(**_OPTIONS)
def _lay_out(weights, x, norm, statistics, group, piece, room, words, scales):
    """Lay one group of inputs of 24 rows of activations out for `_linear` with these weights.

    Words come in blocks of 24 rows, (inputs or pairs, rows); `piece` counts groups within blocks.
    `norm`, float32 (2, inputs), is the weight and bias of a layer normalization that comes first,
    with the rows' `_statistics`, (rows, 2); (0, 0) for none. `room` is float32, 2 * group.
    """
    inputs = x.shape[1]
    groups = inputs // group
    block, g = piece // groups, piece % groups
    start, first_row = g * group, block * ROW_BLOCK
    rows = min(ROW_BLOCK, x.shape[0] - first_row)
    quantized = weights.itemsize == 1
    pair = 2 if quantized else 1
    units = group // pair
    first = first_row * (inputs // pair) + g * units * rows
    halves = room.view(np.int16)
    laid = words.view(np.float32)
    for r in range(rows):
        m = first_row + r
        if norm.shape[0] == 0:
            for k in range(group):
                room[_at(group + k)] = x[_at(m), _at(start + k)]
        else:
            mean, factor = statistics[_at(m), 0], statistics[_at(m), 1]
            for k in range(group):
                normal = (x[_at(m), _at(start + k)] - mean) * factor
                room[_at(group + k)] = normal * norm[0, _at(start + k)] + norm[1, _at(start + k)]
        begin = group
        if quantized:
            scales[_at(m), _at(g)] = _quantize(room, group, group, halves)
            begin = 0
        for unit in range(units):
            laid[_at(first + unit * rows + r)] = room[_at(begin + unit)]


STORE, ADD, GELU = 0, 1, 2  # what a product does with what it finds


@njit(**_OPTIONS)
def _linear(weights, weight_scales, words, scales, rows, group, out, mode, first, last):
    """Blocks `first` to `last` of out (rows, outputs): = or += activations times weights, or GELU of it.

    `weights`: (outputs / 16, inputs * 16), see `pack_columns`; `weight_scales` (outputs,) for int8.
    """
    inputs = weights.shape[1] // LANES
    quantized = weights.itemsize == 1
    units_per_row = inputs // 2 if quantized else inputs
    groups = inputs // group
    block_bytes = weights.shape[1] * weights.itemsize
    sums = np.empty((ROW_BLOCK, LANES), np.float32)
    for n in range(first, last):
        start = _address(weights) + n * block_bytes
        following = start + block_bytes if n + 1 < weights.shape[0] else start
        for row in range(0, rows, ROW_BLOCK):
            count = min(ROW_BLOCK, rows - row)
            sums[:count] = 0
            _multiply(
                weights,
                start,
                _address(words) + row * units_per_row * 4,
                count,
                groups,
                units_per_row // groups,
                _address(scales) + row * scales.shape[1] * 4,
                scales.shape[1] * 4,
                _address(sums),
                following,
                block_bytes if row == 0 else 0,
            )
            for r in range(count):
                if quantized:
                    for j in range(LANES):
                        sums[r, j] *= weight_scales[_at(n * LANES + j)]
                if mode == GELU:
                    for j in range(LANES):
                        sums[r, j] = _gelu(sums[r, j])
                if mode == ADD:
                    for j in range(LANES):
                        out[_at(row + r), _at(n * LANES + j)] += sums[r, j]
                else:
                    for j in range(LANES):
                        out[_at(row + r), _at(n * LANES + j)] = sums[r, j]


# -- attention --------------------------------------------------------------------------------------


_BLOCK = 128  # positions that are attended to at a time, and share a scale of the attention's weights


@njit(**_OPTIONS)
def _write(cache, scales, place, at, x, m, start, dim, is_key):
    """Put one position of one head, x[m, start : start + dim], into its place: keys or values, and scales."""
    quantized = cache.itemsize == 1
    inverse = _ONE
    if quantized:
        bits = np.int32(0)
        for d in range(dim):
            bits = max(bits, np.int32(_bits_of_float(x[_at(m), _at(start + d)]) & _BITS))
        largest = _float_of_bits(bits)
        scales[_at(place), _at(at)] = largest * np.float32(1.0 / 127.0)
        inverse = np.float32(127.0) / largest if largest > 0 else _ZERO
    pair = 2 if quantized else 1
    for d in range(dim):
        if is_key:  # 16 positions are the columns, dimensions are the inputs
            column, where, block = at % LANES, d, (at // LANES) * dim * LANES
        else:  # 16 dimensions are the columns, the 128 positions of a block are the inputs
            column, where = d % LANES, at % _BLOCK
            block = (at // _BLOCK * dim + d // LANES * LANES) * _BLOCK
        index = block + (where // pair) * pair * LANES + column * pair + where % pair
        number = x[_at(m), _at(start + d)]
        if quantized:
            cache[_at(place), _at(index)] = np.int8(np.floor(number * inverse + _HALF))
        else:
            cache[_at(place), _at(index)] = number


@njit(**_OPTIONS)
def _score(keys, key_scales, place, first, n, units, query, query_scale, scores, ahead):
    """scores[:n], rounded up to 16s, of a packed query against positions `first` to `first + n` of a place.

    `ahead` is the address of the keys that come next.
    """
    block_bytes = units * LANES * (2 if keys.itemsize == 1 else 4)
    here = _address(keys) + place * keys.shape[1] * keys.itemsize + first // LANES * block_bytes
    rounded = (n + LANES - 1) // LANES * LANES
    for j in range(rounded):
        scores[_at(j)] = _ZERO
    for j in range(0, rounded, LANES):
        offset, to = j // LANES * block_bytes, _address(scores) + j * 4
        step = block_bytes // units
        _tile(keys, 1, here + offset, query, 4, 1, units, query_scale, 0, to, ahead + offset, step)
    if keys.itemsize == 1:
        for j in range(rounded):
            scores[_at(j)] *= key_scales[_at(place), _at(first + j)]


@njit(**_OPTIONS)
def _mix(values, value_scales, place, first, n, dim, chances, words, scale, out, ahead):
    """Add chances[:n] times the values of positions `first` to `first + n` to `out`, the address of (dim,).

    `chances` has room for 128 and is changed; `ahead` as for `_score`.
    """
    quantized = values.itemsize == 1
    block_bytes = LANES * _BLOCK * values.itemsize
    here = _address(values) + (place * values.shape[1] + first * dim) * values.itemsize
    units, unit_bytes = n, LANES * 4
    if quantized:
        rounded = (n + LANES - 1) // LANES * LANES
        for t in range(n):
            chances[_at(t)] *= value_scales[_at(place), _at(first + t)]
        for t in range(n, rounded):
            chances[_at(t)] = _ZERO
        scale[0] = _quantize(chances, 0, rounded, words.view(np.int16))
        units, unit_bytes = rounded // 2, LANES * 2
    given = _address(words) if quantized else _address(chances)
    for block in range(dim // LANES):
        offset, to = block * block_bytes, out + block * LANES * 4
        there = ahead + block * units * unit_bytes
        _tile(values, 1, here + offset, given, 4, 1, units, _address(scale), 0, to, there, unit_bytes)


_TOP, _SUM = 0, 1  # of what was attended to so far: the highest score, and the sum of weights
_SCALE = 2


@njit(**_OPTIONS)
def _attend_to(
    keys,
    key_scales,
    values,
    value_scales,
    place,
    length,
    next_keys,
    next_values,
    query,
    state,
    room,
    out,
    m,
    start,
    dim,
):
    """Add positions of a place to what out[m, start : start + dim] has seen, weighted by e to their scores.

    Block by block, so that keys and values are read in one go (Milakov and Gimelshein 2018, "Online
    normalizer calculation for softmax"). `state` and `room` as in `_attend`; `next_keys` and
    `next_values` are the addresses of what will be read after these.
    """
    quantized = keys.itemsize == 1
    units = dim // 2 if quantized else dim
    place_bytes, block_bytes = keys.shape[1] * keys.itemsize, _BLOCK * dim * keys.itemsize
    scores, words = room[:_BLOCK], room[_BLOCK : 2 * _BLOCK]
    scale = state[_SCALE + 1 :]
    factor = _ONE / np.sqrt(np.float32(dim))
    mixed = _address(out) + (m * out.shape[1] + start) * 4
    for first in range(0, length, _BLOCK):
        n = min(_BLOCK, length - first)
        if first + _BLOCK < length:
            offset = place * place_bytes + first * dim * keys.itemsize + block_bytes
            ahead_keys, ahead_values = _address(keys) + offset, _address(values) + offset
        else:
            ahead_keys, ahead_values = next_keys, next_values
        _score(
            keys,
            key_scales,
            place,
            first,
            n,
            units,
            _address(query),
            _address(state) + 4 * _SCALE,
            scores,
            ahead_keys,
        )
        order = _ordered(state[_TOP])
        for t in range(n):
            order = max(order, _ordered(scores[_at(t)]))
        top = _float_of_bits(order ^ ((order >> np.int32(31)) & _BITS))
        shrink = _exp((state[_TOP] - top) * factor)
        total = state[_SUM] * shrink
        for t in range(n):
            weight = _exp((scores[_at(t)] - top) * factor)
            scores[_at(t)] = weight
            total += weight
        state[_TOP], state[_SUM] = top, total
        for d in range(dim):
            out[_at(m), _at(start + d)] *= shrink
        _mix(values, value_scales, place, first, n, dim, scores, words, scale, mixed, ahead_values)


@njit(**_OPTIONS)
def _attend(
    qkv,
    m,
    start,
    dim,
    cache,
    place,
    length,
    prefixes,
    before,
    before_length,
    following,
    query,
    state,
    room,
    out,
):
    """out[m, start : start + dim] of one head of one entry: over a shared prefix, then over its own steps.

    `following` is the place of what comes next. Working arrays, float32: `query` (dim,), `state`
    (4,), `room` (256,).
    """
    keys, key_scales, values, value_scales = cache
    p_keys, p_key_scales, p_values, p_value_scales = prefixes
    for d in range(dim):
        room[_at(d)] = qkv[_at(m), _at(start + d)]
        out[_at(m), _at(start + d)] = _ZERO
    if keys.itemsize == 1:
        state[_SCALE] = _quantize(room, 0, dim, query.view(np.int16))
    else:
        for d in range(dim):
            query[_at(d)] = room[_at(d)]
    state[_TOP], state[_SUM] = -np.inf, _ZERO
    place_bytes = keys.shape[1] * keys.itemsize
    next_keys, next_values = _address(keys) + place * place_bytes, _address(values) + place * place_bytes
    _attend_to(
        p_keys,
        p_key_scales,
        p_values,
        p_value_scales,
        before,
        before_length,
        next_keys,
        next_values,
        query,
        state,
        room,
        out,
        m,
        start,
        dim,
    )
    next_keys, next_values = (
        _address(keys) + following * place_bytes,
        _address(values) + following * place_bytes,
    )
    _attend_to(
        keys,
        key_scales,
        values,
        value_scales,
        place,
        length,
        next_keys,
        next_values,
        query,
        state,
        room,
        out,
        m,
        start,
        dim,
    )
    inverse = _ONE / state[_SUM]
    for d in range(dim):
        out[_at(m), _at(start + d)] *= inverse


@njit(inline="always", **_OPTIONS)
def _ordered(x):
    """An int32 that is larger when a float32 is."""
    bits = _bits_of_float(x)
    return np.int32(bits ^ ((bits >> np.int32(31)) & _BITS))


@njit(**_OPTIONS)
def _keep(qkv, heads, cache, own, positions, m):
    """Write an entry's keys and values."""
    keys, key_scales, values, value_scales = cache
    hidden = qkv.shape[1] // 3
    dim = hidden // heads
    for head in range(heads):
        place, start = own[m] + head, hidden + head * dim
        _write(keys, key_scales, place, positions[m], qkv, m, start, dim, True)
        _write(values, value_scales, place, positions[m], qkv, m, start + hidden, dim, False)


# -- sharing work between threads ---------------------------------------------------------------------
#
# A step is hundreds of short phases, each needing the one before. All threads run through all of them
# and take pieces of a phase as long as there are any; a phase is over when its pieces are done, whoever
# did them. So nobody waits for a thread that the system has put aside (on a machine that others use as
# well, waiting for it at each phase made a step a hundred times slower), and threads are started and
# joined once a step.


@intrinsic  # type: ignore[untyped-decorator]
def _add_atomically(_: Any, counters: Any, index: Any, amount: Any) -> Any:
    """Add to an int64 of an array; what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        where = builder.gep(array.data, [arguments[1]])
        return builder.atomic_rmw("add", where, arguments[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), codegen


_PIECES_DONE = 1  # a phase has two counters: pieces taken, pieces done
_SPINS = 2000  # before the processor is offered to others

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@njit(**_OPTIONS)
def _take(counters, phase):
    """The next piece of a phase that nobody has taken."""
    return _add_atomically(counters, 2 * phase, 1)


@njit(**_OPTIONS)
def _done(counters, phase):
    _add_atomically(counters, 2 * phase + _PIECES_DONE, 1)


@njit(**_OPTIONS)
def _await(counters, phase, pieces):
    """Until all pieces of a phase are done."""
    spins = 0
    while _add_atomically(counters, 2 * phase + _PIECES_DONE, 0) < pieces:
        spins += 1
        if spins > _SPINS:
            _sched_yield()


# -- the decoder --------------------------------------------------------------------------------------

_BLOCKS_AT_ONCE = 8  # of 16 outputs, in a piece of a product
_TASKS_AT_ONCE = 4  # heads of entries, in a piece of attention


@njit(**_OPTIONS)
def _product(counters, phase, weights, weight_scales, x, norm, group, words, scales, out, mode):
    """Two phases: lay x out, then multiply. The number of the next phase."""
    rows, blocks = x.shape[0], weights.shape[0]
    statistics = np.empty((rows, 2), np.float32)  # each thread finds its own: they are quickly found
    if norm.shape[0] > 0:
        for m in range(rows):
            statistics[m, 0], statistics[m, 1] = _statistics(x, m)
    room = np.empty(2 * group, np.float32)
    pieces = (rows + ROW_BLOCK - 1) // ROW_BLOCK * (x.shape[1] // group)
    while True:
        piece = _take(counters, phase)
        if piece >= pieces:
            break
        _lay_out(weights, x, norm, statistics, group, piece, room, words, scales)
        _done(counters, phase)
    _await(counters, phase, pieces)
    phase += 1
    pieces = (blocks + _BLOCKS_AT_ONCE - 1) // _BLOCKS_AT_ONCE
    while True:
        piece = _take(counters, phase)
        if piece >= pieces:
            break
        first = piece * _BLOCKS_AT_ONCE
        last = min(first + _BLOCKS_AT_ONCE, blocks)
        _linear(weights, weight_scales, words, scales, rows, group, out, mode, first, last)
        _done(counters, phase)
    _await(counters, phase, pieces)
    return phase + 1


@njit(**_OPTIONS)
def _attention(counters, phase, qkv, heads, cache, own, prefixes, before, positions, prefix_lengths, out):
    """Two phases: keep keys and values, then attend. The number of the next phase."""
    entries, hidden = out.shape
    while True:
        m = _take(counters, phase)
        if m >= entries:
            break
        _keep(qkv, heads, cache, own, positions, m)
        _done(counters, phase)
    _await(counters, phase, entries)
    phase += 1
    tasks = entries * heads
    pieces = (tasks + _TASKS_AT_ONCE - 1) // _TASKS_AT_ONCE
    dim = hidden // heads
    query, state = np.empty(dim, np.float32), np.empty(4, np.float32)
    room = np.empty(max(2 * _BLOCK, dim), np.float32)
    while True:
        piece = _take(counters, phase)
        if piece >= pieces:
            break
        for task in range(piece * _TASKS_AT_ONCE, min((piece + 1) * _TASKS_AT_ONCE, tasks)):
            head, m = task // entries, task % entries
            following = own[m + 1] + head if m + 1 < entries else own[0] + min(head + 1, heads - 1)
            _attend(
                qkv,
                m,
                head * dim,
                dim,
                cache,
                own[m] + head,
                positions[m] + 1,
                prefixes,
                before[m] + head,
                prefix_lengths[m],
                following,
                query,
                state,
                room,
                out,
            )
        _done(counters, phase)
    _await(counters, phase, pieces)
    return phase + 1


PHASES_PER_LAYER = 10


@njit(**_OPTIONS)
def _layers(
    counters, x, heads, matrices, norms, groups, cache, own, prefixes, before, positions, prefix_lengths, room
):
    """What each thread does; see `run_layers`."""
    qkv, qkv_scales, proj, proj_scales, up, up_scales, down, down_scales = matrices
    words, scales, wide_scales, qkv_out, attended, inner, no_norm = room
    phase = 0
    for n in range(qkv.shape[0]):
        for which in range(4):  # one call in a loop, not four: it takes a quarter of the time to compile
            if which == 0:
                weights, its, inputs, norm, out, mode = qkv[n], qkv_scales[n], x, norms[0][n], qkv_out, STORE
            elif which == 1:
                weights, its, inputs, norm, out, mode = proj[n], proj_scales[n], attended, no_norm, x, ADD
            elif which == 2:
                weights, its, inputs, norm, out, mode = up[n], up_scales[n], x, norms[1][n], inner, GELU
            else:
                weights, its, inputs, norm, out, mode = down[n], down_scales[n], inner, no_norm, x, ADD
            group, group_scales = (groups[1], wide_scales) if which == 3 else (groups[0], scales)
            phase = _product(
                counters, phase, weights, its, inputs, norm, group, words, group_scales, out, mode
            )
            if which == 0:
                phase = _attention(
                    counters,
                    phase,
                    qkv_out,
                    heads,
                    cache,
                    own[n],
                    prefixes,
                    before[n],
                    positions,
                    prefix_lengths,
                    attended,
                )


@njit(parallel=True, **_OPTIONS)
def run_layers(
    threads,
    counters,
    x,
    heads,
    matrices,
    norms,
    groups,
    cache,
    own,
    prefixes,
    before,
    positions,
    prefix_lengths,
    room,
):
    """Run entries through all layers, in place, and add their keys and values to the cache.

    An entry is one position of one row. Entries of one row must stand in order, after all earlier
    positions were run.

    Args:
        threads: how many share the work.
        counters: int64 zeros, 2 * `PHASES_PER_LAYER` per layer.
        x: float32, (entries, hidden): the inputs, then what the last layer gives.
        heads: of the attention.
        matrices: (qkv, scales, out, scales, up, scales, down, scales), see `pack_columns`; the
            matrices (layers, outputs / 16, inputs * 16), scales (layers, outputs).
        norms: of attention and feed-forward, (layers, 2, hidden): weight and bias.
        groups: inputs per group, for hidden and for feed-forward inputs.
        cache: (keys, scales, values, scales): (places, steps * dim) and (places, steps); a place is
            one head of one slot of one layer; steps a multiple of 128.
        own: int64, (layers, entries): the place of an entry's first head.
        prefixes: as `cache`, of the prefixes.
        before: int64, (layers, entries): the place of the first head of its prefix.
        positions: int64, (entries,): its position among its row's own steps.
        prefix_lengths: int64, (entries,): 0 for none.
        room: working arrays: words int32 (entries * most inputs,), scales float32 (entries, groups)
            for hidden and for feed-forward inputs, float32 (entries, 3 * hidden), (entries, hidden),
            (entries, wide), (0, 0).
    """
    for _ in prange(threads):
        _layers(
            counters,
            x,
            heads,
            matrices,
            norms,
            groups,
            cache,
            own,
            prefixes,
            before,
            positions,
            prefix_lengths,
            room,
        )


@njit(parallel=True, **_OPTIONS)
def run_product(threads, counters, weights, weight_scales, x, norm, group, words, scales, out, mode):
    """out (rows, outputs) of x (rows, inputs), normalized first; `counters` int64 zeros, four of them."""
    for _ in prange(threads):
        _product(counters, 0, weights, weight_scales, x, norm, group, words, scales, out, mode)


# -- layouts ----------------------------------------------------------------------------------------


def pack_columns(weights: np.ndarray) -> np.ndarray:
    """(outputs, inputs) to (outputs / 16, inputs * 16): inputs (int8: pairs) of 16 outputs together."""
    outputs, inputs = weights.shape
    pair = 2 if weights.dtype == np.int8 else 1
    split = weights.reshape(outputs // LANES, LANES, inputs // pair, pair)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(outputs // LANES, inputs * LANES)


def quantize_rows(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (outputs, inputs) to int8 and a scale per output, so that int8 * scale is near it."""
    scales = np.abs(weights).max(axis=1) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(weights * inverse[:, None]).astype(np.int8), scales.astype(np.float32)
