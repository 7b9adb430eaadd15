"""What a file is by its first bytes: what a folder scan takes for audio, and what a refusal calls it.

The magic numbers come from the formats' own specifications.
"""

from __future__ import annotations

import re
from pathlib import PurePath

# Containers with a structure of their own. The pattern is matched at the beginning of the file.
_CONTAINERS = {
    "WAV": rb"(RIFF|RF64|BW64)....WAVE",
    "AVI": rb"RIFF....AVI ",
    "AIFF": rb"FORM....AIF[FC]",
    "MP4": rb"....(ftyp|moov|mdat|wide|free|skip|styp|moof)",
    "FLAC": rb"fLaC",
    "Ogg": rb"OggS\0",
    "Matroska": rb"\x1a\x45\xdf\xa3",
    "CAF": rb"caff",
    "AU": rb"\.snd",
    "Wave64": rb"riff\x2e\x91\xcf\x11",
    "Windows Media": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    "AMR": rb"#!AMR",
    "Monkey's Audio": rb"MAC ",
    "WavPack": rb"wvpk",
    "True Audio": rb"TTA[12]",
    "Musepack": rb"MPCK|MP\+",
    "TAK": rb"tBaK",
    "DSF": rb"DSD ",
    "RealMedia": rb"\.RMF",
    "Flash video": rb"FLV\x01",
}
# Streams of frames: MPEG audio and ADTS (not all bits of the header are possible), AC-3, DTS.
_FRAMES = rb"\xff[\xe2-\xe7\xf0-\xff][^\xf0-\xff]|\x0b\x77|\x7f\xfe\x80\x01"
_NOT_AUDIO = {
    "a MIDI file, which holds notes and no sound": rb"MThd|RIFF....RMID",
    "an HTML page": rb"(?i)\s*(<!doctype html|<html|<head)",
    "an XML file": rb"\s*<\?xml",
    "a playlist": rb"(?i)\s*(#EXTM3U|\[playlist\]|ffconcat)",
    "a ZIP archive": rb"PK\x03\x04|PK\x05\x06",
    "a compressed archive": rb"\x1f\x8b|Rar!|7z\xbc\xaf|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd",
    "a PDF document": rb"%PDF",
    "a picture": rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM....\0\0\0\0",
    "text": rb"[\t\n\r -~\x80-\xf7]+\Z|(\xff\xfe)([\t\n\r -~]\0)+\Z",
    "filled with zeros": rb"\0+\Z",
}

# Endings of audio files, and of films that may have audio.
# fmt: off
_ENDINGS = frozenset({
    "wav", "wave", "w64", "rf64", "bwf", "flac", "ogg", "oga", "opus", "spx", "mp3", "mp2", "mp1", "mpga",
    "m4a", "m4b", "m4r", "aac", "adts", "alac", "aif", "aiff", "aifc", "caf", "au", "snd", "wma", "asf",
    "amr", "ape", "wv", "tta", "mpc", "tak", "dsf", "ac3", "eac3", "dts", "mka", "mp4", "m4v", "mov",
    "3gp", "3g2", "mkv", "webm", "avi", "flv", "wmv", "mpg", "mpeg", "ts", "m2ts", "ogv", "ogm", "rm",
    "ra",
})
# fmt: on


def looks_like_audio(head: bytes, name: str) -> bool:
    """Whether a folder scan should take this file for audio: by its first 64 bytes, or by its ending.

    Either is enough: a wrongly named file is decoded by its content, and a damaged one deserves its error
    message instead of silence.
    """
    if PurePath(name).suffix.lower()[1:] in _ENDINGS:
        return True
    return head.startswith(b"ID3") or is_container(head) or begins_frames(head)


def is_container(head: bytes) -> bool:
    return any(_matches(pattern, head) for pattern in _CONTAINERS.values())


def begins_frames(head: bytes) -> bool:
    """Whether a stream of frames without a container may begin here."""
    return _matches(_FRAMES, head)


def is_mp4(head: bytes) -> bool:
    return _matches(_CONTAINERS["MP4"], head)


def describe(head: bytes) -> str:
    """Why a file that begins with `head`, behind its tags, can't be decoded."""
    no_audio = "is not audio in a format that can be read"
    if not head:
        return f"{no_audio}: it holds nothing but tags, or is cut off within them"
    if is_mp4(head):
        return "is cut off or damaged: its index (moov) is missing or can't be read"
    for name, pattern in _CONTAINERS.items():
        if _matches(pattern, head):
            return f"{no_audio}: it begins as {name}, but its header is damaged or incomplete"
    for what, pattern in _NOT_AUDIO.items():
        if _matches(pattern, head):
            return f"{no_audio}: it is {what}"
    return no_audio


def _matches(pattern: bytes, head: bytes) -> bool:
    return re.match(pattern, head, re.DOTALL) is not None
