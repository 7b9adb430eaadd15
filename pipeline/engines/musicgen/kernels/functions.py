"""The exponential and GELU as LLVM's intermediate representation, of a float32 or of vectors of 16."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipeline.engines.musicgen.kernels.intrinsics import F32, I32, call, emit_fma, pointer, vector
from pipeline.engines.musicgen.kernels.processor import LANES

# exp(x) = 2**n * exp(r) with n = round(x / ln 2) and r = x - n ln 2, so |r| <= ln(2) / 2. ln 2 is split into
# a part with few bits, whose product with n is exact, and a remainder (Cody and Waite 1980). exp(r) is its
# Taylor series to the sixth power, with an error of about 1e-7.
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_SERIES = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_LOWEST_EXPONENT = -80.0  # far from denormal numbers, which are slow, also when multiplied

# erf(z) = 1 - (a1 t + a2 t**2 + ... + a5 t**5) exp(-z**2) with t = 1 / (1 + p z), to 1.5e-7 for z >= 0
# (Abramowitz and Stegun 1964, 7.1.26).
_ERF_P = 0.3275911
_ERF_SERIES = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_SQRT_HALF = 0.7071067811865476


def constant(kind: Any, value: float) -> Any:
    """A number, rounded to float32 if it is one, in all lanes if `kind` is a vector."""
    number = int(value) if kind in (I32, vector(I32)) else float(np.float32(value))
    return ir.Constant(kind, [number] * LANES if isinstance(kind, ir.VectorType) else number)


def emit_floor(b: Any, x: Any) -> Any:
    return call(b, f"llvm.floor.v{LANES}f32" if x.type == vector(F32) else "llvm.floor.f32", x.type, [x])


def emit_exp(b: Any, x: Any) -> Any:
    """e**x for x <= 0; NaN gives the result of the lowest exponent."""
    kind = x.type
    integers = vector(I32) if kind == vector(F32) else I32
    lowest = constant(kind, _LOWEST_EXPONENT)
    x = b.select(b.fcmp_ordered(">", x, lowest), x, lowest)
    n = emit_floor(b, emit_fma(b, x, constant(kind, _LOG2_E), constant(kind, 0.5)))
    high, low = constant(kind, -_LN2_HIGH), constant(kind, -_LN2_LOW)
    series = _emit_series(b, emit_fma(b, n, low, emit_fma(b, n, high, x)), _SERIES)
    exponent = b.add(b.fptosi(n, integers), constant(integers, 127))
    return b.fmul(series, b.bitcast(b.shl(exponent, constant(integers, 23)), kind))


def emit_gelu(b: Any, x: Any) -> Any:
    """The exact GELU (Hendrycks and Gimpel 2016), x * Phi(x) with Phi(x) = (1 + erf(x / sqrt 2)) / 2.

    With z = |x| / sqrt 2 and tail = 1 - erf(z), that is max(x, 0) - |x| / 2 * tail for either sign of x.
    """
    kind = x.type
    one, half = constant(kind, 1), constant(kind, 0.5)
    size = call(b, f"llvm.fabs.v{LANES}f32", kind, [x])
    z = b.fmul(size, constant(kind, _SQRT_HALF))
    t = b.fdiv(one, emit_fma(b, constant(kind, _ERF_P), z, one))
    tail = b.fmul(b.fmul(t, _emit_series(b, t, _ERF_SERIES)), emit_exp(b, b.fmul(b.fneg(z), z)))
    return emit_fma(b, b.fmul(size, half), b.fneg(tail), b.fmul(b.fadd(x, size), half))


def _emit_series(b: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    """A polynomial of x, of which the coefficient of the highest power comes first."""
    result = constant(x.type, coefficients[0])
    for number in coefficients[1:]:
        result = emit_fma(b, x, result, constant(x.type, number))
    return result


@intrinsic  # type: ignore[untyped-decorator]
def exp(_: Any, x: Any) -> Any:
    """See `emit_exp`."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return emit_exp(builder, arguments[0])

    return types.float32(types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def apply_gelu(_: Any, address: Any) -> Any:
    """Replace the 16 numbers at an address by their GELU."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        numbers = pointer(builder, arguments[0], vector(F32))
        builder.store(emit_gelu(builder, builder.load(numbers, align=4)), numbers, align=4)
        return context.get_dummy_value()

    return types.void(types.intp), codegen
