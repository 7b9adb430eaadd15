"""Single operations that numba has no function for, as LLVM's intermediate representation.

The functions up to `emit_total` emit code for other intrinsics; those marked `@intrinsic` are called
by compiled functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipeline.engines.musicgen.kernels.processor import LANES

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def vector(kind: Any) -> Any:
    return ir.VectorType(kind, LANES)


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call a function of LLVM's own."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def broadcast(builder: Any, scalar: Any) -> Any:
    """A vector with the same number in every lane."""
    kind = vector(scalar.type)
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(vector(I32), [0] * LANES))


def emit_fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z with one rounding, of float32 or of vectors of float32."""
    name = f"llvm.fma.v{LANES}f32" if x.type == vector(F32) else "llvm.fma.f32"
    return call(builder, name, x.type, [x, y, z])


def emit_prefetch(builder: Any, address: Any) -> None:
    """Load a cache line into the second level cache (locality 2), for reading (0), as data (1)."""
    arguments = [pointer(builder, address, I8), I32(0), I32(2), I32(1)]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def emit_total(builder: Any, address: Any, n: Any, add: Callable[[Any, Any], Any]) -> Any:
    """Reduce n float32 numbers to one, in a fixed order.

    `add(sums, numbers)` adds 16 numbers to 16 sums; at the end the upper half of the sums is added to
    the lower half until one is left.
    """
    kind = vector(F32)
    total = cgutils.alloca_once_value(builder, ir.Constant(kind, [0.0] * LANES))
    with cgutils.for_range(builder, builder.udiv(n, I64(LANES))) as turn:
        here = builder.add(address, builder.mul(turn.index, I64(4 * LANES)))
        numbers = builder.load(pointer(builder, here, kind), align=4)
        builder.store(add(builder.load(total), numbers), total)
    return emit_sum_of_lanes(builder, builder.load(total))


def emit_sum_of_lanes(builder: Any, value: Any) -> Any:
    """The sum of a vector's numbers, as in `emit_total`."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        halves = (
            builder.shuffle_vector(
                value, value, ir.Constant(ir.VectorType(I32, lanes), list(range(start, start + lanes)))
            )
            for start in (0, lanes)
        )
        value = builder.fadd(*halves)
    return builder.extract_element(value, I32(0))


@intrinsic  # type: ignore[untyped-decorator]
def fma(_: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of float32 with one rounding."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return emit_fma(builder, *arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def total(_: Any, address: Any, n: Any) -> Any:
    """The sum of n float32 numbers, n a multiple of 16, in the order of `emit_total`."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        address, n = arguments
        return emit_total(builder, address, n, builder.fadd)

    return types.float32(types.intp, types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def total_of_squares(_: Any, address: Any, n: Any, mean: Any) -> Any:
    """As `total`, of the squared differences from the mean."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        address, n, mean = arguments
        means = broadcast(builder, mean)

        def add(sums: Any, numbers: Any) -> Any:
            difference = builder.fsub(numbers, means)
            return emit_fma(builder, difference, difference, sums)

        return emit_total(builder, address, n, add)

    return types.float32(types.intp, types.intp, types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_: Any, address: Any) -> Any:
    """Load the cache line of an address ahead of its use."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        emit_prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic  # type: ignore[untyped-decorator]
def address_of(_: Any, array: Any) -> Any:
    """The address of an array's first element."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        struct = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(struct.data, I64)

    return types.intp(array), codegen


@intrinsic  # type: ignore[untyped-decorator]
def borrowed(_: Any, values: Any) -> Any:
    """The same array, or tuple of arrays, without reference counts; the caller has to keep the arrays alive.

    Slices, tuples and calls change the reference count of an array, which is in memory that all threads
    share: with two threads, attention over few positions took twice as long.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_references(context, builder, signature.args[0], arguments[0])

    return values(values), codegen


def _without_references(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.BaseTuple):
        items = cgutils.unpack_tuple(builder, value)
        borrowed_items = [
            _without_references(context, builder, item_kind, item)
            for item_kind, item in zip(kind, items, strict=True)
        ]
        return context.make_tuple(builder, kind, borrowed_items)
    if isinstance(kind, types.Array):
        struct = context.make_array(kind)(context, builder, value)
        struct.meminfo = cgutils.get_null_value(struct.meminfo.type)
        struct.parent = cgutils.get_null_value(struct.parent.type)
        return struct._getvalue()
    return value


@intrinsic  # type: ignore[untyped-decorator]
def add_atomically(_: Any, counters: Any, index: Any, amount: Any) -> Any:
    """Add to an element of an int64 array; returns what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        struct = context.make_array(signature.args[0])(context, builder, arguments[0])
        element = builder.gep(struct.data, [arguments[1]])
        return builder.atomic_rmw("add", element, arguments[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), codegen
