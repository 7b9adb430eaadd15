"""Functions of single numbers and rows in float32: statistics, quantization, bfloat16."""

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
