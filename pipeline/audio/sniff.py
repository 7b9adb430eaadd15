"""What a file is by its first bytes: which decoder to try first, and what a folder scan may skip.

Source of the magic numbers: the formats' own specifications (RIFF, RFC 9639 for FLAC, RFC 3533 for
Ogg, ISO/IEC 11172-3 and 13818-7 for MPEG audio, ISO/IEC 14496-12 for MP4, RFC 8794 for EBML).
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

Kind = Literal[
    "wav",
    "aiff",
    "flac",
    "ogg",
    "mpeg",
    "adts",
    "mp4",
    "matroska",
    "caf",
    "au",
    "w64",
    "asf",
    "avi",
    "id3",
    "other",
]

_MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"moof")

_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b"ID3", "id3"),
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"caff", "caf"),
    (b".snd", "au"),
    (b"riff\x2e\x91\xcf\x11", "w64"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
)

# Beginnings of more that FFmpeg reads and people keep: AMR, Monkey's Audio, WavPack, True Audio, Musepack,
# TAK, DSF, AC-3, DTS, RealAudio, Flash. Only a scan asks for these.
_OTHER_HEADS = (
    b"#!AMR", b"MAC ", b"wvpk", b"TTA", b"MPCK", b"MP+", b"tBaK", b"DSD ", b"\x0b\x77", b"\x7f\xfe\x80\x01",
    b".RMF", b"FLV",
)  # fmt: skip

# Endings of sound files, and of films that may have sound.
# fmt: off
_ENDINGS = frozenset({
    "wav", "wave", "w64", "rf64", "bwf", "flac", "ogg", "oga", "opus", "spx", "mp3", "mp2", "mp1", "mpga",
    "m4a", "m4b", "m4r", "aac", "adts", "alac", "aif", "aiff", "aifc", "caf", "au", "snd", "wma", "asf",
    "amr", "ape", "wv", "tta", "mpc", "tak", "dsf", "ac3", "eac3", "dts", "mka", "mp4", "m4v", "mov",
    "3gp", "3g2", "mkv", "webm", "avi", "flv", "wmv", "mpg", "mpeg", "ts", "m2ts", "ogv", "ogm", "rm",
    "ra",
})
# fmt: on


def kind_of(head: bytes) -> Kind:
    """The container that `head`, the first 64 bytes or more of a file, announces."""
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[4:8] in _MP4_FIRST_BOXES:
        return "mp4"
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None) or _mpeg_kind(head)


def _mpeg_kind(head: bytes) -> Kind:
    """MPEG audio and ADTS share the sync word; the two layer bits are zero in ADTS alone."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return "other"
    if head[1] & 0xF6 == 0xF0:
        return "adts"
    reserved = head[1] & 0x18 == 0x08 or head[1] & 0x06 == 0 or head[2] & 0x0C == 0x0C or head[2] >> 4 == 15
    return "other" if reserved else "mpeg"


def looks_like_audio(head: bytes, name: str) -> bool:
    """Whether a folder scan should take this file for sound: by its first 64 bytes, or by its ending.

    Either is enough: a wrongly named file is still decoded by its content, and a damaged one deserves
    its error message rather than silence.
    """
    if PurePath(name).suffix.lower()[1:] in _ENDINGS:
        return True
    return kind_of(head) != "other" or head.startswith(_OTHER_HEADS)
