"""The quantized layers of a checkpoint on the disk, with the result of their int8 check.

They are in one file of numpy's npz format, which has a checksum for each array.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines.musicgen import precision_check
from pipeline.engines.musicgen.decoder import Shape
from pipeline.engines.musicgen.layers import Stack
from pipeline.engines.musicgen.precision_check import PrecisionCheck
from pipeline.fs.atomic import replacing

log = logging.getLogger("pipeline")

LAYOUT = 4  # version of the kernels' layout and of the file
SUFFIX = ".int8"


def path_of(folder: Path, revision: str) -> Path:
    """The file of a checkpoint, by its revision."""
    return folder / (name_of(revision) + SUFFIX)


def name_of(revision: str) -> str:
    """A revision as the stem of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in revision)


def last_check(folder: Path) -> PrecisionCheck | None:
    """The last check of layers that were made or read, or of half precision; None if there is none."""
    found = [*folder.glob(f"*{SUFFIX}"), *folder.glob("*.json")]
    files = sorted(found, key=lambda path: path.stat().st_mtime)
    try:
        if files[-1].suffix == ".json":
            return precision_check.read(files[-1])
        with files[-1].open("rb") as file, np.load(file, allow_pickle=False) as saved:
            return _check(saved)
    except Exception:  # no file, or a damaged one, for which the libraries raise any error
        return None


def read(path: Path, shape: Shape) -> tuple[Stack, PrecisionCheck] | None:
    """The layers and their check; None if the file is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            check, stack = _check(saved), Stack.empty(shape, "int8")
            for name, array in stack.arrays.items():
                array[:] = saved[name]
    except Exception:  # no file, or a damaged one, for which the libraries raise any error
        return None
    with suppress(OSError):
        path.touch()  # for `last_check`
    return stack, check


def _check(saved: Any) -> PrecisionCheck:
    if saved["layout"] != LAYOUT:
        raise ValueError("it has another layout")
    return PrecisionCheck(**json.loads(str(saved["check"])))


def save(path: Path, stack: Stack, check: PrecisionCheck) -> None:
    """Write a file. If the disk is full, that is logged, and nothing is stored."""
    temporary = path.with_suffix(".tmp")
    content: dict[str, Any] = {"layout": LAYOUT, "check": json.dumps(asdict(check)), **stack.arrays}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, temporary), temporary.open("wb") as file:
            np.savez(file, **content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        log.warning(
            "musicgen: the quantized layers can't be stored (%s): the next start makes them again", error
        )
