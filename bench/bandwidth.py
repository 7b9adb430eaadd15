"""How fast this machine reads memory, and the upper limit that it sets to the speed of generation.

    python bench/bandwidth.py

A step has to read all of the decoder's weights once, however many rows there are, and the keys and
values of every row's positions. This floor leaves out prefill, sampling, EnCodec and all arithmetic, and
the embeddings, of which only a few rows are read. It counts a prefix once for each row that has it: rows that
share a prefix and read it once could be faster by an eighth with eight variations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

FRAME_RATE = 50
PREFIX = 235 + 4  # chroma and a short prompt


@dataclass(frozen=True)
class Bandwidth:
    """Memory read by all cores at once, over an array far larger than the caches."""

    bytes_per_s: float  # the best of all passes
    passes: tuple[tuple[str, float, float], ...]  # library, the best and the median in bytes per second


@dataclass(frozen=True)
class Decoder:
    """The sizes that decide how much is read; those of facebook/musicgen-melody."""

    layers: int = 48
    hidden: int = 1536
    ffn: int = 6144
    codebooks: int = 4
    vocabulary: int = 2048

    @property
    def weights(self) -> int:
        """Weights that a step reads: the layers' matrices and the LM heads."""
        layer = 4 * self.hidden**2 + 2 * self.hidden * self.ffn
        return self.layers * layer + self.codebooks * self.vocabulary * self.hidden

    @property
    def cached_values(self) -> int:
        """Keys and values of one position of one row."""
        return self.layers * self.hidden * 2


@dataclass(frozen=True)
class Floor:
    """The time of reading alone for some variations of a track at once, with guidance."""

    precision: str
    variations: int
    bytes_per_step: float  # the mean over the piece
    step_s: float  # the mean
    per_second: float  # seconds per second of audio


def floor(
    bandwidth: Bandwidth,
    variations: int,
    precision: str = "int8",
    *,
    duration_s: float = 30.0,
    prefix: int = PREFIX,
    decoder: Decoder | None = None,
) -> Floor:
    """Weights once and 2 * variations rows of keys and values per step, all at one precision."""
    decoder = decoder or Decoder()
    item_bytes = {"int8": 1, "float32": 4}[precision]
    steps = FRAME_RATE * duration_s + decoder.codebooks - 1
    mean_positions = prefix + (steps + 1) / 2
    cache = 2 * variations * mean_positions * decoder.cached_values
    per_step = item_bytes * (decoder.weights + cache)
    step_s = per_step / bandwidth.bytes_per_s
    return Floor(precision, variations, per_step, step_s, step_s * steps / (variations * duration_s))


def measure(size_bytes: int = 2 << 30, passes: int = 6) -> Bandwidth:
    """Sum an array with all cores, by numba and by torch; takes a few seconds and `size_bytes` of memory."""
    numbers = np.ones(size_bytes // 4, np.float32)
    timed = []
    for name, total in (("numba", _numba_sum()), ("torch", _torch_sum())):
        rates = []
        for _ in range(passes + 1):
            began_s = time.perf_counter()
            total(numbers)
            rates.append(numbers.nbytes / (time.perf_counter() - began_s))
        timed.append((name, max(rates[1:]), statistics.median(rates[1:])))  # the first one compiles
    return Bandwidth(max(best for _, best, _ in timed), tuple(timed))


def _numba_sum() -> Callable[[np.ndarray], Any]:
    import numba

    @numba.njit(parallel=True, fastmath=True)
    def total(numbers):  # type: ignore[no-untyped-def]
        parts = numba.get_num_threads() * 8
        sums = np.zeros(parts, np.float32)
        for part in numba.prange(parts):
            piece = numbers[part * numbers.size // parts : (part + 1) * numbers.size // parts]
            sum_ = np.float32(0)
            for i in range(piece.size):  # from 0: numba then vectorizes the loop
                sum_ += piece[i]
            sums[part] = sum_
        return sums.sum()

    return total  # type: ignore[no-any-return, unused-ignore]


def _torch_sum() -> Callable[[np.ndarray], Any]:
    import torch

    return lambda numbers: torch.from_numpy(numbers).sum().item()


def describe(bandwidth: Bandwidth) -> list[str]:
    """Lines with the measurement and the floors."""
    measured = "; ".join(
        f"{name} {best / 1e9:.1f} (median {median / 1e9:.1f})" for name, best, median in bandwidth.passes
    )
    lines = [f"memory read: {bandwidth.bytes_per_s / 1e9:.1f} GB/s ({measured})"]
    for precision in ("int8", "float32"):
        for variations in (1, 2, 4, 8):
            least = floor(bandwidth, variations, precision)
            lines.append(
                f"  floor, {precision}, K = {variations}, 30 s: {least.bytes_per_step / 1e9:.2f} GB"
                f" and {least.step_s:.3f} s a step, {least.per_second:.2f} s per second of audio"
            )
    return lines


def main() -> None:
    print("\n".join(describe(measure())))


if __name__ == "__main__":
    main()
