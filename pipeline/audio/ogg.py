"""The chain of pages of an Ogg file (RFC 3533), followed by their headers alone.

A whole file ends with a whole page that is marked as the end of its stream. The granule position of
that page is the length, in samples of the rate that the first packet states (Vorbis I, 4.2.2; at
48 kHz after a pre-skip for Opus, RFC 7845).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.audio.cut import Cut
from pipeline.errors import BadAudio

_HEADER = struct.Struct("<4sBBqIIIB")
_FIRST, _LAST = 0x02, 0x04
_MAX_PAGE = 27 + 255 + 255 * 255
_MAX_START_S = 5.0  # a first page beyond this comes from the middle of a broadcast: no length then
_OPUS_RATE_HZ = 48_000


@dataclass(frozen=True)
class Pages:
    """What the pages say."""

    cut: Cut | None
    promised_s: float | None  # None: more than one stream, an unknown codec or a broadcast


@dataclass(frozen=True)
class _Page:
    flags: int
    granule: int
    content_at: int
    end: int


def walk(file: BinaryIO, size: int) -> Pages:
    """ScanResult at every page header.

    Raises:
        BadAudio: streams follow one another, of which decoders read the first one only.
    """
    first = last = None
    start_granule, n_streams = 0, 0
    for page in _pages(file, size):
        if page.flags & _FIRST:
            n_streams += 1
            if last is not None and not last.flags & _FIRST:
                raise BadAudio(
                    "is several Ogg streams one after another; join them to one, or split the file"
                )
        first, last = first or page, page
        start_granule = start_granule or max(0, page.granule)
    if first is None or last is None or last.end > size or not last.flags & _LAST:
        return Pages(Cut(None, None, "its last page"), None)
    rate, skip = _rate_and_skip(file, first)
    if n_streams != 1 or not rate or start_granule > _MAX_START_S * rate:
        return Pages(None, None)
    return Pages(None, (last.granule - skip) / rate)


def _pages(file: BinaryIO, size: int) -> Iterator[_Page]:
    """Every page in order; damage between two of them is passed over, padding behind the last as well."""
    at = 0
    while at < size:
        head = _read(file, at, _HEADER.size + 255)
        if not head.startswith(b"OggS"):
            found = _read(file, at, 2 * _MAX_PAGE).find(b"OggS")
            if found < 0:
                return
            at += found
        elif len(head) < _HEADER.size:
            return
        else:
            _, _, flags, granule, _, _, _, n_segments = _HEADER.unpack_from(head)
            table = head[_HEADER.size :][:n_segments]
            content_at = at + _HEADER.size + n_segments
            yield _Page(flags, granule, content_at, content_at + sum(table))
            at = content_at + sum(table)


def _rate_and_skip(file: BinaryIO, page: _Page) -> tuple[int, int]:
    """Granules per second and granules before the sound begins; (0, 0) for codecs not known here."""
    packet = _read(file, page.content_at, 64)
    if packet.startswith(b"\x01vorbis"):
        return int.from_bytes(packet[12:16], "little"), 0
    if packet.startswith(b"OpusHead"):
        return _OPUS_RATE_HZ, int.from_bytes(packet[10:12], "little")
    return 0, 0


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at, os.SEEK_SET)
    return file.read(count)
