"""Results as the bytes of the files that are published, which are read again to see that they are right.

That a disk keeps those bytes is checked in pipeline/fs/atomic.py.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pipeline import audio
from pipeline.audio.wav import Marker
from pipeline.config import Output
from pipeline.errors import EngineFailure
from pipeline.fs.arrays import read_arrays
from pipeline.records import SILENT_BELOW_DBFS, UNIT_LENGTH_TOLERANCE, Audio, Embedding, Samples

_BLOCK_FRAMES = 1 << 16


@dataclass(frozen=True)
class FileForm:
    """What a variation's file is, beside its sound."""

    output: Output
    tags: Mapping[str, str]
    markers: Sequence[Marker] = ()  # of its joins


def sound_file(made: Audio, form: FileForm) -> bytes:
    """A variation as a file.

    Raises:
        EngineFailure: it is not what it should be once it is decoded again, see `check_sound`.
    """
    file, output = io.BytesIO(), form.output
    audio.write_sound(
        file,
        made,
        format_name=output.format,
        bit_depth=output.bit_depth,
        tags=form.tags,
        markers=form.markers,
        is_loop=output.loop,
    )
    file.seek(0)
    check_sound(file, made.n_samples, made.sample_rate, made.channels)
    return file.getvalue()


def embedding_file(embedding: Embedding, dim: int) -> bytes:
    """An embedding as .npz.

    Raises:
        EngineFailure: it is not what `check_vectors` asks for.
    """
    n = len(embedding.windows)
    return _vectors_file(vars(embedding), {"track": (dim,), "windows": (n, dim), "times_s": (n, 2)})


def variations_file(vectors: Sequence[Samples], dim: int) -> bytes:
    """The vectors of a track's variations as .npz, with one array: variations (k, dim), float32.

    Raises:
        EngineFailure: they have another shape, are not finite or not of unit length.
    """
    return _vectors_file({"variations": np.stack(vectors)}, {"variations": (len(vectors), dim)})


def _vectors_file(arrays: Mapping[str, Samples], shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    file.seek(0)
    check_vectors(file, shapes)
    return file.getvalue()


def check_sound(file: BinaryIO, expected_samples: int, sample_rate: int, channels: int) -> None:
    """Check that a file decodes to `expected_samples` per channel, all finite and not silent.

    Raises:
        EngineFailure: it does not.
    """
    import soundfile

    try:
        with soundfile.SoundFile(file) as sound:
            found = (sound.samplerate, sound.channels)
            n_samples, peak = _played(sound)
    except soundfile.LibsndfileError as e:
        raise EngineFailure(f"the encoded file can't be decoded: {e}") from e
    if found != (sample_rate, channels):
        raise EngineFailure(f"the encoded file has {found[0]} Hz and {found[1]} channels")
    if n_samples != expected_samples:
        raise EngineFailure(f"the encoded file has {n_samples} samples, not {expected_samples}")
    if not np.isfinite(peak):
        raise EngineFailure("the encoded file has samples that are not finite")
    if peak < 10 ** (SILENT_BELOW_DBFS / 20):
        raise EngineFailure("the encoded file is silent")


def _played(sound: Any) -> tuple[int, float]:
    """Decoded samples per channel, whatever the header says, and their peak, which is NaN if any is NaN."""
    n_samples, peak = 0, 0.0
    while len(block := sound.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
        n_samples += len(block)
        peak = float(np.maximum(peak, np.max(np.abs(block))))  # NaN if either is NaN
    return n_samples, peak


def check_vectors(file: BinaryIO, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that an .npz file holds these arrays, finite, and that all but `times_s` are of unit length.

    Raises:
        EngineFailure: it does not.
    """
    try:
        arrays = read_arrays(file)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise EngineFailure(f"the embedding's file can't be read: {e}") from e
    if arrays.keys() != shapes.keys():
        raise EngineFailure(f"the embedding's file holds {', '.join(sorted(arrays)) or 'nothing'}")
    for name, array in arrays.items():
        if array.shape != shapes[name] or array.dtype != np.float32:
            found, meant = f"{array.dtype} {array.shape}", f"float32 {shapes[name]}"
            raise EngineFailure(f"the embedding's file has {name} as {found}, not {meant}")
        if not np.isfinite(array).all():
            raise EngineFailure(f"the embedding's file has numbers in {name} that are not finite")
    rows = np.vstack([array for name, array in arrays.items() if name != "times_s"])
    if not np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=UNIT_LENGTH_TOLERANCE):
        raise EngineFailure("the embedding's file has vectors that are not of unit length")
