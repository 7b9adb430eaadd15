"""The chain of frames of an MPEG audio (MP1, MP2, MP3) or ADTS (AAC) file, and the tags around it.

Sources: ISO/IEC 11172-3 and 13818-3 (frame header), 13818-7 (ADTS), the ID3v2.4, ID3v1, APEv2 and
Lyrics3v2 descriptions, the Xing/Info header as LAME writes it and Fraunhofer's VBRI.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

_MAX_SYNC_SEARCH = 1 << 16  # bytes of padding or leftovers that are looked through for a first frame
_MAX_GAPS = 100  # of damage in one file
_SYNC_FRAMES = 3  # in a row make a stream: two bytes of text may look like a header

_KBPS_V1 = {
    1: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_KBPS_V2 = {
    1: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    3: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_V1_HZ = (44100, 48000, 32000)
_ADTS_RATES_HZ = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)


@dataclass(frozen=True)
class Header:
    """One frame header, decoded."""

    length: int  # bytes, header included
    samples: int
    rate: int  # Hz
    layer: int  # 0: ADTS
    side_info: int  # bytes between the header and where a Xing header would be


@dataclass(frozen=True)
class Chain:
    """The frames of a file."""

    start: int  # byte of the first frame
    end: int  # byte behind the last whole frame
    frames: int  # whole ones, without the one that holds the Xing, Info or VBRI header
    frame_s: float
    promised: int | None  # frames by that header
    incomplete: bool  # the last frame's header is there and its end is not


def walk(file: BinaryIO, start: int, end: int, *, adts: bool) -> Chain | None:
    """Follow the frames between two places in the file; None where no three follow one another.

    Damage and tags between the frames are passed over, as decoders do.
    """
    first_at = _first_frame(file, start, end, adts)
    if first_at is None:
        return None
    first = _header_at(file, first_at, adts)
    assert first is not None
    info, promised = _vbr_header(file, first_at, first)
    at, count, sound_end, incomplete, gaps = first_at, 0, first_at, False, 0
    while at < end:
        header = _header_at(file, at, adts)
        if header is None or not _same_stream(header, first):
            resumed_at = _first_frame(file, at + 1, end, adts)
            gaps += 1
            if resumed_at is None or gaps > _MAX_GAPS:
                break
            at = resumed_at
        elif at + header.length > end:
            incomplete = True
            break
        else:
            at = sound_end = at + header.length
            count += 1
    return Chain(first_at, sound_end, count - info, first.samples / first.rate, promised, incomplete)


def id3v2_end(file: BinaryIO, at: int) -> int:
    """Behind the ID3v2 tags that begin at `at`, of which there may be several."""
    while True:
        head = _read(file, at, 10)
        if len(head) < 10 or head[:3] != b"ID3":
            return at
        length = 0
        for byte in head[6:10]:
            length = length << 7 | byte & 0x7F
        at += 10 + length + (10 if head[5] & 0x10 else 0)


def tags_start(file: BinaryIO, size: int) -> int:
    """Where the ID3v1, Lyrics3v2 and APEv2 tags at the end of the file begin."""
    end = size
    while (length := _tag_before(file, end)) and length <= end:
        end -= length
    return end


def _tag_before(file: BinaryIO, end: int) -> int:
    """Bytes of the tag that ends at `end`; 0 where there is none."""
    if end >= 128 and _read(file, end - 128, 3) == b"TAG":
        return 128
    if end >= 15 and _read(file, end - 9, 9) == b"LYRICS200":
        digits = _read(file, end - 15, 6)
        return int(digits) + 15 if digits.isdigit() else 0
    footer = _read(file, end - 32, 32) if end >= 32 else b""
    if footer[:8] == b"APETAGEX":
        has_header = int.from_bytes(footer[20:24], "little") >> 31
        return int.from_bytes(footer[12:16], "little") + 32 * has_header
    return 0


def _first_frame(file: BinaryIO, start: int, end: int, adts: bool) -> int | None:
    """The first place, not far from `start`, from which three frames follow one another."""
    data = _read(file, start, min(_MAX_SYNC_SEARCH, end - start))
    at = data.find(b"\xff")
    while at >= 0:
        if _is_stream(file, start + at, adts):
            return start + at
        at = data.find(b"\xff", at + 1)
    return None


def _is_stream(file: BinaryIO, at: int, adts: bool) -> bool:
    first = header = _header_at(file, at, adts)
    for _ in range(_SYNC_FRAMES - 1):
        if first is None or header is None or not _same_stream(header, first):
            return False
        at += header.length
        header = _header_at(file, at, adts)
    return first is not None and header is not None and _same_stream(header, first)


def _same_stream(a: Header, b: Header) -> bool:
    return (a.rate, a.layer, a.samples) == (b.rate, b.layer, b.samples)


def _header_at(file: BinaryIO, at: int, adts: bool) -> Header | None:
    head = _read(file, at, 7)
    if len(head) < 4 or head[0] != 0xFF:
        return None
    return _adts_header(head) if adts else _mpeg_header(head)


def _mpeg_header(head: bytes) -> Header | None:
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if head[1] & 0xE0 != 0xE0 or version == 1 or layer == 4 or rate == 3 or bit_rate in (0, 15):
        return None  # 0 is a free bit rate: legal, and all but extinct
    first_version = version == 3
    hz = _RATES_V1_HZ[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bps = 1000 * (_KBPS_V1 if first_version else _KBPS_V2)[layer][bit_rate - 1]
    samples = {1: 384, 2: 1152, 3: 1152 if first_version else 576}[layer]
    length = (12 * bps // hz + padding) * 4 if layer == 1 else samples // 8 * bps // hz + padding
    mono = head[3] >> 6 == 3
    side_info = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[
        first_version, mono
    ]
    return Header(length, samples, hz, layer, side_info)


def _adts_header(head: bytes) -> Header | None:
    rate = head[2] >> 2 & 15
    if len(head) < 7 or head[1] & 0xF6 != 0xF0 or rate >= len(_ADTS_RATES_HZ):
        return None
    length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    samples = 1024 * ((head[6] & 3) + 1)
    return Header(length, samples, _ADTS_RATES_HZ[rate], 0, 0) if length >= 7 else None


def _vbr_header(file: BinaryIO, at: int, header: Header) -> tuple[bool, int | None]:
    """Whether the frame at `at` holds the stream's header instead of sound, and the frames it promises."""
    if header.layer != 3:
        return False, None
    frame = _read(file, at, header.length)
    xing = frame[4 + header.side_info :][:16]
    if xing[:4] in (b"Xing", b"Info"):
        has_count = xing[7] & 1
        return True, int.from_bytes(xing[8:12], "big") or None if has_count else None
    vbri = frame[36:][:26]
    if vbri[:4] == b"VBRI":
        return True, int.from_bytes(vbri[14:18], "big") or None
    return False, None


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at, os.SEEK_SET)
    return file.read(max(0, count))
