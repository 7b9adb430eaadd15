"""Weights in the layout and precision that the kernels read, made by numpy."""

from __future__ import annotations

import numpy as np

from pipeline.engines.musicgen.kernels.processor import LANES


def pack_columns(weights: np.ndarray) -> np.ndarray:
    """float32 or int8 (outputs, inputs) to (outputs / 16, inputs * 16): each input of 16 outputs together.

    Of int8, four inputs of each output stand together, as uint8 with 128 added: vpdpbusd and AMX multiply
    unsigned bytes by signed ones.
    """
    outputs, inputs = weights.shape
    together = 4 if weights.dtype == np.int8 else 1
    if weights.dtype == np.int8:
        weights = weights.view(np.uint8) ^ np.uint8(128)
    split = weights.reshape(outputs // LANES, LANES, inputs // together, together)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(outputs // LANES, inputs * LANES)


def quantize_rows(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (outputs, inputs) to int8 and a scale per output: weights are about int8 * scale."""
    scales = np.abs(weights).max(axis=1) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(weights * inverse[:, None]).astype(np.int8), scales.astype(np.float32)


def aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of zeros that begins at a cache line; the system provides its memory when it is used."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes].view(dtype).reshape(shape)
