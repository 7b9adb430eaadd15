"""Whether a file ends where its container says it ends, found without decoding it.

By container: WAV, the size of the sound chunk; AIFF, AVI, ASF (WMA), Wave64, CAF and AU, the sizes of the
outermost chunks; FLAC, nothing here (its sample count is
compared after decoding); Ogg, the chain of pages (see `ogg`);
MPEG audio and ADTS, the chain of frames (see `mpeg`); MP4, boxes that end within the file and an index
(ISO/IEC 14496-12); Matroska, the size of the segment (RFC 8794).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.audio import mpeg, ogg
from pipeline.audio.cut import Cut
from pipeline.audio.sniff import Kind, kind_of

_HEAD_BYTES = 64
_MAX_CHUNKS = 100_000  # far more than real files have: a walk over crafted ones ends
_STREAMED_SIZES = range(0x7FFFF000, 0x100000000)  # what programs write that don't know the size yet


@dataclass(frozen=True)
class Found:
    """What a look at the container brought."""

    kind: Kind
    start: int  # first and
    end: int  # past-the-last byte that a decoder should see: tags around MPEG frames are left out
    cut: Cut | None = None
    promised_s: float | None = None  # length by the container, where the decoders don't tell


def inspect(file: BinaryIO, size: int) -> Found:
    """ScanResult at an open file of `size` bytes; reads its headers, its end or its frame headers only."""
    kind = kind_of(_read(file, 0, _HEAD_BYTES))
    start = 0
    if kind == "id3":
        start = mpeg.id3v2_end(file, 0)
        kind = kind_of(_read(file, start, _HEAD_BYTES))
        kind = "mpeg" if kind == "other" else kind  # padding behind the tag
    if kind in ("mpeg", "adts"):
        return _inspect_mpeg(file, start, size, kind)
    if kind == "ogg":
        pages = ogg.walk(file, size)
        return Found(kind, 0, size, pages.cut, pages.promised_s)
    check = _CHECKS.get(kind)
    return Found(kind, start, size, check(file, size) if check and start == 0 else None)


def _inspect_mpeg(file: BinaryIO, start: int, size: int, kind: Kind) -> Found:
    chain = mpeg.walk(file, start, mpeg.tags_start(file, size), adts=kind == "adts")
    if chain is None:
        return Found("other", 0, size)
    cut = None
    if chain.promised is not None and chain.frames < chain.promised - 1:
        cut = Cut(chain.promised * chain.frame_s, chain.frames * chain.frame_s)
    elif chain.incomplete and (chain.promised is None or chain.frames < chain.promised):
        promised_s = None if chain.promised is None else chain.promised * chain.frame_s
        cut = Cut(promised_s, chain.frames * chain.frame_s, "the end of its last frame")
    return Found(kind, chain.start, chain.end, cut)


def _wav(file: BinaryIO, size: int) -> Cut | None:
    """RIFF WAVE, RF64 and BW64 (EBU Tech 3306)."""
    byte_rate, long_size = 0, None
    for ident, at, length in _riff_chunks(file, size):
        if ident == b"fmt ":
            byte_rate = int.from_bytes(_read(file, at + 8, 4), "little")
        elif ident == b"ds64":
            long_size = int.from_bytes(_read(file, at + 8, 8), "little")
        elif ident == b"data":
            promised = long_size if length == 0xFFFFFFFF and long_size else length
            streamed = promised == 0 or promised in _STREAMED_SIZES
            if streamed or size - at >= promised:
                return None
            return Cut(promised / byte_rate, (size - at) / byte_rate) if byte_rate else Cut(None, None)
    return Cut(None, None, "its sound")


def _outer(
    layout: str, *, start: int = 0, counts_itself: bool = False
) -> Callable[[BinaryIO, int], Cut | None]:
    """A check that no outermost chunk, of the struct (name, length), goes past the end of the file."""
    header = struct.Struct(layout)

    def check(file: BinaryIO, size: int) -> Cut | None:
        at = start
        for _ in range(_MAX_CHUNKS):
            if at + header.size > size:
                break
            _, length = header.unpack(_read(file, at, header.size))
            if length <= 0 or length in _STREAMED_SIZES:
                return None  # the writer could not know it
            at += length + (0 if counts_itself else header.size)
        return Cut(None, None) if at > size else None

    return check


def _au(file: BinaryIO, size: int) -> Cut | None:
    offset, length = struct.unpack(">II", _read(file, 4, 8).ljust(8, b"\0"))
    return Cut(None, None) if length not in _STREAMED_SIZES and offset + length > size else None


def _riff_chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, place of the content and length of each chunk that begins within the file."""
    at = 12
    for _ in range(_MAX_CHUNKS):
        if at + 8 > size:
            return
        ident, length = struct.unpack("<4sI", _read(file, at, 8))
        yield ident, at + 8, length
        at += 8 + length + length % 2


def _mp4(file: BinaryIO, size: int) -> Cut | None:
    seen: dict[bytes, tuple[int, int]] = {}
    at = 0
    for _ in range(_MAX_CHUNKS):
        if at + 8 > size:
            break
        head = _read(file, at, 16)
        length, ident = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        elif length == 0:
            length = size - at
        if length < 8 or not ident.isascii():
            break  # padding or other data behind the last box
        seen.setdefault(ident, (at, length))
        if at + length > size:
            return Cut(_mp4_duration_s(file, seen), None, "its end" if b"moov" in seen else "its index")
        at += length
    return None if b"moov" in seen else Cut(None, None, "its index")


def _mp4_duration_s(file: BinaryIO, boxes: dict[bytes, tuple[int, int]]) -> float | None:
    """The movie header's duration, where the movie box is in front and whole."""
    if b"moov" not in boxes:
        return None
    at, length = boxes[b"moov"]
    moov = _read(file, at, min(length, 4096))
    header = moov.find(b"mvhd")
    if header < 0 or header + 36 > len(moov):
        return None
    if moov[header + 4] == 1:
        scale, duration = struct.unpack_from(">IQ", moov, header + 24)
    else:
        scale, duration = struct.unpack_from(">II", moov, header + 16)
    return duration / scale if scale and duration else None


def _matroska(file: BinaryIO, size: int) -> Cut | None:
    at = 0
    for _ in range(_MAX_CHUNKS):
        if at >= size:
            break
        head = _read(file, at, 16)
        ident_len = _vint_length(head[:1])
        length_len = _vint_length(head[ident_len : ident_len + 1])
        if not ident_len or not length_len:
            return None
        raw = int.from_bytes(head[ident_len : ident_len + length_len], "big")
        length = raw & ((1 << 7 * length_len) - 1)
        if length == (1 << 7 * length_len) - 1:
            return None  # of unknown size: a stream
        at += ident_len + length_len + length
    return Cut(None, None) if at > size else None


def _vint_length(first: bytes) -> int:
    return 9 - first[0].bit_length() if first and first[0] else 0


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at, os.SEEK_SET)
    return file.read(max(0, count))


_CHECKS: dict[Kind, Callable[[BinaryIO, int], Cut | None]] = {
    "wav": _wav,
    "aiff": _outer(">4sI"),
    "avi": _outer("<4sI"),
    "asf": _outer("<16sQ", counts_itself=True),
    "w64": _outer("<16sQ", counts_itself=True),
    "caf": _outer(">4sq", start=8),
    "au": _au,
    "mp4": _mp4,
    "matroska": _matroska,
}
