"""The quantized layers of a checkpoint on the disk, with the passage and the report of the int8 check."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines.musicgen.decoder import Shape
from pipeline.engines.musicgen.int8_check import Int8Check, Passage
from pipeline.engines.musicgen.layers import Array, Stack, layout
from pipeline.fs.atomic import replacing

log = logging.getLogger("pipeline")

LAYOUT = 3  # version of the files' format
REPORT = "self-check.json"


def last_check(folder: Path) -> Int8Check | None:
    """The check of int8 at the last start; None if there was none."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        facts = json.loads((folder / REPORT).read_bytes())
        return Int8Check(**{**facts, "kl": tuple(facts["kl"]), "top1": tuple(facts["top1"])})
    return None


@dataclass(frozen=True, eq=False)
class QuantizedStore:
    """The files of one checkpoint."""

    folder: Path | None  # None: nothing is stored
    revision: str

    def stack(self, shape: Shape) -> Stack | None:
        """The quantized layers; None if they are not there or damaged."""
        if self.folder is None:
            return None
        try:
            with self._file(".int8").open("rb", buffering=0) as file:
                if file.read(len(self._header)) != self._header:
                    return None
                stack, digest = Stack.empty(shape, "int8"), hashlib.sha256()
                for name in layout(shape, "int8"):
                    _fill(file, stack.arrays[name])
                    digest.update(_bytes(stack.arrays[name]))
                return stack if file.read() == digest.digest() else None
        except (OSError, EOFError):
            return None

    def passage(self) -> Passage | None:
        """The passage of the int8 check; None if it is not there or damaged."""
        try:
            with np.load(io.BytesIO(self._file(".passage.npz").read_bytes()), allow_pickle=False) as saved:
                return Passage(saved["tokens"], saved["logits"])
        except Exception:  # no file, or a damaged one, for which the libraries raise any error
            return None

    def save(self, stack: Stack | None, passage: Passage | None, check: Int8Check) -> None:
        """Write what is not None, and the report. A disk that is full is logged, and nothing is stored."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if stack is not None:
                parts = [_bytes(stack.arrays[name]) for name in layout(stack.shape, "int8")]
                digest = hashlib.sha256()
                for part in parts:
                    digest.update(part)
                _write(self._file(".int8"), [self._header, *parts, digest.digest()])
            if passage is not None:
                content = io.BytesIO()
                np.savez(content, tokens=passage.tokens, logits=passage.logits)
                _write(self._file(".passage.npz"), [content.getbuffer()])
            _write(self.folder / REPORT, [json.dumps(asdict(check)).encode()])
        except OSError as error:
            log.warning(
                "musicgen: the quantized layers can't be stored (%s); the next start makes them again", error
            )

    def _file(self, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / ("".join(c if c.isalnum() else "-" for c in self.revision) + suffix)

    @property
    def _header(self) -> bytes:
        return f"int8 layers, layout {LAYOUT}, of {self.revision}\n".encode().ljust(256)


def _fill(file: Any, array: Array) -> None:
    """Read an array's bytes; EOFError if the file has too few."""
    rest = _bytes(array)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise EOFError
        rest = rest[count:]


def _bytes(array: Array) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data)


def _write(path: Path, parts: list[Any]) -> None:
    """Write a file of these bytes, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with replacing(path, temporary), temporary.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
