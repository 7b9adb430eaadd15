"""FLAC, MP3 and Opus files: the whole sound, tags that other programs read, reproducible bytes."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from pipeline.audio import nearest_rate, write_sound
from pipeline.records import Audio

N = 30_001
TONE = (0.4 * np.sin(np.arange(2 * N).reshape(2, N) * 0.05)).astype(np.float32)
TAGS = {"title": "Nächte – 夜 🎹", "comment": '{"seed": 7}', "BPM": "120", "KEY": "F#m", "LOOPSTART": "0"}


def encoded(format_name: Any, *, bit_depth: Any = 24, rate: int = 48000, channels: int = 2) -> bytes:
    file = io.BytesIO()
    sound = Audio(TONE[:channels], rate)
    write_sound(file, sound, format_name=format_name, bit_depth=bit_depth, tags=TAGS)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("format_name", "tolerance"), [("flac", 2.0**-24), ("mp3", 0.05), ("opus", 0.05)])
def test_libsndfile_decodes_as_many_samples_as_were_written(
    format_name: str, tolerance: float, channels: int
) -> None:
    read, rate = soundfile.read(io.BytesIO(encoded(format_name, channels=channels)), always_2d=True)
    assert (rate, read.shape) == (48000, (N, channels))
    inner = slice(2000, -2000)
    assert np.max(np.abs(read.T - TONE[:channels])[:, inner]) <= tolerance


@pytest.mark.parametrize("rate", [44100, 22050, 8000])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_is_as_loud_as_what_was_written(rate: int, channels: int) -> None:
    read, _ = soundfile.read(io.BytesIO(encoded("mp3", rate=rate, channels=channels)), always_2d=True)
    powers = [float(np.mean(sound[:, 2000:-2000] ** 2)) for sound in (read.T, TONE[:channels])]
    assert 10 * np.log10(powers[0] / powers[1]) == pytest.approx(0.0, abs=0.05)


def test_flac_has_the_samples_of_a_wav_in_16_and_24_bits() -> None:
    for bit_depth, subtype in ((16, "PCM_16"), (24, "PCM_24")):
        with soundfile.SoundFile(io.BytesIO(encoded("flac", bit_depth=bit_depth))) as file:
            assert file.subtype == subtype
            flac = file.read()
        assert np.max(np.abs(flac.T - TONE)) <= 1.5 * 2.0 ** (1 - bit_depth)


@pytest.mark.parametrize("format_name", ["flac", "mp3", "opus"])
def test_ffmpeg_reads_the_tags(format_name: str) -> None:
    with av.open(io.BytesIO(encoded(format_name))) as file:
        read = {**file.metadata, **file.streams[0].metadata}
    names = {"BPM": "TBPM", "KEY": "TKEY"} if format_name == "mp3" else {}
    assert read.items() >= {names.get(name, name): text for name, text in TAGS.items()}.items()


@pytest.mark.parametrize("format_name", ["flac", "mp3", "opus"])
def test_the_bytes_have_no_date_version_or_random_number(format_name: str) -> None:
    first = encoded(format_name)
    assert encoded(format_name) == first
    assert b"Lavf6" not in first and b"Lavc6" not in first
    if format_name == "opus":
        assert first[14:18] == bytes(4)  # the serial number of the stream, RFC 3533


@pytest.mark.parametrize(
    ("format_name", "wanted", "expected"),
    [("wav", 12345, 12345), ("flac", 96000, 96000), ("mp3", 96000, 48000), ("opus", 44100, 48000)],
)
def test_a_rate_that_a_format_lacks_becomes_the_next_one_it_has(
    format_name: str, wanted: int, expected: int
) -> None:
    assert nearest_rate(format_name, wanted) == expected
