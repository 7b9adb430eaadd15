"""How many rows the memory allows, and returning unused memory to the system."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("pipeline")

LEAST_ROWS = 2  # one variation
SHARE_OF_FREE = 0.6  # of what the system has free, if no limit is set
SHARE_OF_DEVICE = 0.9  # of what a GPU has free, which is rarely used by others


def rows_at_once(
    bytes_of_rows: Callable[[int], float],
    wanted: int,
    max_memory_gb: float | None,
    reserved_bytes: int = 0,
    device: str = "cpu",
) -> int:
    """Number of rows to run together: `wanted` at most, and at least those of one variation.

    Args:
        bytes_of_rows: memory that a number of rows takes.
        wanted: number of rows that there is work for, or that are useful.
        max_memory_gb: limit for the whole process, what it holds already included.
        reserved_bytes: to be left for decoding.
        device: whose memory it is.
    """
    held, available, share = _resident_bytes(), _available_bytes(), SHARE_OF_FREE
    if device != "cpu":
        (held, available), share = _of_device(device), SHARE_OF_DEVICE
    free = share * available if max_memory_gb is None else max_memory_gb * 1e9 - held
    free -= reserved_bytes
    least = bytes_of_rows(LEAST_ROWS)
    if max_memory_gb is not None and free < least:
        log.warning(
            "generate.musicgen.max_memory_gb: %.1f GB are not enough; one variation at a time takes %.1f GB",
            max_memory_gb,
            max_memory_gb + (least - free) / 1e9,
        )
    possible = range(wanted, LEAST_ROWS, -1)
    return next((rows for rows in possible if bytes_of_rows(rows) <= free), LEAST_ROWS)


def is_exhausted(error: Exception) -> bool:
    """Whether it says that the machine or a GPU has no more memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's


def return_unused() -> None:
    """Return memory to the system that is not referenced any more.

    The library's models refer to themselves, and to their whole mapped files, in cycles; and glibc
    keeps freed memory, most of all after compiling.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _of_device(device: str) -> tuple[float, float]:
    """Bytes of a GPU's memory that this process uses, and that are free for it."""
    import torch

    used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return used, torch.cuda.mem_get_info(device)[0] + reserved - used


def _resident_bytes() -> float:
    """Resident memory of this process in bytes; 0 where the system does not report it."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))
    return 0.0


def _available_bytes() -> float:
    """Memory that is available without swapping; infinite where the system does not report it."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float("inf")
