"""The softmax of a block of scores in three passes over vectors of 16, see `attention`.

Of the arguments `keys` only the type is used: int8 keys and values have scales, float32 have none.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engines.musicgen.kernels.arithmetic import NO_SIGN
from pipeline.engines.musicgen.kernels.functions import constant, emit_exp, emit_floor
from pipeline.engines.musicgen.kernels.intrinsics import (
    F32,
    I16,
    I32,
    I64,
    broadcast,
    call,
    emit_fma,
    emit_sum_of_lanes,
    pointer,
    vector,
)
from pipeline.engines.musicgen.kernels.processor import LANES


@intrinsic  # type: ignore[untyped-decorator]
def scale_scores(
    _: Any, keys: Any, scores: Any, step: Any, scales: Any, seen: Any, before: Any, out: Any
) -> Any:
    """Multiply scores by their keys' scales; returns the highest of them and of `before`.

    Args:
        scores: address of vectors of 16 scores, `step` bytes apart.
        scales: address of the keys' scales, bfloat16.
        seen: number of scores; the others of the last vector become -inf.
        out: address of the result.
    """
    is_int8 = keys.dtype == types.int8
    signature = types.float32(keys, *[types.intp] * 4, types.float32, types.intp)

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        b, (_, scores, step, scales, seen, before, out) = builder, arguments
        highest = cgutils.alloca_once_value(b, broadcast(b, _ordered(b, before)))
        with cgutils.for_range(b, _vectors(b, seen)) as turn:
            numbers = _load(b, b.add(scores, b.mul(turn.index, step)))
            if is_int8:
                numbers = b.fmul(numbers, _load_bfloat16(b, scales, turn.index))
            numbers = b.select(_is_seen(b, turn.index, seen), numbers, constant(vector(F32), -float("inf")))
            _store(b, numbers, out, turn.index)
            b.store(_larger(b, b.load(highest), _ordered(b, numbers)), highest)
        top = _largest_of_lanes(b, b.load(highest))
        return b.bitcast(_flipped_below_zero(b, top), F32)

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def take_exponentials(_: Any, keys: Any, numbers: Any, scales: Any, seen: Any, top: Any, factor: Any) -> Any:
    """Replace scores by exp((score - top) * factor), times their values' scales.

    Args:
        numbers: address of the scores.
        scales: address of the values' scales, bfloat16.
        seen: number of scores. For int8 the others of the last vector become 0.

    Returns:
        The sum of the exponentials without the scales, in the order of `intrinsics.emit_total`, and the
        largest result.
    """
    is_int8 = keys.dtype == types.int8
    result = types.UniTuple(types.float32, 2)
    signature = result(keys, types.intp, types.intp, types.intp, types.float32, types.float32)

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        b, (_, address, scales, seen, top, factor) = builder, arguments
        tops, factors, zero = broadcast(b, top), broadcast(b, factor), constant(vector(F32), 0)
        sums = cgutils.alloca_once_value(b, zero)
        largest = cgutils.alloca_once_value(b, constant(vector(I32), 0))
        with cgutils.for_range(b, _vectors(b, seen)) as turn:
            scores = _load(b, _at(b, address, turn.index))
            numbers = emit_exp(b, b.fmul(b.fsub(scores, tops), factors))
            b.store(b.fadd(b.load(sums), numbers), sums)
            if is_int8:
                numbers = b.fmul(numbers, _load_bfloat16(b, scales, turn.index))
                numbers = b.select(_is_seen(b, turn.index, seen), numbers, zero)
                bits = b.and_(b.bitcast(numbers, vector(I32)), constant(vector(I32), int(NO_SIGN)))
                b.store(_larger(b, b.load(largest), bits), largest)
            _store(b, numbers, address, turn.index)
        size = b.bitcast(_largest_of_lanes(b, b.load(largest)), F32)
        return context.make_tuple(b, result, [emit_sum_of_lanes(b, b.load(sums)), size])

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def round_to_int16(_: Any, numbers: Any, count: Any, inverse: Any, out: Any) -> Any:
    """Numbers times `inverse`, rounded, as int16; addresses, and a count that is rounded up to 16."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        b, (address, count, inverse, out) = builder, arguments
        inverses, half = broadcast(b, inverse), constant(vector(F32), 0.5)
        with cgutils.for_range(b, _vectors(b, count)) as turn:
            rounded = emit_floor(b, emit_fma(b, _load(b, _at(b, address, turn.index)), inverses, half))
            integers = b.trunc(b.fptosi(rounded, vector(I32)), vector(I16))
            to = b.add(out, b.mul(turn.index, I64(2 * LANES)))
            b.store(integers, pointer(b, to, vector(I16)), align=2)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.intp), codegen


def _vectors(b: Any, count: Any) -> Any:
    return b.udiv(b.add(count, I64(LANES - 1)), I64(LANES))


def _at(b: Any, address: Any, index: Any) -> Any:
    return b.add(address, b.mul(index, I64(4 * LANES)))


def _load(b: Any, address: Any) -> Any:
    return b.load(pointer(b, address, vector(F32)), align=4)


def _store(b: Any, numbers: Any, address: Any, index: Any) -> None:
    b.store(numbers, pointer(b, _at(b, address, index), vector(F32)), align=4)


def _load_bfloat16(b: Any, address: Any, index: Any) -> Any:
    first = pointer(b, b.add(address, b.mul(index, I64(2 * LANES))), vector(I16))
    bits = b.shl(b.zext(b.load(first, align=2), vector(I32)), constant(vector(I32), 16))
    return b.bitcast(bits, vector(F32))


def _is_seen(b: Any, index: Any, seen: Any) -> Any:
    """Which lanes of a vector are among the first `seen`."""
    left = b.trunc(b.sub(seen, b.mul(index, I64(LANES))), I32)
    return b.icmp_signed("<", ir.Constant(vector(I32), list(range(LANES))), broadcast(b, left))


def _ordered(b: Any, x: Any) -> Any:
    """The bits of float32 numbers as integers that are the larger the larger the numbers are."""
    return _flipped_below_zero(b, b.bitcast(x, I32 if x.type == F32 else vector(I32)))


def _flipped_below_zero(b: Any, bits: Any) -> Any:
    sign = b.ashr(bits, constant(bits.type, 31))
    return b.xor(bits, b.and_(sign, constant(bits.type, int(NO_SIGN))))


def _larger(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed(">", x, y), x, y)


def _largest_of_lanes(b: Any, integers: Any) -> Any:
    return call(b, f"llvm.vector.reduce.smax.v{LANES}i32", I32, [integers])
