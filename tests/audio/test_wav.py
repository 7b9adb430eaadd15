"""WAV files: readable by other programs, with reproducible bytes, dithered, tagged, never clipped."""

from __future__ import annotations

import hashlib
import io
import struct

import av
import numpy as np
import pytest
import soundfile

from pipeline.audio import Marker, write_wav
from pipeline.audio.wav import BitDepth
from pipeline.records import Audio, Samples

TAGS = {
    "title": "Nächte – 夜 🎹",
    "software": "pipeline 1",
    "comment": '{"seed": 7}',
    "copyright": "CC-BY-NC 4.0",
}


def noise(channels: int = 2, n: int = 70_001) -> Samples:
    return np.random.default_rng(7).uniform(-0.9, 0.9, (channels, n)).astype(np.float32)


def wav_bytes(samples: Samples, bit_depth: BitDepth, tags: dict[str, str] = TAGS) -> bytes:
    file = io.BytesIO()
    write_wav(file, Audio(samples, 44100), bit_depth=bit_depth, tags=tags)
    return file.getvalue()


@pytest.mark.parametrize(
    ("bit_depth", "subtype", "tolerance"),
    [(16, "PCM_16", 1.5 * 2.0**-15), (24, "PCM_24", 2.0**-24), ("float", "FLOAT", 0.0)],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_libsndfile_reads_what_was_written(
    bit_depth: BitDepth, subtype: str, tolerance: float, channels: int
) -> None:
    samples = noise(channels)
    with soundfile.SoundFile(io.BytesIO(wav_bytes(samples, bit_depth))) as file:
        assert (file.subtype, file.samplerate, file.channels) == (subtype, 44100, channels)
        assert (file.title, file.comment) == (TAGS["title"], TAGS["comment"])
        read = file.read(dtype="float64", always_2d=True).T
    assert read.shape == samples.shape
    assert np.max(np.abs(read - samples)) <= tolerance * 1.0001


EXPECTED_DIGESTS = {16: "28078686491f486c", 24: "2fd1f681c1bc2251", "float": "9c4dcb0036a1c9df"}


def test_the_bytes_depend_on_nothing_but_the_arguments() -> None:
    """Fixed hashes: a date, a library's version or a random state in the file would change them."""
    samples = np.linspace(-1, 1, 2000, dtype=np.float32).reshape(2, 1000)
    digests = {
        depth: hashlib.sha256(wav_bytes(samples, depth, {"title": "x"})).hexdigest()[:16]
        for depth in (16, 24, "float")
    }
    assert digests == EXPECTED_DIGESTS
    assert b"PEAK" not in wav_bytes(samples, "float")


def test_sizes_are_even_and_as_stated() -> None:
    data = wav_bytes(noise(1, 1001), 24, {"title": "odd"})
    assert len(data) % 2 == 0
    assert int.from_bytes(data[4:8], "little") == len(data) - 8


def test_dither_is_triangular_and_leaves_digital_silence_alone() -> None:
    samples = np.zeros((1, 200_000), dtype=np.float32)
    samples[0, 100_000:] = 0.3 * 2.0**-15  # a constant of 0.3 steps: rounding alone would lose it
    read = soundfile.read(io.BytesIO(wav_bytes(samples, 16)), dtype="int16")[0]
    assert not read[:100_000].any()
    assert np.mean(read[100_000:]) == pytest.approx(0.3, abs=0.01)  # kept, on average
    assert np.var(read[100_000:]) == pytest.approx(
        0.25, abs=0.01
    )  # TPDF: a quarter step squared, whatever the signal


def test_full_scale_does_not_wrap() -> None:
    samples = np.array([[1.0, -1.0] * 500], dtype=np.float32)
    for depth in (16, 24):
        read = soundfile.read(io.BytesIO(wav_bytes(samples, depth)), dtype="float64")[0]
        assert np.all(np.sign(read) == samples[0])
        assert np.max(np.abs(read - samples[0])) < 2.5 * 2.0**-15


@pytest.mark.parametrize("value", [1.001, -1.001, np.nan, np.inf])
@pytest.mark.parametrize("bit_depth", [16, 24, "float"])
def test_what_would_clip_is_refused(value: float, bit_depth: BitDepth) -> None:
    samples = noise(1, 100)
    samples[0, 50] = value
    with pytest.raises(ValueError, match="a file holds -1 to 1"):
        wav_bytes(samples, bit_depth)


def test_ffmpeg_reads_the_tags_as_utf8() -> None:
    def tags_of(data: bytes) -> dict[str, str]:
        with av.open(io.BytesIO(data)) as file:
            return dict(file.metadata)

    expected = {"encoder" if name == "software" else name: text for name, text in TAGS.items()}
    assert tags_of(wav_bytes(noise(), 16)) == expected
    assert tags_of(wav_bytes(noise(), 16, {})) == {}


def chunks(data: bytes) -> dict[bytes, bytes]:
    """The chunks of a RIFF file by their names; of lists, by the names of the lists."""
    found, at = {}, 12
    while at < len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + size]
        found[body[:4] if name == b"LIST" else name] = body
        at += 8 + size + size % 2
    return found


def test_a_loop_says_in_its_sampler_chunk_that_it_repeats_from_the_first_to_the_last_sample() -> None:
    file = io.BytesIO()
    write_wav(file, Audio(noise(2, 1001), 44100), bit_depth=16, tags={}, is_loop=True)
    sampler = struct.unpack("<15I", chunks(file.getvalue())[b"smpl"])
    assert sampler[2] == 22676  # nanoseconds of a sample
    assert sampler[7:] == (1, 0, 0, 0, 0, 1000, 0, 0)


def test_markers_are_cue_points_with_labels_and_the_sound_is_read_as_without() -> None:
    file, markers = io.BytesIO(), [Marker(0, "join 1"), Marker(700, "Stoß")]
    write_wav(file, Audio(noise(2, 1001), 44100), bit_depth=16, tags=TAGS, markers=markers)
    found = chunks(file.getvalue())
    n, *points = struct.unpack("<I" + "II4sIII" * 2, found[b"cue "])
    assert (n, points) == (2, [1, 0, b"data", 0, 0, 0, 2, 700, b"data", 0, 0, 700])
    first, second = (
        struct.pack("<4sII", b"labl", 4 + len(text), i) + text
        for i, text in enumerate((b"join 1\0", "Stoß\0".encode()), 1)
    )
    assert found[b"adtl"] == b"adtl" + first + b"\0" + second
    with soundfile.SoundFile(io.BytesIO(file.getvalue())) as read:
        assert (read.frames, read.title) == (1001, TAGS["title"])
    with av.open(io.BytesIO(file.getvalue())) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == 1001
