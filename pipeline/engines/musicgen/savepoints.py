"""Tokens of unfinished variations, kept on the disk so that a killed run goes on where it was.

A file per request, a few kilobytes, written whole every few seconds of audio. Only tokens are
kept: noise is a function of the step, and keys and values outlive a kill in memory (`shm`) or are made
again from the tokens.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.engines.musicgen.decoder import Tokens
from pipeline.fs.atomic import write_atomically

log = logging.getLogger("pipeline")

SUFFIX = ".tokens.npz"
CLOSED = (errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Savepoints:
    """A folder of them."""

    folder: Path | None  # None: nothing is kept
    _told: list[str] = field(default_factory=list, compare=False)

    def load(self, identity: str, shape: tuple[int, int]) -> Tokens | None:
        """The codes (codebooks, frames) that were saved for a request, if there are any of that shape."""
        if self.folder is None:
            return None
        try:
            with np.load(io.BytesIO(self._path(identity).read_bytes()), allow_pickle=False) as saved:
                codes, whose = saved["codes"].astype(np.int64), str(saved["identity"])
        except Exception:  # not there, or damaged, of which the libraries raise anything
            return None  # then it is made from its beginning
        return codes if whose == identity and codes.shape == shape else None

    def save(self, identity: str, codes: Tokens) -> None:
        """A folder that can't be used is told once: the work goes on without.

        Raises:
            OSError: the disk is full, or fails.
        """
        if self.folder is None:
            return
        path = self._path(identity)
        try:
            write_atomically(
                path, path.with_suffix(".tmp"), partial(_write, identity, codes), verify=lambda file: None
            )
        except OSError as error:
            if error.errno not in CLOSED:
                raise
            if not self._told:
                log.warning("musicgen: unfinished tokens can't be kept (%s): a kill would lose them", error)
                self._told.append(str(error))

    def drop(self, identity: str) -> None:
        """Forget a request that is done with."""
        if self.folder is not None:
            with suppress(OSError):
                self._path(identity).unlink(missing_ok=True)

    def _path(self, identity: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{identity}{SUFFIX}"


def identity(*facts: Any) -> str:
    """A name for all that the tokens of a request depend on; the facts are JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _write(identity: str, codes: Tokens, out: BinaryIO) -> None:
    np.savez(out, codes=codes.astype(np.int16), identity=np.array(identity))
