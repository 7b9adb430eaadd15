"""What this machine is, and how busy it is with other work than what is measured."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path

GIB = 1 << 30
BUSY_CORES = 0.1  # with more cores busy with other work, a step waits for its slowest thread
INSTRUCTIONS = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "amx_int8": "AMX"}


class Clock:
    """The processor time of the whole machine since this was created."""

    def __init__(self) -> None:
        self._began_s, self._busy_s = time.perf_counter(), _busy_s()

    def others_cores(self, ours_s: float = 0.0) -> float:
        """Cores busy since, apart from `ours_s` of processor time; 0 where the system does not report it."""
        busy_s, took_s = _busy_s() - self._busy_s, time.perf_counter() - self._began_s
        return max(0.0, busy_s - ours_s) / took_s


def busy_cores(seconds: float = 5.0) -> float:
    """Cores that other programs keep busy, measured by waiting."""
    clock, ours_s = Clock(), time.process_time()
    time.sleep(seconds)
    return clock.others_cores(time.process_time() - ours_s)


def name() -> str:
    """The processor, its cores and those of its instructions that matter here, and the memory."""
    about = read("/proc/cpuinfo")
    found = dict(re.findall(r"^(model name|cpu family|model|flags)\s*: (.*)$", about, re.MULTILINE))
    words = found.get("flags", "").split()
    has = [text for flag, text in INSTRUCTIONS.items() if flag in words] or ["no VNNI"]
    processor = found.get("model name", platform.processor() or platform.machine())
    return (
        f"{processor} (family {found.get('cpu family', '?')}, model {found.get('model', '?')};"
        f" {', '.join(has)}), {os.cpu_count()} cores, {total_bytes() / GIB:.1f} GiB"
    )


def available_bytes() -> int | None:
    """Memory available without swapping; None where the system does not report it."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", read("/proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def total_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read(path: str) -> str:
    """The text of one of the system's files; empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _busy_s() -> float:
    """Processor time since the start: user, nice, system, interrupts, and what the host gave to others."""
    fields = read("/proc/stat").split("\n", 1)[0].split()
    ticks = [int(field) for field in fields[1:]]
    return sum(ticks[:3] + ticks[5:8]) / os.sysconf("SC_CLK_TCK") if ticks else 0.0
