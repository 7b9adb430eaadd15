"""Memory: how many rows go together, and giving back what isn't needed."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("pipeline")

MOST_ROWS = 16  # eight variations with guidance; beyond, a CPU's time grows with the rows
LEAST_ROWS = 2  # one variation
SHARE_OF_FREE = 0.6  # of what the system has free, if no limit is set


def rows_at_once(
    needs: Callable[[int], float],
    wanted: int,
    max_memory_gb: float | None,
    aside_bytes: int = 0,
    held_bytes: int = 0,
) -> int:
    """Rows: `wanted` at most, and at least those of one variation.

    `needs` says how many bytes so many rows take. `max_memory_gb` is the whole process's limit; what
    it has already counts, and `aside_bytes` are left for others. `held_bytes` are taken on the system,
    but for this.
    """
    if max_memory_gb is not None:
        free = max_memory_gb * 1e9 - _resident_bytes()
    else:
        free = SHARE_OF_FREE * (held_bytes + available_bytes())
    free -= aside_bytes
    least = needs(LEAST_ROWS)
    if max_memory_gb is not None and free < least:
        log.warning(
            "generate.max_memory_gb: %.1f GB can't be kept; one variation at a time takes %.1f GB",
            max_memory_gb,
            max_memory_gb + (least - free) / 1e9,
        )
    possible = range(min(wanted, MOST_ROWS), LEAST_ROWS, -1)
    return next((rows for rows in possible if needs(rows) <= free), LEAST_ROWS)


def tidy() -> None:
    """Give back what was let go of.

    The library's models hold themselves, and all of their files mapped, in cycles; and glibc keeps
    what is freed, most of all after compiling.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> float:
    """Of this process; 0 where the system doesn't tell."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))
    return 0.0


def available_bytes() -> float:
    """What can be taken without swapping; infinite where the system doesn't tell."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float("inf")
