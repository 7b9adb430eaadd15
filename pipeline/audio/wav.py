"""Writing WAV files whose bytes depend only on the samples and the tags.

libsndfile is not used, because it writes the time of day into the PEAK chunk of float files and appends
its version to the software tag. The layout is RIFF (Microsoft/IBM 1991, revised 1994): `fmt `,
`fact` for float, `LIST INFO` with the tags, `smpl` for a loop, `cue ` and `LIST adtl` with the markers and
their labels, `data`; the dither is TPDF of two quantization steps
(Lipshitz, Wannamaker, Vanderkooy 1992).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.records import Audio, Samples

BitDepth = Literal[16, 24, "float"]

# Tag name -> chunk of LIST INFO (RIFF 1991, chapter 2).
INFO_CHUNKS = {"title": b"INAM", "comment": b"ICMT", "copyright": b"ICOP", "software": b"ISFT"}
_PCM, _IEEE_FLOAT = 1, 3
_MAX_RIFF_BYTES = 0xFFFFFFFF
_CHUNK_FRAMES = 1 << 16


@dataclass(frozen=True)
class Marker:
    """A cue point."""

    sample: int
    label: str


def write_wav(
    file: BinaryIO,
    audio: Audio,
    *,
    bit_depth: BitDepth,
    tags: Mapping[str, str],
    markers: Sequence[Marker] = (),
    is_loop: bool = False,
) -> None:
    """Write `audio` as a complete WAV file; equal arguments give equal bytes.

    16-bit samples are dithered, except digital silence; 24-bit samples are rounded. Full scale is 2**15
    and 2**23, as in decoders, and a sample of +1 becomes the largest code. Tags whose names are
    keys of `INFO_CHUNKS` are written, as UTF-8 and in the given order. `is_loop`: the whole file is a loop.

    Raises:
        ValueError: a sample is not finite or outside [-1, 1], or the file would exceed 4 GiB.
    """
    check_full_scale(audio)
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
    head += _info_list(tags) + (_sampler_loop(audio) if is_loop else b"") + _cue_points(markers)
    n_data = frame * audio.n_samples
    total = 4 + len(head) + 8 + n_data + n_data % 2
    if total > _MAX_RIFF_BYTES:
        raise ValueError(f"{audio.duration_s:.0f} s of audio do not fit in a WAV file")
    file.write(b"RIFF" + struct.pack("<I", total) + b"WAVE" + head + b"data" + struct.pack("<I", n_data))
    _write_samples(file, audio.samples, bit_depth)
    file.write(b"\0" * (n_data % 2))


def check_full_scale(audio: Audio) -> None:
    """Raise ValueError if a sample is not finite or outside [-1, 1]."""
    peak = np.max(np.abs(audio.samples), initial=0.0)
    if not peak <= 1.0:  # false for NaN as well
        raise ValueError(f"samples reach {peak:g}; a file holds -1 to 1")


def _info_list(tags: Mapping[str, str]) -> bytes:
    rows = [
        _chunk(INFO_CHUNKS[name], text.encode() + b"\0") for name, text in tags.items() if name in INFO_CHUNKS
    ]
    return _chunk(b"LIST", b"INFO" + b"".join(rows)) if rows else b""


def _sampler_loop(audio: Audio) -> bytes:
    """A `smpl` chunk: one endless loop from the first to the last sample, at middle C (MIDI 60)."""
    period_ns = round(1e9 / audio.sample_rate)
    sampler = struct.pack("<9I", 0, 0, period_ns, 60, 0, 0, 0, 1, 0)
    return _chunk(b"smpl", sampler + struct.pack("<6I", 0, 0, 0, audio.n_samples - 1, 0, 0))


def _cue_points(markers: Sequence[Marker]) -> bytes:
    if not markers:
        return b""
    points, labels = struct.pack("<I", len(markers)), b"adtl"
    for i, marker in enumerate(markers, 1):
        points += struct.pack("<II4sIII", i, marker.sample, b"data", 0, 0, marker.sample)
        labels += _chunk(b"labl", struct.pack("<I", i) + marker.label.encode() + b"\0")
    return _chunk(b"cue ", points) + _chunk(b"LIST", labels)


def _chunk(ident: bytes, body: bytes) -> bytes:
    return ident + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _write_samples(file: BinaryIO, samples: Samples, bit_depth: BitDepth) -> None:
    dither = np.random.default_rng(0)  # fixed, so that equal samples give equal bytes
    for start in range(0, samples.shape[1], _CHUNK_FRAMES):
        block = np.ascontiguousarray(samples[:, start : start + _CHUNK_FRAMES].T)
        if bit_depth == "float":
            file.write(block.astype("<f4").tobytes())
        elif bit_depth == 16:
            file.write(to_int16(block, dither).tobytes())
        else:
            file.write(to_int24(block).view(np.uint8).reshape(-1, 4)[:, :3].tobytes())


def to_int16(block: Samples, dither: np.random.Generator) -> NDArray[np.int16]:
    """Samples in 16 bits with TPDF dither, except digital silence."""
    noise = dither.random(block.shape, dtype=np.float32) - dither.random(block.shape, dtype=np.float32)
    scaled = np.rint(block * np.float32(32768.0) + np.where(block == 0, np.float32(0), noise))
    return np.asarray(np.clip(scaled, -32768, 32767), dtype="<i2")


def to_int24(block: Samples) -> NDArray[np.int32]:
    """Samples in 24 bits, rounded."""
    return np.clip(np.rint(block.astype(np.float64) * 8388608.0), -8388608, 8388607).astype("<i4")
