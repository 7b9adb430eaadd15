"""The arithmetic of the decoder on a CPU, compiled on first use by numba.

Everything rests on one micro-kernel, `_tile`: a few rows of activations times 16 columns of
weights, the columns side by side in memory, so that one load of weights serves all rows and each
row's sum stays in registers (the layout of Goto and van de Geijn 2008, "Anatomy of high-performance
matrix multiplication"). It is written in LLVM's portable vectors. Keys and values of the attention
are laid out so that the same kernel does their products. Where there is AMX, `_amx_tile` takes the
same int8 weights for five rows and more, and finds the same integers.

Three kinds, told apart by the type of the weights:
- float32: plain sums of products;
- uint8, for the model's int8 weights: one scale per output channel, activations int8 with a scale
  per row and group of inputs (`group`, 128 at most). Weights are stored 128 too large, as vpdpbusd
  wants them without a sign; the sum of a group begins with -128 times the sum of its activations.
  Products are added as integers within a group, groups in float32;
- int8, for keys and values: int16 queries and attention weights, as reading keys and values is what
  takes the time. LLVM makes vpmaddwd or vpdpwssd of it.

A row's sums run in one order whatever other rows stand beside it, so a result can't depend on its
neighbours, nor on the number of threads: that is what makes variations reproducible in any batch.

All of this stands in one file because numba's cache on disk looks at a function's own file only.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

LANES = 16  # output channels that stand side by side
# Rows that the micro-kernel can take. The most, times 16 sums, fill the registers: AVX-512 has 32 for 16
# numbers each, AVX2 a quarter of that.
# What numba compiles for.
_FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
_WIDE = "+avx512f" in _FEATURES
# vpdpbusd: four products of bytes and their sum in one instruction.
_DOT_BITS = 512 if "+avx512vnni" in _FEATURES else 256 if "+avxvnni," in f"{_FEATURES}," else 0
_QUAD_WORDS = 1 if _DOT_BITS else 2  # of 32 bits, that four activations take
_TILE_ROWS = (16, 12, 8, 6, 4, 3, 2, 1) if _WIDE else (6, 5, 4, 3, 2, 1)
# AMX: a matrix of 16 rows times one of 16 columns in one instruction. The system has to allow it, see `AMX`.
_HAS_AMX = _WIDE and "+amx-int8" in _FEATURES
ROW_BLOCK = 32 if _WIDE else 24  # rows of activations that are packed together: a few tiles


def _tiles_of(rows: int) -> int:
    return 1 + _tiles_of(rows - int(_TILE_OF[rows])) if rows else 0


# By a number of rows: those that the next tile takes, and how many tiles it takes in all.
_TILE_OF = np.array([max((n for n in _TILE_ROWS if n <= rows), default=0) for rows in range(ROW_BLOCK + 1)])
_TILES_OF = np.array([_tiles_of(rows) for rows in range(ROW_BLOCK + 1)])

# No fast math: what the compiler may reorder or fuse it reorders by what stands around, and the same function
# then finds other bits when it was just compiled than when it comes from numba's cache. Sums are in the order
# of `_sum`, products and sums fused where it says `_fma`.
# Division checks nothing: an exception in a loop keeps it from the vector units.
_OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy"}

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
    weights at `w`, units in a row (a unit is one input, for int8 two, for uint8 four); activations
    at `a`, one 32-bit word per row (uint8: `_QUAD_WORDS`), `a_step` from unit to unit; `groups`
    groups of `units` units (a multiple of 8 for int8, of 4 for uint8); what the groups are scaled by
    at `s`, `s_step` from row to row (not for float32). At `ahead`, `ahead_step` per unit, stands
    what will be needed next.
    """
    emit = {types.float32: _FloatTile, types.int8: _PairTile, types.uint8: _QuadTile}[weights.dtype]
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
        begins = [self.begin(row, index) for row in range(self.rows)]
        b.branch(loop)
        b.position_at_end(loop)
        unit = b.phi(_I64)
        unit.add_incoming(_I64(0), before)
        carried = [[b.phi(self.SUM) for _ in range(self.rows)] for _ in range(self.chains)]
        sums = []
        for chain, its in enumerate(carried):
            here = b.add(b.add(first, unit), _I64(chain))
            sums.append(self.unit(here, its))
            if chain * self.WEIGHT_BYTES % 64 == 0:
                _emit_prefetch(b, b.add(self.ahead, b.mul(here, self.ahead_step)))
        following = b.add(unit, _I64(self.chains))
        unit.add_incoming(following, loop)
        zero = ir.Constant(self.SUM, [0] * LANES)
        for chain, (its, values) in enumerate(zip(carried, sums, strict=True)):
            for phi, value, begin in zip(its, values, begins, strict=True):
                phi.add_incoming(zero if chain else begin, before)
                phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, self.units), loop, after)
        b.position_at_end(after)
        return [self.total(list(its)) for its in zip(*sums, strict=True)]

    def unit(self, unit: Any, sums: list[Any]) -> list[Any]:
        b = self.b
        weights = self.load_weights(self.address(self.w, b.mul(unit, _I64(self.WEIGHT_BYTES)), _I8))
        word = b.add(self.a, b.mul(unit, self.a_step))
        return [
            self.add_product(weights, b.add(word, _I64(4 * row)), total) for row, total in enumerate(sums)
        ]

    def word(self, address: Any) -> Any:
        """32 bits of activations."""
        return self.b.load(self.address(address, _I64(0), _I32), align=4)

    def begin(self, row: int, group: Any) -> Any:
        """What the sum of a group begins with."""
        return ir.Constant(self.SUM, [0] * LANES)

    def load_weights(self, pointer: Any) -> Any:
        raise NotImplementedError

    def add_product(self, weights: Any, word: Any, total: Any) -> Any:
        """The sum with the products of a unit's weights and activations, those at the address `word`."""
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
        return _emit_fma(self.b, x, y, z)

    def everywhere(self, scalar: Any) -> Any:
        return _everywhere(self.b, scalar)


class _FloatTile(_Tile):
    """float32; sums are in one order, so there is one chain."""

    CHAINS, WEIGHT_BYTES = 1, 4 * LANES

    @property
    def SUM(self) -> Any:  # noqa: N802
        return _vector(_F32)

    def load_weights(self, pointer: Any) -> Any:
        return self.b.load(self.b.bitcast(pointer, _vector(_F32).as_pointer()), align=4)

    def add_product(self, weights: Any, word: Any, total: Any) -> Any:
        return self.fma(weights, self.everywhere(self.b.bitcast(self.word(word), _F32)), total)

    def total(self, sums: list[Any]) -> Any:
        (only,) = sums
        return only

    def add_group(self, total: Any, value: Any, row: int, group: Any) -> Any:
        return self.b.fadd(total, value)


class _IntegerTile(_Tile):
    """Sums of integers are the same in any order."""

    SCALE_BYTES: int  # from group to group

    @property
    def SUM(self) -> Any:  # noqa: N802
        return _vector(_I32)

    def total(self, sums: list[Any]) -> Any:
        return functools.reduce(self.b.add, sums)

    def scale(self, row: int, group: Any) -> Any:
        """The address of a group's scale."""
        b = self.b
        return b.add(self.s, b.add(b.mul(_I64(row), self.s_step), b.mul(group, _I64(self.SCALE_BYTES))))

    def add_group(self, total: Any, value: Any, row: int, group: Any) -> Any:
        scale = self.b.load(self.address(self.scale(row, group), _I64(0), _F32), align=4)
        return self.fma(self.b.sitofp(value, _vector(_F32)), self.everywhere(scale), total)

    def add_pairs(self, weights: Any, word: Any, total: Any) -> Any:
        """Adds both products of pairs of int16: in this shape LLVM knows multiply-and-add instructions."""
        b, wide = self.b, ir.VectorType(_I32, 2 * LANES)
        pair = b.bitcast(self.everywhere(word), ir.VectorType(_I16, 2 * LANES))
        products = b.mul(b.sext(weights, wide), b.sext(pair, wide))
        nothing = ir.Constant(wide, ir.Undefined)
        even, odd = (
            b.shuffle_vector(products, nothing, ir.Constant(_vector(_I32), list(range(start, 2 * LANES, 2))))
            for start in (0, 1)
        )
        return b.add(total, b.add(even, odd))


class _PairTile(_IntegerTile):
    """int8 weights, int16 activations: two inputs per column side by side."""

    CHAINS, WEIGHT_BYTES, SCALE_BYTES = 8, 2 * LANES, 4

    def load_weights(self, pointer: Any) -> Any:
        pairs = ir.VectorType(_I8, 2 * LANES)
        loaded = self.b.load(self.b.bitcast(pointer, pairs.as_pointer()), align=1)
        return self.b.sext(loaded, ir.VectorType(_I16, 2 * LANES))

    def add_product(self, weights: Any, word: Any, total: Any) -> Any:
        return self.add_pairs(weights, self.word(word), total)


class _QuadTile(_IntegerTile):
    """uint8 weights, 128 more than they mean, and int8 activations: four inputs per column side by side.

    Beside each group's scale stands what its sum begins with: -128 times the sum of its activations.
    Where there is no vpdpbusd, activations are pairs of int16: the first and third of four, then the
    others, as the weights are taken apart.
    """

    CHAINS, WEIGHT_BYTES, SCALE_BYTES = 4, 4 * LANES, 8

    def begin(self, row: int, group: Any) -> Any:
        return self.everywhere(self.b.load(self.address(self.scale(row, group), _I64(4), _I32), align=4))

    def load_weights(self, pointer: Any) -> Any:
        return self.b.load(self.b.bitcast(pointer, _vector(_I32).as_pointer()), align=4)

    def add_product(self, weights: Any, word: Any, total: Any) -> Any:
        b = self.b
        if _DOT_BITS:
            return self.dot(weights, self.everywhere(self.word(word)), total)
        halves = ir.VectorType(_I16, 2 * LANES)
        both = b.bitcast(weights, halves)
        even = b.and_(both, ir.Constant(halves, [0xFF] * (2 * LANES)))
        odd = b.lshr(both, ir.Constant(halves, [8] * (2 * LANES)))
        others = b.add(word, b.lshr(self.a_step, _I64(1)))
        return self.add_pairs(odd, self.word(others), self.add_pairs(even, self.word(word), total))

    def dot(self, weights: Any, words: Any, total: Any) -> Any:
        lanes = _DOT_BITS // 32
        kind, name = ir.VectorType(_I32, lanes), f"llvm.x86.avx512.vpdpbusd.{_DOT_BITS}"
        bytes_ = ir.VectorType(_I8, 4 * lanes)
        function = self.declare(name, kind, [kind, bytes_, bytes_])
        parts = []
        for start in range(0, LANES, lanes):
            which = ir.Constant(kind, list(range(start, start + lanes)))
            total_, weights_, words_ = (
                self.b.shuffle_vector(vector, vector, which) for vector in (total, weights, words)
            )
            parts.append(
                self.b.call(
                    function, [total_, self.b.bitcast(weights_, bytes_), self.b.bitcast(words_, bytes_)]
                )
            )
        if len(parts) == 1:
            return parts[0]
        return self.b.shuffle_vector(*parts, ir.Constant(_vector(_I32), list(range(LANES))))


@intrinsic  # type: ignore[untyped-decorator]
def _amx_tile(
    _: Any,
    rows: Any,
    w: Any,
    w_step: Any,
    a: Any,
    a_step: Any,
    groups: Any,
    units: Any,
    s: Any,
    s_step: Any,
    out: Any,
    out_step: Any,
    room: Any,
    ahead: Any,
) -> Any:
    """As `_tile` of uint8 weights, by AMX: `rows` rows (32 at most) times two blocks of 16 columns.

    A unit is 64 inputs here. Weights of the blocks at `w` and `w_step` bytes further; activations are
    int8 at `a`, `a_step` from row to row, with rows to be read, whatever they hold, up to a multiple
    of 16; the sums of a block, (rows, 16), at `out` and `out_step` further; 4096 bytes of working
    space at `room`; `ahead` is where weights as many stand that will be needed next, or 0.
    """
    signature = types.void(*[types.intp] * 13)

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        if _HAS_AMX:
            wide = builder.icmp_signed(">", arguments[0], _I64(LANES))
            with builder.if_else(wide) as (two, one):
                with two:
                    _AmxTile(builder, 2, *arguments).build()
                with one:
                    _AmxTile(builder, 1, *arguments).build()
        return context.get_dummy_value()

    return signature, codegen


class _AmxTile(_Tile):
    """Of the eight registers of 16 * 64 bytes, four hold sums, two activations, two weights."""

    def __init__(self, builder: Any, high: int, *arguments: Any) -> None:
        self.b, self.high = builder, high  # in 16 rows
        self.rows, self.w, self.w_step, self.a, self.a_step, self.groups, self.units = arguments[:7]
        self.s, self.s_step, self.out, self.out_step, self.room, self.ahead = arguments[7:]
        self.blocks = range(2)

    def build(self) -> None:
        b = self.b
        with cgutils.for_range(b, self.groups) as group:
            for block in self.blocks:
                for part in range(self.high):
                    self.amx("tilezero", self.sums(block, part))
            with cgutils.for_range(b, self.units) as unit:
                self.add_products(b.add(b.mul(group.index, self.units), unit.index))
            for block in self.blocks:
                for part in range(self.high):
                    to = self.address(self.room, _I64(1024 * (2 * block + part)), _I8)
                    self.amx("tilestored64", self.sums(block, part), to, _I64(64))
            with cgutils.for_range(b, self.rows) as row:
                self.add_group_of(row.index, group.index)

    def add_products(self, unit: Any) -> None:
        b = self.b
        for part in range(self.high):
            rows = b.add(b.mul(unit, _I64(64)), b.mul(self.a_step, _I64(16 * part)))
            self.amx("tileloadd64", _I8(4 + part), self.address(self.a, rows, _I8), self.a_step)
        for block in self.blocks:
            columns = b.add(b.mul(unit, _I64(1024)), b.mul(self.w_step, _I64(block)))
            self.amx("tileloadd64", _I8(6 + block), self.address(self.w, columns, _I8), _I64(64))
            for part in range(self.high):
                self.amx("tdpbsud", self.sums(block, part), _I8(4 + part), _I8(6 + block))
            with b.if_then(b.icmp_signed("!=", self.ahead, _I64(0))):
                for line in range(0, 1024, 64):
                    _emit_prefetch(b, b.add(self.ahead, b.add(columns, _I64(line))))

    def add_group_of(self, row: Any, group: Any) -> None:
        """What `_QuadTile` does with the sums of a group."""
        b = self.b
        at = b.add(self.s, b.add(b.mul(row, self.s_step), b.mul(group, _I64(_QuadTile.SCALE_BYTES))))
        scale = self.everywhere(b.load(self.address(at, _I64(0), _F32), align=4))
        begin = self.everywhere(b.load(self.address(at, _I64(4), _I32), align=4))
        for block in self.blocks:
            found = b.add(b.mul(row, _I64(4 * LANES)), _I64(2048 * block))
            products = b.load(self.address(self.room, found, _vector(_I32)), align=4)
            total = b.add(b.mul(row, _I64(4 * LANES)), b.mul(self.out_step, _I64(block)))
            to = self.address(self.out, total, _vector(_F32))
            value = b.sitofp(b.add(products, begin), _vector(_F32))
            b.store(self.fma(value, scale, b.load(to, align=4)), to, align=4)

    @staticmethod
    def sums(block: int, part: int) -> Any:
        return _I8(2 * block + part)

    def amx(self, name: str, *arguments: Any) -> None:
        kinds = [argument.type for argument in arguments]
        self.b.call(self.declare(f"llvm.x86.{name}", ir.VoidType(), kinds), arguments)


# Eight registers of 16 rows of 64 bytes, as ldtilecfg wants to be told.
AMX = np.zeros(64 if _HAS_AMX else 0, np.uint8)
if _HAS_AMX:
    AMX[0] = 1
    AMX[16:32:2], AMX[48:56] = 64, 16


@intrinsic  # type: ignore[untyped-decorator]
def _begin_amx(_: Any, configuration: Any) -> Any:
    """Make AMX's registers ready, as the 64 bytes at an address say; for this thread."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        if _HAS_AMX:
            kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer()])
            load = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.ldtilecfg")
            builder.call(load, [builder.inttoptr(arguments[0], _I8.as_pointer())])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _end_amx(_: Any) -> Any:
    """Let go of AMX's registers: the system needn't save them any more."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        if _HAS_AMX:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.tilerelease"), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _emit_prefetch(builder: Any, address: Any) -> None:
    """For reading, into the second cache, data."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [builder.inttoptr(address, _I8.as_pointer()), _I32(0), _I32(2), _I32(1)])


def _emit_fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once: of float32, or of vectors of them."""
    kind = ir.FunctionType(x.type, [x.type] * 3)
    name = f"llvm.fma.v{LANES}f32" if x.type == _vector(_F32) else "llvm.fma.f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [x, y, z])


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
def _fma(_: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of float32, rounded once."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return _emit_fma(builder, *arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _sum(_: Any, address: Any, n: Any) -> Any:
    """Of n float32, a multiple of 16: 16 sums of every sixteenth, then halves added to halves."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        address, n = arguments
        return _emit_sum(builder, address, n, builder.fadd)

    return types.float32(types.intp, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _sum_of_squares(_: Any, address: Any, n: Any, mean: Any) -> Any:
    """As `_sum`, of the squares of what the numbers differ from the mean by."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        address, n, mean = arguments
        everywhere = _everywhere(builder, mean)

        def add(total: Any, numbers: Any) -> Any:
            difference = builder.fsub(numbers, everywhere)
            return _emit_fma(builder, difference, difference, total)

        return _emit_sum(builder, address, n, add)

    return types.float32(types.intp, types.intp, types.float32), codegen


def _emit_sum(builder: Any, address: Any, n: Any, add: Any) -> Any:
    """16 sums, `add(sums, numbers)` of them from one 16 numbers to the next, in one."""
    kind = _vector(_F32)
    total = cgutils.alloca_once_value(builder, ir.Constant(kind, [0.0] * LANES))
    with cgutils.for_range(builder, builder.udiv(n, _I64(LANES))) as turn:
        here = builder.add(address, builder.mul(turn.index, _I64(4 * LANES)))
        numbers = builder.load(builder.inttoptr(here, kind.as_pointer()), align=4)
        builder.store(add(builder.load(total), numbers), total)
    value, lanes = builder.load(total), LANES
    while lanes > 1:
        lanes //= 2
        halves = (
            builder.shuffle_vector(
                value, value, ir.Constant(ir.VectorType(_I32, lanes), list(range(start, start + lanes)))
            )
            for start in (0, lanes)
        )
        value = builder.fadd(*halves)
    return builder.extract_element(value, _I32(0))


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(_: Any, address: Any) -> Any:
    """Call for 64 bytes that will be read."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        _emit_prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _address(_: Any, array: Any) -> Any:
    """Where an array's data begins."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(held.data, _I64)

    return types.intp(array), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _borrowed(_: Any, array: Any) -> Any:
    """The same array, without its count of references; somebody else has to keep it.

    Slices, tuples and calls count references in memory that all threads share: with two of them, an
    attention over few positions took twice as long.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        held.meminfo = cgutils.get_null_value(held.meminfo.type)
        held.parent = cgutils.get_null_value(held.parent.type)
        return held._getvalue()

    return array(array), codegen


# -- functions of one number ------------------------------------------------------------------------

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E2, _E3, _E4, _E5, _E6 = (np.float32(1 / n) for n in (2, 6, 24, 120, 720))
_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_LEAST = np.float32(-80.0)  # far from numbers too small for full speed, also when multiplied


@njit(inline="always", **_OPTIONS)
def _exp(x):
    """e**x of a float32 x <= 0, to about 1e-7: 2**n times the series of a rest below ln(2)/2.

    NaN gives what the least number gives.
    """
    x = x if x > _LEAST else _LEAST
    n = np.floor(_fma(x, _LOG2_E, _HALF))
    r = _fma(n, -_LN2_LOW, _fma(n, -_LN2_HIGH, x))
    series = _fma(r, _fma(r, _fma(r, _E6, _E5), _E4), _E3)
    series = _fma(r, _fma(r, _fma(r, series, _E2), _ONE), _ONE)
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
    t = _ONE / _fma(_ERF_P, z, _ONE)
    series = _fma(t, _fma(t, _fma(t, _fma(t, _A5, _A4), _A3), _A2), _A1)
    tail = t * series * _exp(-z * z)
    return _fma(size * _HALF, -tail, (x + size) * _HALF)


_EPSILON = np.float32(1e-5)  # torch.nn.LayerNorm's

# An index of an array that is known not to be negative: numba then looks for no end to count from, and
# loops become vectors (eight times as quick).
_at = np.uint64


@njit(**_OPTIONS)
def _statistics(x, m):
    """Mean of a row, and what its layer normalization multiplies by."""
    n, row = x.shape[1], _address(x) + m * x.shape[1] * 4
    mean = _sum(row, n) / np.float32(n)
    variance = _sum_of_squares(row, n, mean) / np.float32(n)
    return mean, _ONE / np.sqrt(variance + _EPSILON)


# -- products ---------------------------------------------------------------------------------------


@njit(**_OPTIONS)
def _multiply(weights, w, a, rows, groups, units, s, s_step, out, ahead, ahead_bytes):
    """(rows, 16) at `out` += activations times 16 columns.

    `a`: words, (groups * units, rows) and more groups; `ahead`: the next columns, `ahead_bytes` of them.
    """
    word_bytes = rows * 4 * (_QUAD_WORDS if weights.itemsize == 1 else 1)  # of a unit
    tiles = _TILES_OF[rows]
    step = ahead_bytes // (groups * units * tiles)
    row = 0
    for tile in range(tiles):
        count = _TILE_OF[rows - row]
        _tile(
            weights,
            count,
            w,
            a + row * 4,
            word_bytes,
            groups,
            units,
            s + row * s_step,
            s_step,
            out + row * LANES * 4,
            ahead + tile * groups * units * step,
            step,
        )
        row += count


_BITS = np.int32(0x7FFFFFFF)  # of a float32, without the sign
_NOTHING = np.float32(1e-30)  # what is smaller counts as zero


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
    inverse = np.float32(32767.0) / largest if largest > _NOTHING else _ZERO
    for k in range(n):
        out[_at(k)] = np.int16(np.floor(_fma(x[_at(x_from + k)], inverse, _HALF)))
    return largest * np.float32(1.0 / 32767.0)


@njit(**_OPTIONS)
def _quantize_to_bytes(x, x_from, n, out):
    """n numbers to int8, out[:n]; their scale and their sum."""
    largest = _largest(x, x_from, n)
    inverse = np.float32(127.0) / largest if largest > _NOTHING else _ZERO
    total = np.int32(0)
    for k in range(n):
        number = np.int32(np.floor(_fma(x[_at(x_from + k)], inverse, _HALF)))
        out[_at(k)] = np.int8(number)
        total += number
    return largest * np.float32(1.0 / 127.0), total


@njit(**_OPTIONS)
def _place_pairs(numbers, n, first, step, laid):
    """n int8 as int16 pairs, `step` words from pair to pair: of four the first and third, then the others."""
    for k in range(n // 4):
        for which in range(4):
            word = first + (2 * k + which % 2) * step
            laid[_at(2 * word + which // 2)] = numbers[_at(4 * k + which)]


@njit(**_OPTIONS)
def _lay_out(weights, x, norm, statistics, group, piece, room, words, scales, by_amx):
    """Lay one group of inputs of a block of rows of activations out for `_linear` with these weights.

    Words come in blocks of `ROW_BLOCK` rows, (inputs or quads, rows); for AMX, they are int8, (rows,
    inputs). `piece` counts groups within blocks.
    `norm`, float32 (2, inputs), is the weight and bias of a layer normalization that comes first,
    with the rows' `_statistics`, (rows, 2); (0, 0) for none. `room` is float32, 2 * group: a group has
    128 inputs at most.
    """
    inputs = x.shape[1]
    groups = inputs // group
    block, g = piece // groups, piece % groups
    start, first_row = g * group, block * ROW_BLOCK
    rows = min(ROW_BLOCK, x.shape[0] - first_row)
    small = room[group:].view(np.int8)
    quads = room[group:].view(np.int32)
    laid, floats, begins = words.view(np.int16), words.view(np.float32), scales.view(np.int32)
    for r in range(rows):
        m = first_row + r
        if norm.shape[0] == 0:
            for k in range(group):
                room[_at(k)] = x[_at(m), _at(start + k)]
        else:
            mean, factor = statistics[_at(m), 0], statistics[_at(m), 1]
            for k in range(group):
                normal = (x[_at(m), _at(start + k)] - mean) * factor
                room[_at(k)] = _fma(normal, norm[0, _at(start + k)], norm[1, _at(start + k)])
        if weights.itemsize != 1:
            first = first_row * inputs + start * rows + r
            for k in range(group):
                floats[_at(first + k * rows)] = room[_at(k)]
            continue
        scale, total = _quantize_to_bytes(room, 0, group, small)
        scales[_at(m), _at(2 * g)] = scale
        begins[_at(m), _at(2 * g + 1)] = np.int32(-128) * total
        first = (first_row * inputs + start * rows) // 4 * _QUAD_WORDS + r
        if by_amx or _QUAD_WORDS == 1:
            step = rows
            if by_amx:
                first, step = (m * inputs + start) // 4, 1
            for k in range(group // 4):
                words[_at(first + k * step)] = quads[_at(k)]
        else:
            _place_pairs(small, group, first, rows, laid)


_CHUNK_BYTES = 8192  # of weights of 16 outputs: with as many of activations, well within the first cache
STORE, ADD, GELU = 0, 1, 2  # what a product does with what it finds
_AMX_INPUTS, _AMX_LEAST_ROWS = 64, 5  # to a unit; with fewer rows the other way is as quick
_AMX_ROOM = 4 * 16 * LANES  # float32: what four registers hold


@njit(**_OPTIONS)
def _finish(sums, count, weight_scales, first, quantized, out, row, mode):
    """What becomes of the sums of 16 outputs, `first` and following, of `count` rows."""
    for r in range(count):
        if quantized:
            for j in range(LANES):
                sums[r, j] *= weight_scales[_at(first + j)]
        if mode == GELU:
            for j in range(LANES):
                sums[r, j] = _gelu(sums[r, j])
        if mode == ADD:
            for j in range(LANES):
                out[_at(row + r), _at(first + j)] += sums[r, j]
        else:
            for j in range(LANES):
                out[_at(row + r), _at(first + j)] = sums[r, j]


@njit(**_OPTIONS)
def _linear(weights, weight_scales, words, scales, rows, group, out, mode, first, last, sums):
    """Blocks `first` to `last` of out (rows, outputs): = or += activations times weights, or GELU of it.

    `weights`: (outputs / 16, inputs * 16), see `pack_columns`; `weight_scales` (outputs,) for int8.
    With more rows than a tile has, inputs are taken in chunks, so that those of a block of
    rows stay in the first cache for all columns. `sums` is float32, (blocks, `ROW_BLOCK`, 16).
    """
    inputs = weights.shape[1] // LANES
    quantized = weights.itemsize == 1
    units = group // 4 if quantized else group
    groups = inputs // group
    word_bytes = 4 * (_QUAD_WORDS if quantized else 1)
    block_bytes, group_bytes = weights.shape[1] * weights.itemsize, units * 4 * LANES
    chunk = groups if rows <= _TILE_ROWS[0] else max(1, _CHUNK_BYTES // group_bytes)
    for row in range(0, rows, ROW_BLOCK):
        count = min(ROW_BLOCK, rows - row)
        sums[: last - first] = 0
        its_words = _address(words) + row * groups * units * word_bytes
        its_scales = _address(scales) + row * scales.shape[1] * 4
        for g in range(0, groups, chunk):
            n_groups = min(chunk, groups - g)
            for n in range(first, last):
                start = _address(weights) + n * block_bytes + g * group_bytes
                following = start  # what comes next: the next block, or the next chunk of the first
                if n + 1 < last or (g + chunk >= groups and n + 1 < weights.shape[0]):
                    following = start + block_bytes
                elif g + chunk < groups:
                    following = start - (last - 1 - first) * block_bytes + chunk * group_bytes
                _multiply(
                    weights,
                    start,
                    its_words + g * units * word_bytes * count,
                    count,
                    n_groups,
                    units,
                    its_scales + g * 8,
                    scales.shape[1] * 4,
                    _address(sums) + (n - first) * ROW_BLOCK * LANES * 4,
                    following,
                    n_groups * group_bytes if row == 0 else 0,
                )
        for n in range(first, last):
            _finish(sums[n - first], count, weight_scales, n * LANES, quantized, out, row, mode)


@njit(**_OPTIONS)
def _linear_by_amx(weights, weight_scales, words, scales, rows, group, out, mode, first, last, sums, room):
    """As `_linear`, for int8 laid out for AMX and an even number of blocks; `room` is float32, (1024,)."""
    inputs = weights.shape[1] // LANES
    for row in range(0, rows, ROW_BLOCK):
        count = min(ROW_BLOCK, rows - row)
        sums[: last - first] = 0
        for n in range(first, last, 2):
            start = _address(weights) + n * weights.shape[1]
            _amx_tile(
                count,
                start,
                weights.shape[1],
                _address(words) + row * inputs,
                inputs,
                inputs // group,
                group // _AMX_INPUTS,
                _address(scales) + row * scales.shape[1] * 4,
                scales.shape[1] * 4,
                _address(sums) + (n - first) * ROW_BLOCK * LANES * 4,
                ROW_BLOCK * LANES * 4,
                _address(room),
                start + 2 * weights.shape[1] if row == 0 and n + 2 < weights.shape[0] else 0,
            )
        for n in range(first, last):
            _finish(sums[n - first], count, weight_scales, n * LANES, True, out, row, mode)


# -- attention --------------------------------------------------------------------------------------


_BLOCK = 128  # positions that are attended to at a time, and share a scale of the attention's weights


@njit(inline="always", **_OPTIONS)
def _half(x):
    """The first 16 bits of a float32 x >= 0, a bfloat16, rounded up: what is divided by it stays in range."""
    return np.uint16((_bits_of_float(x) + np.int32(0xFFFF)) >> np.int32(16))


@njit(inline="always", **_OPTIONS)
def _whole(half):
    """The float32 that a bfloat16's 16 bits are."""
    return _float_of_bits(np.int32(half) << np.int32(16))


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
        half = _half(largest * np.float32(1.0 / 127.0)) if largest > _NOTHING else np.uint16(0)
        scales[_at(place), _at(at)] = half
        inverse = _ONE / _whole(half) if half > 0 else _ZERO
    pair = 2 if quantized else 1
    if is_key:  # 16 positions are the columns, dimensions are the inputs
        first = at // LANES * dim * LANES + at % LANES * pair
        inner, outer = pair, pair * LANES
    else:  # 16 dimensions are the columns, the 128 positions of a block are the inputs
        where = at % _BLOCK
        first = at // _BLOCK * dim * _BLOCK + where // pair * pair * LANES + where % pair
        inner, outer = LANES, _BLOCK * LANES
    step = 1 if is_key else pair
    for begin in range(0, dim, inner):
        index = first + begin // inner * outer
        for d in range(begin, begin + inner):
            number = x[_at(m), _at(start + d)]
            to = _at(index + (d - begin) * step)
            if quantized:
                cache[_at(place), to] = np.int8(np.floor(_fma(number, inverse, _HALF)))
            else:
                cache[_at(place), to] = number


@njit(inline="always", **_OPTIONS)
def _ordered(x):
    """An int32 that is larger when a float32 is."""
    bits = _bits_of_float(x)
    return np.int32(bits ^ ((bits >> np.int32(31)) & _BITS))


_TOGETHER = 16 if _WIDE else 12  # entries whose attention is worked out together: their keys are read once
_TOP, _SUM = 0, 1  # of what was attended to so far: the highest score, and the sum of weights
_QUERY_SCALE, _CHANCES_SCALE = 2, 3
_STATE = 4  # numbers of an entry


@njit(**_OPTIONS)
def _times_rows(weights, rows, w, a, a_step, units, s, s_step, out, ahead, ahead_step):
    """`_tile` of one group, for any number of rows up to `ROW_BLOCK`."""
    row = 0
    while row < rows:
        count = _TILE_OF[rows - row]
        first = row * LANES * 4
        its = s + row * s_step
        _tile(weights, count, w, a + row * 4, a_step, 1, units, its, s_step, out + first, ahead, ahead_step)
        row += count


@njit(**_OPTIONS)
def _score(keys, place, first, n, units, query, query_step, scales, rows, scores, ahead):
    """scores (n / 16, rows, 16) of packed queries against positions `first` to `first + n` of a place.

    Queries are at the address `query`, `query_step` from unit to unit, their scales at `scales`;
    `ahead` is the address of the keys that come next.
    """
    block_bytes = units * LANES * (2 if keys.itemsize == 1 else 4)
    here = _address(keys) + place * keys.shape[1] * keys.itemsize + first // LANES * block_bytes
    rounded = (n + LANES - 1) // LANES * LANES
    for j in range(rounded * rows):
        scores[_at(j)] = _ZERO
    for j in range(0, rounded, LANES):
        offset, to = j // LANES * block_bytes, _address(scores) + j * rows * 4
        step = block_bytes // units
        _times_rows(
            keys, rows, here + offset, query, query_step, units, scales, 4 * _STATE, to, ahead + offset, step
        )


@njit(**_OPTIONS)
def _gather(scores, n, rows, r, out):
    """Row r of (n, rows, 16) scores."""
    for j in range(n):
        for k in range(LANES):
            out[_at(j * LANES + k)] = scores[_at((j * rows + r) * LANES + k)]


@njit(**_OPTIONS)
def _soften(chances, n, dim, entry, state):
    """Make weights of n scores; what those of earlier positions are to be multiplied by."""
    factor = _ONE / np.sqrt(np.float32(dim))
    before = state[_at(entry), _at(_TOP)]
    order = _ordered(before)
    for t in range(n):
        order = max(order, _ordered(chances[_at(t)]))
    top = _float_of_bits(order ^ ((order >> np.int32(31)) & _BITS))
    shrink = _exp((before - top) * factor)
    for t in range(n):
        chances[_at(t)] = _exp((chances[_at(t)] - top) * factor)
    state[_at(entry), _at(_TOP)] = top
    state[_at(entry), _at(_SUM)] = _fma(state[_at(entry), _at(_SUM)], shrink, _sum(_address(chances), n))
    return shrink


@njit(**_OPTIONS)
def _place_column(words, filled, n, columns, column, table):
    """Words become a column of a table of n rows, zeros after the first `filled`.

    The words of the only column stand in the table already.
    """
    if columns > 1:
        for k in range(filled):
            table[_at(k * columns + column)] = words[_at(k)]
    for k in range(filled, n):
        table[_at(k * columns + column)] = 0


@njit(**_OPTIONS)
def _weigh(cache, place, first, n, most, scores, rows, r, entry, state, room, words, mixed):
    """Make weights of row `r` of the scores, n of them, and words for `_mix`: zeros up to `most`.

    What an entry has seen so far, mixed (outputs / 16, entries, 16), is weighed anew by what is seen now.
    """
    _, key_scales, values, value_scales = cache
    quantized = values.itemsize == 1
    inner = words.view(np.int32)
    units = (most + LANES - 1) // LANES * (LANES // 2) if quantized else most
    if n <= 0:  # an entry that comes before these positions
        _place_column(inner, 0, units, rows, r, inner)
        state[_at(entry), _at(_CHANCES_SCALE)] = _ZERO
        return
    chances = room[:_BLOCK]
    rounded = (n + LANES - 1) // LANES * LANES
    _gather(scores, rounded // LANES, rows, r, chances)
    if quantized:
        for t in range(rounded):
            chances[_at(t)] *= _whole(key_scales[_at(place), _at(first + t)])
    for t in range(n, rounded):  # so that loops are over whole vectors; in a sum with 1 they don't count
        chances[_at(t)] = -np.inf
    shrink = _soften(chances, rounded, mixed.shape[0] * LANES, entry, state)
    for block in range(mixed.shape[0]):
        for k in range(LANES):
            mixed[_at(block), _at(entry), _at(k)] *= shrink
    line = words if rows == 1 else room[_BLOCK:]
    if quantized:
        for t in range(rounded):
            chances[_at(t)] *= _whole(value_scales[_at(place), _at(first + t)])
        for t in range(n, rounded):
            chances[_at(t)] = _ZERO
        state[_at(entry), _at(_CHANCES_SCALE)] = _quantize(chances, 0, rounded, line.view(np.int16))
        _place_column(line.view(np.int32), rounded // 2, units, rows, r, inner)
    else:
        for t in range(n):
            line[_at(t)] = chances[_at(t)]
        _place_column(line.view(np.int32), n, units, rows, r, inner)


@njit(**_OPTIONS)
def _mix(values, place, first, n, words, scales, rows, mixed, entry, ahead):
    """Add what rows of words make of the values of positions `first` to `first + n` to those of `mixed`.

    The rows begin with `entry`; `ahead` as for `_score`.
    """
    block_bytes = LANES * _BLOCK * values.itemsize
    dim = mixed.shape[0] * LANES
    here = _address(values) + (place * values.shape[1] + first * dim) * values.itemsize
    units, unit_bytes = n, LANES * 4
    if values.itemsize == 1:
        units, unit_bytes = (n + LANES - 1) // LANES * (LANES // 2), LANES * 2
    for block in range(mixed.shape[0]):
        to = _address(mixed) + (block * mixed.shape[1] + entry) * LANES * 4
        there = ahead + block * units * unit_bytes
        w = here + block * block_bytes
        a_step, s_step = 4 * rows, 4 * _STATE
        _times_rows(values, rows, w, _address(words), a_step, units, scales, s_step, to, there, unit_bytes)


@njit(**_OPTIONS)
def _prefetch_scales(cache, place, position, n):
    """Call for the scales of n positions that will be read next."""
    for scales in (cache[1], cache[3]):
        if scales.shape[1] > 0:
            start = _address(scales) + (place * scales.shape[1] + position) * scales.itemsize
            for offset in range(0, n * scales.itemsize, 64):
                _prefetch(start + offset)


@njit(**_OPTIONS)
def _attend_to(cache, place, lengths, more, entry, rows, next_cache, next_place, scratch):
    """Let entries `entry` to `entry + rows` of a scratch see positions of a place, by e to their scores.

    Each sees the first `lengths[entry] + more`, no fewer than the one before it. Block by block, so that
    keys and values are read in one go (Milakov and Gimelshein 2018, "Online normalizer calculation for
    softmax"). `next_cache` and `next_place` are what will be read after this.
    """
    keys, _, values, _ = cache
    state, query, scores, words, mixed, room = scratch
    together, dim = mixed.shape[1], mixed.shape[0] * LANES
    units = dim // 2 if keys.itemsize == 1 else dim
    longest = lengths[entry + rows - 1] + more
    scales = _address(state) + 4 * _STATE * entry
    for first in range(0, longest, _BLOCK):
        n = min(_BLOCK, longest - first)
        if first + _BLOCK < longest:
            offset = (place * keys.shape[1] + (first + _BLOCK) * dim) * keys.itemsize
            ahead_keys, ahead_values = _address(keys) + offset, _address(values) + offset
            _prefetch_scales(cache, place, first + _BLOCK, _BLOCK)
        else:
            offset = next_place * next_cache[0].shape[1] * keys.itemsize
            ahead_keys, ahead_values = _address(next_cache[0]) + offset, _address(next_cache[2]) + offset
            _prefetch_scales(next_cache, next_place, 0, n)
        _score(
            keys,
            place,
            first,
            n,
            units,
            _address(query) + 4 * entry,
            4 * together,
            scales + 4 * _QUERY_SCALE,
            rows,
            scores,
            ahead_keys,
        )
        for r in range(rows):
            its = min(_BLOCK, lengths[entry + r] + more - first)
            _weigh(cache, place, first, its, n, scores, rows, r, entry + r, state, room, words, mixed)
        _mix(values, place, first, n, words, scales + 4 * _CHANCES_SCALE, rows, mixed, entry, ahead_values)


@njit(**_OPTIONS)
def _alike(places, others, first, last):
    """Where the entries end that have the place and the other number of the first."""
    end = first + 1
    while end < last and places[end] == places[first] and others[end] == others[first]:
        end += 1
    return end


@njit(**_OPTIONS)
def _see(cache, places, lengths, more, others, head, rows, after, after_place, scratch):
    """`_attend_to` for all entries, those together that have the same place, and other number."""
    first = np.int64(0)
    while first < rows:
        last = _alike(places, others, first, rows)
        place, count = places[first] + head, last - first
        if last < rows:
            _attend_to(cache, place, lengths, more, first, count, cache, places[last] + head, scratch)
        else:
            _attend_to(cache, place, lengths, more, first, count, after, after_place, scratch)
        first = last


@njit(**_OPTIONS)
def _pack_query(qkv, m, start, r, quantized, scratch):
    """Lay the query of one head of an entry out for `_score`, as row r."""
    state, query, _, _, mixed, room = scratch
    dim = mixed.shape[0] * LANES
    for d in range(dim):
        room[_at(d)] = qkv[_at(m), _at(start + d)]
    packed, units, words = query.view(np.int32), dim, room.view(np.int32)
    if quantized:
        line = room[dim:]
        state[_at(r), _at(_QUERY_SCALE)] = _quantize(room, 0, dim, line.view(np.int16))
        units, words = dim // 2, line.view(np.int32)
    for k in range(units):
        packed[_at(k * _TOGETHER + r)] = words[_at(k)]


# What an entry sees beyond the positions before it. Not plain numbers: numba would compile all that is
# called for each of them.
_WITH_ITSELF, _ALL_BEFORE = np.int64(1), np.int64(0)


@njit(**_OPTIONS)
def _attend(
    qkv, begin, end, head, cache, own, positions, prefixes, before, prefix_lengths, following, scratch, out
):
    """One head of entries `begin` to `end`, `_TOGETHER` at most: over their own steps, then over a prefix.

    Entries side by side that have the same keys see them together. `own` and `before` are the places
    of the first head; `following` is the place of what comes next.
    """
    state, _, _, _, mixed, _ = scratch
    rows, start = end - begin, head * mixed.shape[0] * LANES
    own, positions = own[begin:end], positions[begin:end]
    before, prefix_lengths = before[begin:end], prefix_lengths[begin:end]
    for r in range(rows):
        _pack_query(qkv, begin + r, start, r, cache[0].itemsize == 1, scratch)
        state[_at(r), _at(_TOP)], state[_at(r), _at(_SUM)] = -np.inf, _ZERO
        for block in range(mixed.shape[0]):
            for k in range(LANES):
                mixed[_at(block), _at(r), _at(k)] = _ZERO
    if prefix_lengths[0] > 0:
        _see(cache, own, positions, _WITH_ITSELF, before, head, rows, prefixes, before[0] + head, scratch)
    else:
        _see(cache, own, positions, _WITH_ITSELF, before, head, rows, cache, following, scratch)
    _see(prefixes, before, prefix_lengths, _ALL_BEFORE, prefix_lengths, head, rows, cache, following, scratch)
    for r in range(rows):
        inverse = _ONE / state[_at(r), _at(_SUM)]
        for block in range(mixed.shape[0]):
            for k in range(LANES):
                out[_at(begin + r), _at(start + block * LANES + k)] = (
                    mixed[_at(block), _at(r), _at(k)] * inverse
                )


@njit(**_OPTIONS)
def _keep(qkv, m, head, dim, cache, place, position):
    """Write keys and values of one head of an entry."""
    keys, key_scales, values, value_scales = cache
    start = qkv.shape[1] // 3 + head * dim
    _write(keys, key_scales, place, position, qkv, m, start, dim, True)
    _write(values, value_scales, place, position, qkv, m, start + qkv.shape[1] // 3, dim, False)


@njit(**_OPTIONS)
def _prefetch_place(cache, place, position, dim):
    """Call for what `_keep` will write to."""
    keys, key_scales, values, value_scales = cache
    item = keys.itemsize
    first = _address(keys) + (place * keys.shape[1] + position // LANES * LANES * dim) * item
    for offset in range(0, LANES * dim * item, 64):
        _prefetch(first + offset)
    first = _address(values) + (place * values.shape[1] + position // _BLOCK * _BLOCK * dim) * item
    first += position % _BLOCK * LANES * item
    for offset in range(0, dim * _BLOCK * item, LANES * _BLOCK * item):
        _prefetch(first + offset)
    if key_scales.shape[1] > 0:
        offset = (place * key_scales.shape[1] + position) * key_scales.itemsize
        _prefetch(_address(key_scales) + offset)
        _prefetch(_address(value_scales) + offset)


# -- sharing work between threads ---------------------------------------------------------------------
#
# A step is hundreds of short phases, each needing the one before. All threads run through all of them
# and take pieces of a phase as long as there are any; a phase is over when its pieces are done, whoever
# did them. So nobody waits for a thread that the system has put aside (on a machine that others use as
# well, waiting for it at each phase made a step a hundred times slower). Compiled functions hold no lock
# of the interpreter: its own threads run them, and meet at the end of a step.


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


def scratch_size(entries: int, dim: int) -> int:
    """Numbers that a thread needs room for: see `_desk`."""
    used = _BLOCKS_AT_ONCE * ROW_BLOCK * LANES + _AMX_ROOM + 2 * max(_BLOCK, dim)
    used += _TOGETHER * (_STATE + 2 * dim + 2 * _BLOCK) + 2 * entries
    return -(-used // LANES) * LANES  # whole cache lines, so that threads don't write into one another's


@njit(**_OPTIONS)
def _desk(scratch, dim, entries):
    """A thread's working arrays: for products sums, AMX's, room and statistics; those of `_attend`."""
    at_amx = _BLOCKS_AT_ONCE * ROW_BLOCK * LANES
    at_query = at_amx + _AMX_ROOM
    at_mixed = at_query + _TOGETHER * dim
    at_scores = at_mixed + _TOGETHER * dim
    at_words = at_scores + _TOGETHER * _BLOCK
    at_state = at_words + _TOGETHER * _BLOCK
    at_room = at_state + _TOGETHER * _STATE
    at_statistics = at_room + 2 * max(_BLOCK, dim)
    room = scratch[at_room:at_statistics]
    return (
        scratch[:at_amx].reshape(_BLOCKS_AT_ONCE, ROW_BLOCK, LANES),
        scratch[at_amx:at_query],
        room,
        scratch[at_statistics : at_statistics + 2 * entries].reshape(entries, 2),
    ), (
        scratch[at_state:at_room].reshape(_TOGETHER, _STATE),
        scratch[at_query:at_mixed],
        scratch[at_scores:at_words],
        scratch[at_words:at_state],
        scratch[at_mixed:at_scores].reshape(dim // LANES, _TOGETHER, LANES),
        room,
    )


_FEW = 8  # entries of a head in a piece of attention, if there aren't many: so that all threads have some


@njit(**_OPTIONS)
def _product(counters, phase, weights, weight_scales, x, norm, group, words, scales, out, mode, amx, scratch):
    """Two phases: lay x out, then multiply. The number of the next phase."""
    rows, blocks = x.shape[0], weights.shape[0]
    sums, amx_room, room, statistics = scratch  # each thread finds its own statistics: they are quickly found
    by_amx = amx.shape[0] > 0 and weights.itemsize == 1 and rows >= _AMX_LEAST_ROWS
    by_amx = by_amx and group % _AMX_INPUTS == 0 and blocks % 2 == 0
    if norm.shape[0] > 0:
        for m in range(rows):
            statistics[m, 0], statistics[m, 1] = _statistics(x, m)
    pieces = (rows + ROW_BLOCK - 1) // ROW_BLOCK * (x.shape[1] // group)
    while True:
        piece = _take(counters, phase)
        if piece >= pieces:
            break
        _lay_out(weights, x, norm, statistics, group, piece, room, words, scales, by_amx)
        _done(counters, phase)
    _await(counters, phase, pieces)
    phase += 1
    pieces = (blocks + _BLOCKS_AT_ONCE - 1) // _BLOCKS_AT_ONCE
    if by_amx:
        _begin_amx(_address(amx))
    while True:
        piece = _take(counters, phase)
        if piece >= pieces:
            break
        first = piece * _BLOCKS_AT_ONCE
        last = min(first + _BLOCKS_AT_ONCE, blocks)
        if by_amx:
            _linear_by_amx(
                weights, weight_scales, words, scales, rows, group, out, mode, first, last, sums, amx_room
            )
        else:
            _linear(weights, weight_scales, words, scales, rows, group, out, mode, first, last, sums)
        _done(counters, phase)
    if by_amx:
        _end_amx()
    _await(counters, phase, pieces)
    return phase + 1


@njit(**_OPTIONS)
def _attention(
    counters, phase, qkv, heads, cache, own, prefixes, before, positions, prefix_lengths, out, scratch
):
    """Two phases: keep keys and values, then attend. The number of the next phase."""
    entries, hidden = out.shape
    dim = hidden // heads
    at_once = _TOGETHER if entries >= 4 * _TOGETHER else _FEW
    of_a_head = (entries + at_once - 1) // at_once
    pieces = of_a_head * heads
    while True:
        piece = _take(counters, phase)
        if piece >= pieces:
            break
        head, begin = piece // of_a_head, piece % of_a_head * at_once
        end = min(begin + at_once, entries)
        for m in range(begin, end):
            _prefetch_place(cache, own[m] + head, positions[m], dim)
        for m in range(begin, end):
            _keep(qkv, m, head, dim, cache, own[m] + head, positions[m])
        _done(counters, phase)
    _await(counters, phase, pieces)
    phase += 1
    while True:
        piece = _take(counters, phase)
        if piece >= pieces:
            break
        head, begin = piece // of_a_head, piece % of_a_head * at_once
        end = min(begin + at_once, entries)
        following = own[end] + head if end < entries else own[0] + min(head + 1, heads - 1)
        _attend(
            qkv,
            begin,
            end,
            head,
            cache,
            own,
            positions,
            prefixes,
            before,
            prefix_lengths,
            following,
            scratch,
            out,
        )
        _done(counters, phase)
    _await(counters, phase, pieces)
    return phase + 1


PHASES_PER_LAYER = 10


@njit(**_OPTIONS)
def _four(arrays):
    """`_borrowed` of a cache's arrays."""
    return _borrowed(arrays[0]), _borrowed(arrays[1]), _borrowed(arrays[2]), _borrowed(arrays[3])


@njit(nogil=True, **_OPTIONS)
def run_layers(
    thread,
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
    amx,
    room,
):
    """Run entries through all layers, in place, and add their keys and values to the cache.

    An entry is one position of one row. Entries of one row must stand in order, after all earlier
    positions were run.

    Args:
        thread: which of those that share the work this is: each runs this function, with the same
            arrays, and comes back when all is done.
        counters: int64 zeros, 2 * `PHASES_PER_LAYER` per layer.
        x: float32, (entries, hidden): the inputs, then what the last layer gives.
        heads: of the attention.
        matrices: (qkv, scales, out, scales, up, scales, down, scales), see `pack_columns`; the
            matrices (layers, outputs / 16, inputs * 16), scales (layers, outputs).
        norms: of attention and feed-forward, (layers, 2, hidden): weight and bias.
        groups: inputs per group, for hidden and for feed-forward inputs.
        cache: (keys, scales, values, scales): (places, steps * dim) and, uint16 (see `_half`), (places,
            steps); a place is one head of one slot of one layer; steps a multiple of 128.
        own: int64, (layers, entries): the place of an entry's first head.
        prefixes: as `cache`, of the prefixes.
        before: int64, (layers, entries): the place of the first head of its prefix.
        positions: int64, (entries,): its position among its row's own steps.
        prefix_lengths: int64, (entries,): 0 for none.
        amx: `AMX` where the system allows this process its use, an empty array otherwise.
        room: working arrays: words int32 (entries * most inputs,), scales float32 (entries, 2 *
            groups) for hidden and for feed-forward inputs, float32 (entries, 3 * hidden), (entries,
            hidden), (entries, wide), (0, 0), (threads, `scratch_size`).
    """
    weights_1, scales_1 = _borrowed(matrices[0]), _borrowed(matrices[1])
    weights_2, scales_2 = _borrowed(matrices[2]), _borrowed(matrices[3])
    weights_3, scales_3 = _borrowed(matrices[4]), _borrowed(matrices[5])
    weights_4, scales_4 = _borrowed(matrices[6]), _borrowed(matrices[7])
    norm_1, norm_3, no_norm = _borrowed(norms[0]), _borrowed(norms[1]), _borrowed(room[6])
    words, scales, wide_scales = _borrowed(room[0]), _borrowed(room[1]), _borrowed(room[2])
    qkv, attended, inner = _borrowed(room[3]), _borrowed(room[4]), _borrowed(room[5])
    counters, x, cache, prefixes = _borrowed(counters), _borrowed(x), _four(cache), _four(prefixes)
    own, before = _borrowed(own), _borrowed(before)
    positions, prefix_lengths = _borrowed(positions), _borrowed(prefix_lengths)
    amx = _borrowed(amx)
    at_product, at_attention = _desk(_borrowed(room[7])[thread], x.shape[1] // heads, x.shape[0])
    phase = np.int64(0)
    for n in range(weights_1.shape[0]):
        for which in range(4):  # one call in a loop, not four: it takes a quarter of the time to compile
            if which == 0:
                weights, its, inputs, norm, out, mode = weights_1[n], scales_1[n], x, norm_1[n], qkv, STORE
            elif which == 1:
                weights, its, inputs, norm, out, mode = weights_2[n], scales_2[n], attended, no_norm, x, ADD
            elif which == 2:
                weights, its, inputs, norm, out, mode = weights_3[n], scales_3[n], x, norm_3[n], inner, GELU
            else:
                weights, its, inputs, norm, out, mode = weights_4[n], scales_4[n], inner, no_norm, x, ADD
            group, group_scales = (groups[1], wide_scales) if which == 3 else (groups[0], scales)
            phase = _product(
                counters,
                phase,
                weights,
                its,
                inputs,
                norm,
                group,
                words,
                group_scales,
                out,
                mode,
                amx,
                at_product,
            )
            if which == 0:
                phase = _attention(
                    counters,
                    phase,
                    qkv,
                    heads,
                    cache,
                    own[n],
                    prefixes,
                    before[n],
                    positions,
                    prefix_lengths,
                    attended,
                    at_attention,
                )


@njit(nogil=True, **_OPTIONS)
def run_product(
    thread, counters, weights, weight_scales, x, norm, group, words, scales, out, mode, amx, scratch
):
    """out (rows, outputs) of x (rows, inputs), normalized first.

    `thread` as for `run_layers`, and `amx`; `counters`: int64 zeros, four of them; `scratch` float32,
    (threads, `scratch_size`) for heads of 16.
    """
    scratch, _ = _desk(scratch[thread], LANES, x.shape[0])
    _product(
        counters, np.int64(0), weights, weight_scales, x, norm, group, words, scales, out, mode, amx, scratch
    )


# -- layouts ----------------------------------------------------------------------------------------


def pack_columns(weights: np.ndarray) -> np.ndarray:
    """float32 or int8 (outputs, inputs) to (outputs / 16, inputs * 16): each input of 16 outputs together.

    Of int8, four inputs; they become uint8, 128 more, as the processors' instructions want one sign only.
    """
    outputs, inputs = weights.shape
    together = 4 if weights.dtype == np.int8 else 1
    if weights.dtype == np.int8:
        weights = weights.view(np.uint8) ^ np.uint8(128)
    split = weights.reshape(outputs // LANES, LANES, inputs // together, together)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(outputs // LANES, inputs * LANES)


def quantize_rows(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (outputs, inputs) to int8 and a scale per output, so that int8 * scale is near it."""
    scales = np.abs(weights).max(axis=1) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(weights * inverse[:, None]).astype(np.int8), scales.astype(np.float32)
