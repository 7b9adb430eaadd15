"""The tokens of unfinished variations, saved so that a run that was killed can be resumed.

There is one file per request, a few kilobytes, replaced every few seconds of audio. Nothing but
tokens is saved: the noise is a function of the step, and keys and values are computed again from the
tokens. A worker that doesn't reach the state folder saves them in the bucket of the outbox, if there is one.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from pipeline.engines.base import UNFINISHED, EngineSettings
from pipeline.engines.musicgen.decoder import Tokens
from pipeline.errors import PipelineError
from pipeline.fs.atomic import write_atomically
from pipeline.fs.bucket import BucketFiles

SUFFIX = ".tokens.npz"
BUCKET_EVERY_S = 60.0  # a call of a bucket takes some 50 ms; a minute of work is what a loss costs

log = logging.getLogger("pipeline")


@dataclass
class Savepoints:
    """The savepoints of one home."""

    folder: Path | None  # None: nothing is saved

    def load(self, identity: str, shape: tuple[int, int]) -> Tokens | None:
        """The codes (codebooks, frames) saved for a request; None if there are none of that shape."""
        if self.folder is None:
            return None
        try:
            content = io.BytesIO(self._read(self._path(identity)))
            with np.load(content, allow_pickle=False) as saved:
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
        content = io.BytesIO()
        np.savez(content, codes=codes.astype(np.int16))
        self._write(self._path(identity), content.getvalue())

    def drop(self, identity: str) -> None:
        """Delete the savepoint of a finished request."""
        if self.folder is not None:
            self._delete(self._path(identity))

    def _read(self, path: Path) -> bytes:
        return path.read_bytes()

    def _write(self, path: Path, content: bytes) -> None:
        write_atomically(path, path.with_suffix(".tmp"), content)

    def _delete(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def _path(self, identity: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{identity}{SUFFIX}"


@dataclass
class BucketSavepoints(Savepoints):
    """Savepoints in a bucket, by the credentials in this process's environment.

    They are written at most once a minute each, in a thread of its own, so that the decoder doesn't wait.
    If the bucket can't be used, nothing more is saved until the engine is loaded again.
    """

    clock: Callable[[], float] = time.monotonic
    _saved_at: dict[Path, float] = field(default_factory=dict)
    _is_usable: bool = True
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "savepoints"))

    @cached_property
    def _files(self) -> BucketFiles:
        assert self.folder is not None
        return BucketFiles(self.folder)

    def _read(self, path: Path) -> bytes:
        found: list[bytes] = []
        self._use(lambda: found.append(self._files.read(path)))
        return b"".join(found)

    def _write(self, path: Path, content: bytes) -> None:
        now = self.clock()
        if now - self._saved_at.setdefault(path, now) >= BUCKET_EVERY_S:
            self._saved_at[path] = now
            self._thread.submit(self._use, partial(self._files.write, path, content))

    def _delete(self, path: Path) -> None:
        self._saved_at.pop(path, None)
        self._thread.submit(self._use, partial(self._files.delete, path))

    def _use(self, call: Callable[[], object]) -> None:
        if not self._is_usable:
            return
        try:
            call()
        except FileNotFoundError:
            pass
        except (OSError, PipelineError) as e:
            self._is_usable = False
            log.info("the tokens of unfinished variations are not saved: %s", e)


def savepoints_for(settings: EngineSettings, name: str) -> Savepoints:
    """Where an engine of that name saves with these settings."""
    if settings.state_dir is None and settings.bucket_dir is not None:
        return BucketSavepoints(settings.bucket_dir / name / UNFINISHED)
    return Savepoints(settings.state_dir and settings.state_dir / name / UNFINISHED)
