"""The tokens of unfinished variations, saved to disk so that a run that was killed can be resumed.

There is one file per request, a few kilobytes, replaced every few seconds of audio. Nothing but
tokens is saved: the noise is a function of the step, and keys and values are computed again from the
tokens.
"""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.engines.musicgen.decoder import Tokens
from pipeline.fs.atomic import write_atomically

SUFFIX = ".tokens.npz"


@dataclass(frozen=True)
class Savepoints:
    """The savepoints of one home."""

    folder: Path | None  # None: nothing is saved

    def load(self, identity: str, shape: tuple[int, int]) -> Tokens | None:
        """The codes (codebooks, frames) saved for a request; None if there are none of that shape."""
        if self.folder is None:
            return None
        try:
            with np.load(io.BytesIO(self._path(identity).read_bytes()), allow_pickle=False) as saved:
                codes = saved["codes"].astype(np.int64)
        except Exception:  # no file, or a damaged one, for which the libraries raise any error
            return None
        return codes if codes.shape == shape else None

    def save(self, identity: str, codes: Tokens) -> None:
        """Replace a request's savepoint.

        Raises:
            OSError: the disk is full, or the folder can't be written.
        """
        if self.folder is None:
            return
        path, content = self._path(identity), io.BytesIO()
        np.savez(content, codes=codes.astype(np.int16))
        write_atomically(path, path.with_suffix(".tmp"), content.getbuffer())

    def drop(self, identity: str) -> None:
        """Delete the savepoint of a finished request."""
        if self.folder is not None:
            with suppress(OSError):
                self._path(identity).unlink(missing_ok=True)

    def _path(self, identity: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{identity}{SUFFIX}"
