"""The processor that the kernels are compiled for, and the sizes of blocks that follow from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config
from numba.core.codegen import get_host_cpu_features

LANES = 16  # outputs that stand side by side in memory: the float32 numbers of an AVX-512 register

_FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
HAS_AVX512 = "+avx512f" in _FEATURES
# Width of vpdpbusd, which adds four products of bytes to each 32 bit number of a register; 0 without it.
DOT_BITS = 512 if "+avx512vnni" in _FEATURES else 256 if "+avxvnni," in f"{_FEATURES}," else 0
# AMX multiplies a matrix of 16 rows by one of 16 columns in one instruction.
HAS_AMX = HAS_AVX512 and "+amx-int8" in _FEATURES

# 32 bit words that four activations take: one of int8, or without vpdpbusd two pairs of int16.
QUAD_WORDS = 1 if DOT_BITS else 2

# Numbers of rows that the micro-kernel is compiled for, and of blocks of 16 columns at most. A row has 16
# sums in each block, which stay in registers: AVX-512 has 32 of 16 numbers, AVX2 16 of 8. Where there are
# enough, a tile of two blocks loads fewer activations per product than one of twice the rows.
TILE_ROWS = (8, 6, 4, 3, 2, 1) if HAS_AVX512 else (6, 5, 4, 3, 2, 1)
TILE_BLOCKS = 2 if HAS_AVX512 else 1
ROW_BLOCK = 32 if HAS_AVX512 else 24  # rows of activations that are packed together: a few tiles


def _tiles_of(rows: int) -> int:
    return 1 + _tiles_of(rows - int(TILE_OF[rows])) if rows else 0


# By a number of rows: the size of the first tile, and the number of tiles.
TILE_OF = np.array([max((n for n in TILE_ROWS if n <= rows), default=0) for rows in range(ROW_BLOCK + 1)])
TILES_OF = np.array([_tiles_of(rows) for rows in range(ROW_BLOCK + 1)])

# No fast math: the compiler would then reorder and fuse sums depending on the code around them, and a
# function that was just compiled would give other bits than the same function from numba's cache. The order
# of sums is fixed by `intrinsics.total`, and products and sums are fused where the code says `fma`.
# Division does not check for zero: a possible exception would keep a loop from being vectorized.
FLOATS: dict[str, Any] = {"error_model": "numpy"}
# For what only compiled functions call. Without the wrappers for Python, compiling takes a fifth less time.
OPTIONS = FLOATS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
