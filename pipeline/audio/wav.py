"""WAV files whose bytes depend on nothing but the sound and the tags.

Written here and not by libsndfile, which puts the time of day in the PEAK chunk of float files and its
own version behind the software tag. The layout is RIFF (Microsoft/IBM 1991, revised 1994): `fmt `,
`fact` for float, `LIST INFO` with the tags, `data`; the dither is TPDF of two quantization steps
(Lipshitz, Wannamaker, Vanderkooy 1992).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.records import Audio, Samples

BitDepth = Literal[16, 24, "float"]

# Name of a tag -> chunk of LIST INFO (RIFF 1991, chapter 2; ITRK as commonly used).
INFO_CHUNKS = {
    "title": b"INAM",
    "artist": b"IART",
    "album": b"IPRD",
    "comment": b"ICMT",
    "copyright": b"ICOP",
    "genre": b"IGNR",
    "software": b"ISFT",
    "source": b"ISRC",
    "track": b"ITRK",
}
_PCM, _IEEE_FLOAT = 1, 3
_MAX_RIFF_BYTES = 0xFFFFFFFF
_CHUNK_FRAMES = 1 << 16


def write_wav(
    file: BinaryIO, audio: Audio, *, bit_depth: BitDepth, tags: Mapping[str, str] | None = None
) -> None:
    """Write `audio` as a whole WAV file; the same values always give the same bytes.

    16-bit samples are dithered, save digital silence, which stays so; 24-bit ones are rounded. Full
    scale is 2**15 and 2**23, as decoders have it; what reaches +1 becomes the largest code below. Tags
    are UTF-8, by the names of `INFO_CHUNKS`.

    Raises:
        ValueError: a sample is not finite or beyond [-1, 1], a tag is unknown, or 4 GiB don't suffice.
    """
    _check_range(audio.samples)
    width = 4 if bit_depth == "float" else bit_depth // 8
    frame = width * audio.channels
    code = _IEEE_FLOAT if bit_depth == "float" else _PCM
    head = _chunk(
        b"fmt ",
        struct.pack(
            "<HHIIHH", code, audio.channels, audio.sample_rate, audio.sample_rate * frame, frame, 8 * width
        )
        + (b"\0\0" if bit_depth == "float" else b""),
    )
    if bit_depth == "float":
        head += _chunk(b"fact", struct.pack("<I", audio.n_samples))
    head += _info_list(tags or {})
    n_data = frame * audio.n_samples
    total = 4 + len(head) + 8 + n_data + n_data % 2
    if total > _MAX_RIFF_BYTES:
        raise ValueError(f"{audio.duration_s:.0f} s of sound don't fit a WAV file")
    file.write(b"RIFF" + struct.pack("<I", total) + b"WAVE" + head + b"data" + struct.pack("<I", n_data))
    _write_samples(file, audio.samples, bit_depth)
    file.write(b"\0" * (n_data % 2))


def read_wav_tags(path: str | os.PathLike[str]) -> dict[str, str]:
    """The LIST INFO tags of a WAV file, by the names of `INFO_CHUNKS`; other chunks are passed over."""
    names = {chunk: name for name, chunk in INFO_CHUNKS.items()}
    tags = {}
    with Path(path).open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            ident, size = head[:4], int.from_bytes(head[4:], "little")
            if ident == b"LIST" and file.read(4) == b"INFO":
                for key, value in _chunks(file.read(size - 4)):
                    if key in names:
                        tags[names[key]] = value.rstrip(b"\0").decode("utf-8", "replace")
                file.seek(size % 2, os.SEEK_CUR)
            else:
                file.seek(size + size % 2 - (4 if ident == b"LIST" else 0), os.SEEK_CUR)
    return tags


def _check_range(samples: Samples) -> None:
    peak = np.max(np.abs(samples), initial=0.0)
    if not peak <= 1.0:  # false for NaN as well
        raise ValueError(f"samples reach {peak:g}; a WAV file holds -1 to 1")


def _info_list(tags: Mapping[str, str]) -> bytes:
    unknown = sorted(set(tags) - set(INFO_CHUNKS))
    if unknown:
        raise ValueError(f"unknown WAV tags: {', '.join(unknown)}; known: {', '.join(INFO_CHUNKS)}")
    if not tags:
        return b""
    rows = (_chunk(INFO_CHUNKS[name], tags[name].encode() + b"\0") for name in INFO_CHUNKS if name in tags)
    return _chunk(b"LIST", b"INFO" + b"".join(rows))


def _chunk(ident: bytes, body: bytes) -> bytes:
    return ident + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        found.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return found


def _write_samples(file: BinaryIO, samples: Samples, bit_depth: BitDepth) -> None:
    dither = np.random.default_rng(0)  # fixed: the same sound gives the same bytes
    for start in range(0, samples.shape[1], _CHUNK_FRAMES):
        block = np.ascontiguousarray(samples[:, start : start + _CHUNK_FRAMES].T)
        if bit_depth == "float":
            file.write(block.astype("<f4").tobytes())
        elif bit_depth == 16:
            file.write(_to_int16(block, dither).tobytes())
        else:
            file.write(_to_int24(block))


def _to_int16(block: Samples, dither: np.random.Generator) -> NDArray[np.int16]:
    noise = dither.random(block.shape, dtype=np.float32) - dither.random(block.shape, dtype=np.float32)
    scaled = np.rint(block * np.float32(32768.0) + np.where(block == 0, np.float32(0), noise))
    return np.asarray(np.clip(scaled, -32768, 32767), dtype="<i2")


def _to_int24(block: Samples) -> bytes:
    whole = np.clip(np.rint(block.astype(np.float64) * 8388608.0), -8388608, 8388607).astype("<i4")
    return np.ascontiguousarray(whole.view(np.uint8).reshape(-1, 4)[:, :3]).tobytes()
