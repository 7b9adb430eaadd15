"""Checks of a file's content before it counts as published, on the bytes that were read back.

A verifier is given the complete file as a stream and raises EngineFailure if its content is wrong.
That the bytes are those that were written is checked in pipeline/fs/atomic.py.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from pipeline.errors import EngineFailure
from pipeline.records import SILENT_BELOW_DBFS, UNIT_LENGTH_TOLERANCE

Verifier = Callable[[BinaryIO], None]
_BLOCK_FRAMES = 1 << 16
_VECTORS = ("times_s", "track", "windows")


def sound(expected_samples: int, sample_rate: int, channels: int) -> Verifier:
    """The file decodes to `expected_samples` per channel, all finite and not silent."""

    def verify(file: BinaryIO) -> None:
        import soundfile

        try:
            with soundfile.SoundFile(file) as sound:
                found = (sound.samplerate, sound.channels)
                n_samples, peak = _played(sound)
        except soundfile.LibsndfileError as e:
            raise EngineFailure(f"the written file can't be decoded: {e}") from e
        if found != (sample_rate, channels):
            raise EngineFailure(f"the written file has {found[0]} Hz and {found[1]} channels")
        if n_samples != expected_samples:
            raise EngineFailure(f"the written file has {n_samples} samples, not {expected_samples}")
        if not np.isfinite(peak):
            raise EngineFailure("the written file has samples that are not finite")
        if peak < 10 ** (SILENT_BELOW_DBFS / 20):
            raise EngineFailure("the written file is silent")

    return verify


def _played(sound: Any) -> tuple[int, float]:
    """Decoded samples per channel, whatever the header says, and their peak, which is NaN if any is NaN."""
    n_samples, peak = 0, 0.0
    while len(block := sound.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
        n_samples += len(block)
        peak = float(np.maximum(peak, np.max(np.abs(block))))  # NaN if either is NaN
    return n_samples, peak


def embedding(dim: int, n_windows: int) -> Verifier:
    """The file holds track (dim,), windows (n_windows, dim), times_s (n_windows, 2), of unit length."""
    shapes = {"track": (dim,), "windows": (n_windows, dim), "times_s": (n_windows, 2)}

    def verify(file: BinaryIO) -> None:
        try:
            with np.load(file, allow_pickle=False) as loaded:
                arrays = {name: loaded[name] for name in loaded.files}
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as e:
            raise EngineFailure(f"the written embedding can't be read: {e}") from e
        if tuple(sorted(arrays)) != _VECTORS:
            raise EngineFailure(f"the written embedding holds {', '.join(sorted(arrays)) or 'nothing'}")
        for name, array in arrays.items():
            if array.shape != shapes[name] or array.dtype != np.float32:
                found, meant = f"{array.dtype} {array.shape}", f"float32 {shapes[name]}"
                raise EngineFailure(f"the written embedding has {name} as {found}, not {meant}")
            if not np.isfinite(array).all():
                raise EngineFailure(f"the written embedding has numbers in {name} that are not finite")
        lengths = np.linalg.norm(np.vstack([arrays["track"][None], arrays["windows"]]), axis=1)
        if not np.allclose(lengths, 1.0, atol=UNIT_LENGTH_TOLERANCE):
            raise EngineFailure("the written embedding has vectors that are not of unit length")

    return verify
