"""The tokens of unfinished variations, saved to disk so that a run that was killed can be resumed.

There is one file per request, a few kilobytes, replaced every few seconds of audio. Nothing but
tokens is saved: the noise is a function of the step, and keys and values are computed again from the
tokens.
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
NOT_WRITABLE = (errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Savepoints:
    """The savepoints of one home."""

    folder: Path | None  # None: nothing is saved
    _warnings: list[str] = field(default_factory=list, compare=False)

    def load(self, identity: str, shape: tuple[int, int]) -> Tokens | None:
        """The codes (codebooks, frames) saved for a request; None if there are none of that shape."""
        if self.folder is None:
            return None
        try:
            with np.load(io.BytesIO(self._path(identity).read_bytes()), allow_pickle=False) as saved:
                codes, saved_identity = saved["codes"].astype(np.int64), str(saved["identity"])
        except Exception:  # no file, or a damaged one, for which the libraries raise any error
            return None
        return codes if saved_identity == identity and codes.shape == shape else None

    def save(self, identity: str, codes: Tokens) -> None:
        """Replace a request's savepoint. A folder that can't be written is logged once, and nothing is saved.

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
            if error.errno not in NOT_WRITABLE:
                raise
            if not self._warnings:
                log.warning("musicgen: unfinished tokens can't be saved (%s): a kill would lose them", error)
                self._warnings.append(str(error))

    def drop(self, identity: str) -> None:
        """Delete the savepoint of a finished request."""
        if self.folder is not None:
            with suppress(OSError):
                self._path(identity).unlink(missing_ok=True)

    def _path(self, identity: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{identity}{SUFFIX}"


def identity(*facts: Any) -> str:
    """A digest of everything that the tokens of a request depend on, given as JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _write(identity: str, codes: Tokens, out: BinaryIO) -> None:
    np.savez(out, codes=codes.astype(np.int16), identity=np.array(identity))
