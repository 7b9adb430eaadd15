"""The micro-kernel of int8 weights on AMX: up to 32 rows times two blocks of 16 columns.

It reads the same weights as `tile` and finds the same integers, so results have the same bits. Of the eight
registers of 16 rows of 64 bytes, four hold sums, two activations and two weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engines.musicgen.kernels.intrinsics import (
    F32,
    I8,
    I32,
    I64,
    broadcast,
    call,
    emit_fma,
    emit_prefetch,
    pointer,
    vector,
)
from pipeline.engines.musicgen.kernels.processor import HAS_AMX, LANES

AMX_UNIT = 64  # inputs that are multiplied at a time
AMX_LEAST_ROWS = 5  # with fewer rows the other micro-kernel is as fast
AMX_SUMS = 4 * 16 * LANES  # what four registers hold, in numbers of 32 bits

# The argument of ldtilecfg: palette 1, then for each register the bytes of a row and the number of rows.
AMX = np.zeros(64 if HAS_AMX else 0, np.uint8)
if HAS_AMX:
    AMX[0] = 1
    AMX[16:32:2], AMX[48:56] = 64, 16


@intrinsic  # type: ignore[untyped-decorator]
def begin_amx(_: Any, configuration: Any) -> Any:
    """Configure the AMX registers of this thread from the 64 bytes at an address."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        if HAS_AMX:
            call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [pointer(builder, arguments[0], I8)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def end_amx(_: Any) -> Any:
    """Release the AMX registers, so that the system need not save them any more."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        if HAS_AMX:
            call(builder, "llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def amx_tile(
    _: Any,
    rows: Any,
    columns: Any,
    activations: Any,
    sums: Any,
    scratch: Any,
    ahead: Any,
) -> Any:
    """Add the product of `rows` rows, 32 at most, and two blocks of 16 columns to float32 sums.

    As `tile`, but a unit is 64 inputs, and `activations` are int8 (rows, inputs), `step` bytes from row
    to row; rows up to a multiple of 16 are read. `scratch` is the address of `AMX_SUMS` numbers. At `ahead`
    are the next two blocks of columns, to be prefetched; 0: none.
    """
    signature = types.void(types.intp, columns, activations, sums, types.intp, types.intp)

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        if HAS_AMX:
            rows, columns, activations, sums, *rest = arguments
            tuples = [cgutils.unpack_tuple(builder, values) for values in (columns, activations, sums)]
            more_than_16 = builder.icmp_signed(">", rows, I64(LANES))
            with builder.if_else(more_than_16) as (two, one):
                with two:
                    _AmxTile(builder, 2, rows, *tuples, *rest).build()
                with one:
                    _AmxTile(builder, 1, rows, *tuples, *rest).build()
        return context.get_dummy_value()

    return signature, codegen


class _AmxTile:
    """Emits the loops over groups and units for one or two registers of 16 rows (`parts`)."""

    def __init__(
        self,
        builder: Any,
        parts: int,
        rows: Any,
        columns: list[Any],
        activations: list[Any],
        sums: list[Any],
        stored_sums: Any,
        ahead: Any,
    ) -> None:
        self.b, self.parts, self.rows = builder, range(parts), rows
        self.weights, self.block_bytes, self.groups, self.units = columns
        self.activations, self.step, self.scales, self.scale_step = activations
        self.out, self.out_bytes = sums
        self.stored_sums, self.ahead = stored_sums, ahead
        self.blocks = range(2)

    def build(self) -> None:
        b = self.b
        with cgutils.for_range(b, self.groups) as group:
            for block in self.blocks:
                for part in self.parts:
                    self.amx("tilezero", self.sums(block, part))
            with cgutils.for_range(b, self.units) as unit:
                self.add_products(b.add(b.mul(group.index, self.units), unit.index))
            for block in self.blocks:
                for part in self.parts:
                    to = b.add(self.stored_sums, I64(1024 * (2 * block + part)))
                    self.amx("tilestored64", self.sums(block, part), pointer(b, to, I8), I64(64))
            with cgutils.for_range(b, self.rows) as row:
                self.add_group(row.index, group.index)

    def add_products(self, unit: Any) -> None:
        b = self.b
        for part in self.parts:
            rows = b.add(b.mul(unit, I64(64)), b.mul(self.step, I64(16 * part)))
            first = pointer(b, b.add(self.activations, rows), I8)
            self.amx("tileloadd64", I8(4 + part), first, self.step)
        for block in self.blocks:
            columns = b.add(b.mul(unit, I64(1024)), b.mul(self.block_bytes, I64(block)))
            first = pointer(b, b.add(self.weights, columns), I8)
            self.amx("tileloadd64", I8(6 + block), first, I64(64))
            for part in self.parts:
                self.amx("tdpbsud", self.sums(block, part), I8(4 + part), I8(6 + block))
            with b.if_then(b.icmp_signed("!=", self.ahead, I64(0))):
                for line in range(0, 1024, 64):
                    emit_prefetch(b, b.add(self.ahead, b.add(columns, I64(line))))

    def add_group(self, row: Any, group: Any) -> None:
        """As `tile._QuadTile`: a scale and what the sum begins with, per row and group."""
        b = self.b
        scale_at = b.add(self.scales, b.add(b.mul(row, self.scale_step), b.mul(group, I64(8))))
        scale = broadcast(b, b.load(pointer(b, scale_at, F32), align=4))
        initial = broadcast(b, b.load(pointer(b, b.add(scale_at, I64(4)), I32), align=4))
        for block in self.blocks:
            offset = b.add(b.mul(row, I64(4 * LANES)), I64(2048 * block))
            products = b.load(pointer(b, b.add(self.stored_sums, offset), vector(I32)), align=4)
            offset = b.add(b.mul(row, I64(4 * LANES)), b.mul(self.out_bytes, I64(block)))
            to = pointer(b, b.add(self.out, offset), vector(F32))
            value = b.sitofp(b.add(products, initial), vector(F32))
            b.store(emit_fma(b, value, scale, b.load(to, align=4)), to, align=4)

    @staticmethod
    def sums(block: int, part: int) -> Any:
        """The register of the sums of a block of columns and a part of the rows."""
        return I8(2 * block + part)

    def amx(self, name: str, *arguments: Any) -> None:
        call(self.b, f"llvm.x86.{name}", ir.VoidType(), list(arguments))
