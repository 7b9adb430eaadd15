"""Functions of single numbers and rows in float32: exponential, GELU, statistics, quantization."""

from __future__ import annotations

import numpy as np
from numba import njit

from pipeline.engines.musicgen.kernels.intrinsics import address_of, fma, total, total_of_squares
from pipeline.engines.musicgen.kernels.processor import OPTIONS

# Marks an array index as not negative. numba then does not test for indices that count from the end, and the
# loop can be vectorized (eight times as fast).
at = np.uint64

ONE, HALF, ZERO = np.float32(1), np.float32(0.5), np.float32(0)
NO_SIGN = np.int32(0x7FFFFFFF)  # mask of a float32's bits without its sign


@njit(inline="always", **OPTIONS)
def bits_of(x):
    """The bits of a float32 as an int32."""
    return np.float32(x).view(np.int32)


@njit(inline="always", **OPTIONS)
def float_of(bits):
    """The float32 with the bits of an int32."""
    return np.int32(bits).view(np.float32)


# exp(x) = 2**n * exp(r) with n = round(x / ln 2) and r = x - n ln 2, so |r| <= ln(2) / 2. ln 2 is split into
# a part with few bits, whose product with n is exact, and a remainder (Cody and Waite 1980). exp(r) is its
# Taylor series to the sixth power, with an error of about 1e-7.
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E2, _E3, _E4, _E5, _E6 = (np.float32(1 / n) for n in (2, 6, 24, 120, 720))
_LOWEST_EXPONENT = np.float32(-80.0)  # far from denormal numbers, which are slow, also when multiplied


@njit(inline="always", **OPTIONS)
def exp(x):
    """e**x of a float32 x <= 0; NaN gives the result of the lowest exponent."""
    x = x if x > _LOWEST_EXPONENT else _LOWEST_EXPONENT
    n = np.floor(fma(x, _LOG2_E, HALF))
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, x))
    series = fma(r, fma(r, fma(r, _E6, _E5), _E4), _E3)
    series = fma(r, fma(r, fma(r, series, _E2), ONE), ONE)
    return series * float_of((np.int32(n) + np.int32(127)) << np.int32(23))


# erf(z) = 1 - (a1 t + a2 t**2 + ... + a5 t**5) exp(-z**2) with t = 1 / (1 + p z), to 1.5e-7 for z >= 0
# (Abramowitz and Stegun 1964, 7.1.26).
_ERF_P = np.float32(0.3275911)
_A1, _A2, _A3 = np.float32(0.254829592), np.float32(-0.284496736), np.float32(1.421413741)
_A4, _A5 = np.float32(-1.453152027), np.float32(1.061405429)
_SQRT_HALF = np.float32(0.7071067811865476)


@njit(inline="always", **OPTIONS)
def gelu(x):
    """The exact GELU (Hendrycks and Gimpel 2016), x * Phi(x) with Phi(x) = (1 + erf(x / sqrt 2)) / 2.

    With z = |x| / sqrt 2 and tail = 1 - erf(z), that is max(x, 0) - |x| / 2 * tail for either sign of x.
    """
    size = abs(x)
    z = size * _SQRT_HALF
    t = ONE / fma(_ERF_P, z, ONE)
    series = fma(t, fma(t, fma(t, fma(t, _A5, _A4), _A3), _A2), _A1)
    tail = t * series * exp(-z * z)
    return fma(size * HALF, -tail, (x + size) * HALF)


_EPSILON = np.float32(1e-5)  # the default of torch.nn.LayerNorm


@njit(**OPTIONS)
def statistics(x):
    """Mean of a row, and the reciprocal of its standard deviation, for layer normalization."""
    n, row = x.shape[0], address_of(x)
    mean = total(row, n) / np.float32(n)
    variance = total_of_squares(row, n, mean) / np.float32(n)
    return mean, ONE / np.sqrt(variance + _EPSILON)


SMALLEST = np.float32(1e-30)  # numbers that are all smaller than this are quantized to zeros


@njit(**OPTIONS)
def largest(x, n):
    """The largest magnitude of the first n numbers.

    The bits of float32 numbers without a sign are in the order of the numbers. Comparing them as integers
    can be vectorized, and NaN counts as the largest.
    """
    bits = np.int32(0)
    for k in range(n):
        bits = max(bits, np.int32(bits_of(x[at(k)]) & NO_SIGN))
    return float_of(bits)


@njit(**OPTIONS)
def quantize(x, n, limit, out):
    """The first n numbers as integers of magnitude `limit` at most, in `out`; returns their scale and sum."""
    size = largest(x, n)
    inverse = limit / size if size > SMALLEST else ZERO
    integers_sum = np.int32(0)
    for k in range(n):
        number = np.int32(np.floor(fma(x[at(k)], inverse, HALF)))
        out[at(k)] = number
        integers_sum += number
    return size * (ONE / limit), integers_sum


@njit(inline="always", **OPTIONS)
def to_bfloat16(x):
    """The upper 16 bits of a float32 x >= 0, rounded up: numbers divided by a scale then stay in range."""
    return np.uint16((bits_of(x) + np.int32(0xFFFF)) >> np.int32(16))


@njit(inline="always", **OPTIONS)
def from_bfloat16(bits):
    return float_of(np.int32(bits) << np.int32(16))


@njit(inline="always", **OPTIONS)
def ordered(x):
    """The bits of a float32 as an int32 that is the larger the larger the number is, also below zero."""
    bits = bits_of(x)
    return np.int32(bits ^ ((bits >> np.int32(31)) & NO_SIGN))


@njit(inline="always", **OPTIONS)
def from_ordered(order):
    return float_of(order ^ ((order >> np.int32(31)) & NO_SIGN))
