"""What the bits of a result can depend on beside its record: versions, processor and threads."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import __version__
from pipeline.engines import cards

PYTHON, PROGRAM = "Python", "instrumental-variations"
ALWAYS = ("numpy",)  # packages that make results whatever the engines are
OF_SOUND = ("av", "pyloudnorm", "python-stretch", "scipy", "soundfile", "soxr")  # and those of every sound
NONE = "none"  # the version of a package that is not installed


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions here of Python, this program and the packages.

    A build's own part is left out: torch for the CPU and for CUDA are the same version.
    """
    found = {PYTHON: f"{sys.version_info.major}.{sys.version_info.minor}", PROGRAM: __version__}
    for name in sorted({*ALWAYS, *packages}):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = NONE
    return found


def made_with(generator: str) -> dict[str, str]:
    """What makes the takes of a generator in this process, by name; the packages are those installed."""
    found = {name: have for name, have in _installed(generator).items() if have != NONE}
    if torch := sys.modules.get("torch"):
        found["threads"] = str(torch.get_num_threads())
    return found


@cache
def _installed(generator: str) -> dict[str, str]:
    card = cards().get(generator)
    return {**versions([*OF_SOUND, *(card.packages if card else ())]), "processor": _processor()}


def _processor() -> str:
    """The name of the processor, or of its kind where the system doesn't tell."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
