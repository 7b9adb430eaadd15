"""The micro-kernel: a few rows of activations times one or two blocks of 16 columns of weights.

The columns of a block stand side by side in memory. One load of weights serves all rows, one load of an
activation serves all blocks, and the sums stay in registers (the layout of Goto and van de Geijn 2008,
"Anatomy of high-performance matrix multiplication"). It is emitted as LLVM's portable vectors, in three kinds
that are told apart by the type of the weights; see the package for the numbers they calculate with.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engines.musicgen.kernels.intrinsics import (
    F32,
    I8,
    I16,
    I32,
    I64,
    broadcast,
    call,
    emit_fma,
    emit_prefetch,
    pointer,
    vector,
)
from pipeline.engines.musicgen.kernels.processor import (
    DOT_BITS,
    LANES,
    OPTIONS,
    TILE_BLOCKS,
    TILE_OF,
    TILE_ROWS,
)


class Columns(NamedTuple):
    """Blocks of 16 columns of weights. A unit is one input, for int8 two inputs, for uint8 four."""

    address: int
    step: int  # bytes from block to block
    groups: int  # of inputs that share a scale
    units: int  # in a group: a multiple of 8 for int8, of 4 for uint8


class Activations(NamedTuple):
    """Rows of activations in units, a 32 bit word per unit and row (`QUAD_WORDS` for uint8 weights)."""

    address: int
    step: int  # bytes from unit to unit
    scales: int  # address of the scales of the groups; not read for float32
    scale_step: int  # bytes from row to row


class Sums(NamedTuple):
    """float32 sums (rows, 16) of each block of columns."""

    address: int
    step: int  # bytes from block to block


class Ahead(NamedTuple):
    """Memory that is read next, and prefetched meanwhile, for each block of columns."""

    address: int
    step: int  # bytes from block to block
    unit_step: int  # bytes per unit and tile


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    _: Any, weights: Any, rows: Any, blocks: Any, columns: Any, activations: Any, sums: Any, ahead: Any
) -> Any:
    """Add the product of `rows` rows, one of `TILE_ROWS`, and up to `TILE_BLOCKS` blocks of columns to sums.

    Of the array `weights` only the type is used.
    """
    emitter = {types.float32: _FloatTile, types.int8: _PairTile, types.uint8: _QuadTile}[weights.dtype]
    signature = types.void(weights, types.intp, types.intp, columns, activations, sums, ahead)

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        _, rows, blocks, *tuples = arguments
        tuples = [cgutils.unpack_tuple(builder, values) for values in tuples]
        end = builder.append_basic_block("tile.end")
        choice = builder.switch(builder.add(builder.mul(rows, I64(TILE_BLOCKS)), blocks), end)
        for n_rows in TILE_ROWS:
            for n_blocks in range(1, TILE_BLOCKS + 1):
                case = builder.append_basic_block(f"tile.{n_rows}.{n_blocks}")
                choice.add_case(I64(n_rows * TILE_BLOCKS + n_blocks), case)
                builder.position_at_end(case)
                emitter(builder, n_rows, n_blocks, *tuples).build()
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


@njit(**OPTIONS)
def multiply(weights, rows, blocks, columns, activations, sums, ahead):
    """As `_tile`, for any number of rows up to `ROW_BLOCK`; the tiles share what is to be prefetched."""
    units = columns.groups * columns.units
    first, ahead_address = np.int64(0), ahead.address
    while first < rows:
        count = TILE_OF[rows - first]
        part = Activations(
            activations.address + 4 * first,
            activations.step,
            activations.scales + first * activations.scale_step,
            activations.scale_step,
        )
        to = Sums(sums.address + 4 * LANES * first, sums.step)
        _tile(weights, count, blocks, columns, part, to, Ahead(ahead_address, ahead.step, ahead.unit_step))
        ahead_address += units * ahead.unit_step
        first += count


class _Tile:
    """Emits the loops over groups and units; a subclass knows what a unit is."""

    CHAINS: int  # largest number of sums per row and column; 1 where their order matters
    WEIGHT_BYTES: int  # of 16 columns, per unit
    SUM: Any  # type of the sums within a group

    def __init__(
        self,
        builder: Any,
        rows: int,
        blocks: int,
        columns: list[Any],
        activations: list[Any],
        sums: list[Any],
        ahead: list[Any],
    ) -> None:
        self.b, self.blocks = builder, range(blocks)
        self.cells = [(row, block) for row in range(rows) for block in self.blocks]  # each has a sum
        self.weights, self.weights_step, self.groups, self.units = columns
        self.activations, self.step, self.scales, self.scale_step = activations
        self.sums, self.sums_step = sums
        self.ahead, self.ahead_step, self.ahead_unit_step = ahead
        # A product takes several cycles. With few sums, several units are added to sums of their own, so
        # that a product need not wait for the one before it.
        chains = (2**n for n in range(4) if len(self.cells) * 2**n <= TILE_ROWS[0] * TILE_BLOCKS)
        self.chains = min(max(chains), self.CHAINS)

    def build(self) -> None:
        b = self.b
        totals = [cgutils.alloca_once(b, vector(F32)) for _ in self.cells]
        for cell, total in zip(self.cells, totals, strict=True):
            b.store(b.load(self.sums_at(*cell), align=4), total)
        with cgutils.for_range(b, self.groups) as group:
            sums = self.group(group.index)
            for (row, _), total, value in zip(self.cells, totals, sums, strict=True):
                b.store(self.add_group(b.load(total), value, row, group.index), total)
        for cell, total in zip(self.cells, totals, strict=True):
            b.store(b.load(total), self.sums_at(*cell), align=4)

    def group(self, index: Any) -> list[Any]:
        """The sum of each cell over the units of a group: one loop, with all sums in registers."""
        b = self.b
        before, loop, after = b.block, b.append_basic_block("units"), b.append_basic_block("units.end")
        first = b.mul(index, self.units)
        initial = [self.initial(row, index) for row, _ in self.cells]
        b.branch(loop)
        b.position_at_end(loop)
        unit = b.phi(I64)
        unit.add_incoming(I64(0), before)
        phis = [[b.phi(self.SUM) for _ in self.cells] for _ in range(self.chains)]
        sums = []
        for chain, chain_phis in enumerate(phis):
            here = b.add(b.add(first, unit), I64(chain))
            sums.append(self.unit(here, chain_phis))
            if chain * self.WEIGHT_BYTES % 64 == 0:
                ahead = b.add(self.ahead, b.mul(here, self.ahead_unit_step))
                for block in self.blocks:
                    emit_prefetch(b, self.of_block(ahead, self.ahead_step, block))
        following = b.add(unit, I64(self.chains))
        unit.add_incoming(following, loop)
        zero = ir.Constant(self.SUM, [0] * LANES)
        for chain, (chain_phis, chain_sums) in enumerate(zip(phis, sums, strict=True)):
            for phi, value, start in zip(chain_phis, chain_sums, initial, strict=True):
                phi.add_incoming(zero if chain else start, before)
                phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, self.units), loop, after)
        b.position_at_end(after)
        # Only integers have several chains: their sum is exact, so its order does not matter.
        return [functools.reduce(b.add, cell_sums) for cell_sums in zip(*sums, strict=True)]

    def unit(self, unit: Any, sums: list[Any]) -> list[Any]:
        """The sums of all cells with the products of one unit added."""
        b = self.b
        first = b.add(self.weights, b.mul(unit, I64(self.WEIGHT_BYTES)))
        weights = [self.load_weights(self.of_block(first, self.weights_step, block)) for block in self.blocks]
        word = b.add(self.activations, b.mul(unit, self.step))
        found = []
        for (row, block), sum_ in zip(self.cells, sums, strict=True):
            if block == 0:
                activations = self.load_activations(b.add(word, I64(4 * row)))
            found.append(self.add_product(weights[block], activations, sum_))
        return found

    def of_block(self, address: Any, step: Any, block: int) -> Any:
        return self.b.add(address, self.b.mul(step, I64(block)))

    def load_word(self, address: Any) -> Any:
        """32 bits of activations, in all lanes."""
        return broadcast(self.b, self.b.load(pointer(self.b, address, I32), align=4))

    def initial(self, row: int, group: Any) -> Any:
        """What the sum of a row over a group begins with."""
        return ir.Constant(self.SUM, [0] * LANES)

    def load_weights(self, address: Any) -> Any:
        raise NotImplementedError

    def load_activations(self, word: Any) -> Any:
        """A unit's activations of one row, from the address `word` on."""
        return self.load_word(word)

    def add_product(self, weights: Any, activations: Any, sum_: Any) -> Any:
        """The sum with the products of a unit's weights and activations added."""
        raise NotImplementedError

    def add_group(self, total: Any, value: Any, row: int, group: Any) -> Any:
        """The float32 total with the sum over a group added."""
        raise NotImplementedError

    def sums_at(self, row: int, block: int) -> Any:
        address = self.of_block(self.sums, self.sums_step, block)
        return pointer(self.b, self.b.add(address, I64(4 * LANES * row)), vector(F32))


class _FloatTile(_Tile):
    """float32: sums are in one order, so there is one chain."""

    CHAINS, WEIGHT_BYTES, SUM = 1, 4 * LANES, vector(F32)

    def load_weights(self, address: Any) -> Any:
        return self.b.load(pointer(self.b, address, vector(F32)), align=4)

    def add_product(self, weights: Any, activations: Any, sum_: Any) -> Any:
        return emit_fma(self.b, weights, self.b.bitcast(activations, vector(F32)), sum_)

    def add_group(self, total: Any, value: Any, row: int, group: Any) -> Any:
        return self.b.fadd(total, value)


class _IntegerTile(_Tile):
    """Integers within a group."""

    SCALE_BYTES: int  # from group to group
    SUM = vector(I32)

    def scale_at(self, row: int, group: Any) -> Any:
        """The address of a group's scale."""
        b = self.b
        offset = b.add(b.mul(I64(row), self.scale_step), b.mul(group, I64(self.SCALE_BYTES)))
        return b.add(self.scales, offset)

    def add_group(self, total: Any, value: Any, row: int, group: Any) -> Any:
        scale = self.b.load(pointer(self.b, self.scale_at(row, group), F32), align=4)
        return emit_fma(self.b, self.b.sitofp(value, vector(F32)), broadcast(self.b, scale), total)

    def add_pairs(self, weights: Any, words: Any, sum_: Any) -> Any:
        """Add both products of pairs of int16, in the form for which LLVM selects vpmaddwd or vpdpwssd."""
        b, wide = self.b, ir.VectorType(I32, 2 * LANES)
        pair = b.bitcast(words, ir.VectorType(I16, 2 * LANES))
        products = b.mul(b.sext(weights, wide), b.sext(pair, wide))
        undefined = ir.Constant(wide, ir.Undefined)
        even, odd = (
            b.shuffle_vector(products, undefined, ir.Constant(vector(I32), list(range(start, 2 * LANES, 2))))
            for start in (0, 1)
        )
        return b.add(sum_, b.add(even, odd))


class _PairTile(_IntegerTile):
    """int8 weights, int16 activations: two inputs of each column stand side by side."""

    CHAINS, WEIGHT_BYTES, SCALE_BYTES = 8, 2 * LANES, 4

    def load_weights(self, address: Any) -> Any:
        loaded = self.b.load(pointer(self.b, address, ir.VectorType(I8, 2 * LANES)), align=1)
        return self.b.sext(loaded, ir.VectorType(I16, 2 * LANES))

    def add_product(self, weights: Any, activations: Any, sum_: Any) -> Any:
        return self.add_pairs(weights, activations, sum_)


class _QuadTile(_IntegerTile):
    """uint8 weights w + 128 and int8 activations a: four inputs of each column stand side by side.

    sum(w a) = sum((w + 128) a) - 128 sum(a): the last term is stored beside each group's scale, and the
    sum begins with it. Without vpdpbusd, activations are pairs of int16, the first and third of four,
    then the others, as the weights are split into even and odd bytes.
    """

    CHAINS, WEIGHT_BYTES, SCALE_BYTES = 4, 4 * LANES, 8

    def initial(self, row: int, group: Any) -> Any:
        offset = self.b.add(self.scale_at(row, group), I64(4))
        return broadcast(self.b, self.b.load(pointer(self.b, offset, I32), align=4))

    def load_weights(self, address: Any) -> Any:
        return self.b.load(pointer(self.b, address, vector(I32)), align=4)

    def load_activations(self, word: Any) -> Any:
        if DOT_BITS:
            return self.load_word(word)
        second = self.b.add(word, self.b.lshr(self.step, I64(1)))
        return self.load_word(word), self.load_word(second)

    def add_product(self, weights: Any, activations: Any, sum_: Any) -> Any:
        b = self.b
        if DOT_BITS:
            return self.dot(weights, activations, sum_)
        halves = ir.VectorType(I16, 2 * LANES)
        both = b.bitcast(weights, halves)
        even = b.and_(both, ir.Constant(halves, [0xFF] * (2 * LANES)))
        odd = b.lshr(both, ir.Constant(halves, [8] * (2 * LANES)))
        of_even, of_odd = activations
        return self.add_pairs(odd, of_odd, self.add_pairs(even, of_even, sum_))

    def dot(self, weights: Any, words: Any, sum_: Any) -> Any:
        """vpdpbusd on the whole vector, or on its halves where registers have 256 bits."""
        b, lanes = self.b, DOT_BITS // 32
        kind, bytes_ = ir.VectorType(I32, lanes), ir.VectorType(I8, 4 * lanes)
        parts = []
        for start in range(0, LANES, lanes):
            which = ir.Constant(kind, list(range(start, start + lanes)))
            part = [b.shuffle_vector(values, values, which) for values in (sum_, weights, words)]
            arguments = [part[0], b.bitcast(part[1], bytes_), b.bitcast(part[2], bytes_)]
            parts.append(call(b, f"llvm.x86.avx512.vpdpbusd.{DOT_BITS}", kind, arguments))
        if len(parts) == 1:
            return parts[0]
        return b.shuffle_vector(*parts, ir.Constant(vector(I32), list(range(LANES))))
