"""File names, which may be any bytes, for display and as names of folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.fs.names import MAX_NAME_BYTES, printable, track_name

HOSTILE = [
    b"plain.wav",
    b"two words 'and' \"quotes\".mp3",
    b"\xf0\x9f\x8e\xb5 emoji.flac",
    b"line\nbreak\ttab\x1b[31m.wav",
    b"-rf.wav",
    b"-.hidden.wav",
    b"- .-x.wav",
    b".mp3",
    b"...",
    b" . .wav",
    b"-",
    b"\xff\xfe\xfd.wav",
    b"caf\xe9.wav",
    b"x" * 255,
    b"\xff" * 255,
    "é".encode() * 127,
    "🎵".encode() * 62 + b".wav",
    b"C:\\a|b*c?<d>.wav",
    b"a" * (MAX_NAME_BYTES - 1) + b" . b.wav",
    "\u202egpj.wav".encode(),
    "a\u2028b\x85c.wav".encode(),
]


def as_path(raw: bytes) -> Path:
    return Path(os.fsdecode(raw))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"album/01 caf\xc3\xa9 \xf0\x9f\x8e\xb5.wav", "album/01 café 🎵.wav"),
        (b"caf\xe9.wav", "caf\\xe9.wav"),
        (b"a\nb\tc\x1b.wav", "a\\nb\\tc\\x1b.wav"),
        ("\u202egpj\u2028.wav".encode(), "\\u202egpj\\u2028.wav"),
    ],
)
def test_a_path_is_shown_as_it_is_with_the_rest_escaped(raw: bytes, shown: str) -> None:
    assert printable(as_path(raw)) == shown


@pytest.mark.parametrize("raw", HOSTILE)
def test_any_path_is_shown_as_one_line_of_text(raw: bytes) -> None:
    shown = printable(as_path(raw))
    assert len(shown.splitlines()) == 1
    assert shown.encode("utf-8")
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)


@pytest.mark.parametrize("raw", HOSTILE)
def test_any_file_name_becomes_a_safe_folder_name(raw: bytes, tmp_path: Path) -> None:
    name = track_name(as_path(raw))

    assert 1 <= len(name.encode("utf-8")) <= MAX_NAME_BYTES
    assert not set(name) & set('/\\:*?"<>|\n\t\x1b\x85\u2028\u202e')
    assert name[0] not in " .-"
    assert name[-1] not in " ."
    (tmp_path / name).mkdir()


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"Song No. 5.wav", "Song No. 5"),
        (b"caf\xc3\xa9 \xf0\x9f\x8e\xb5.flac", "café 🎵"),
        (b"archive.tar.wav", "archive.tar"),
        (b"no ending", "no ending"),
        (b"caf\xe9.wav", "caf_"),
        (b"a\n\n\tb.wav", "a_b"),
        (b"what?.wav", "what_"),
        (b"--x.wav", "x"),
        (b"-.x.wav", "x"),
        (b".mp3", "mp3"),
        (b"...", "track"),
        (b"- -.wav", "track"),
    ],
)
def test_a_folder_name_is_the_files_name_as_far_as_it_can_be(raw: bytes, name: str) -> None:
    assert track_name(as_path(raw)) == name


def test_a_long_name_is_cut_between_characters() -> None:
    assert track_name(Path("x" + "🎵" * 62)) == "x" + "🎵" * ((MAX_NAME_BYTES - 1) // 4)
