"""Files of every kind decode to what was encoded, at the requested rate and in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import FFMPEG_FILES, ffmpeg_bytes, sndfile_bytes, tones

from pipeline.audio import DecodeLimits, decode, looks_like_audio
from pipeline.audio.downmix import downmix_matrix, mix_down
from pipeline.errors import BadAudio
from pipeline.records import Audio, SourceInfo

LIMITS = DecodeLimits()
LOSSLESS_16 = 2.0**-15  # one step


def decode_bytes(
    folder: Path, data: bytes, *, rate: int = 44100, limits: DecodeLimits = LIMITS
) -> tuple[Audio, SourceInfo]:
    path = folder / "sound"
    path.write_bytes(data)
    return decode(path, sample_rate=rate, limits=limits)


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 2.0**-7),
        ("WAV", "PCM_16", LOSSLESS_16),
        ("WAV", "PCM_24", 2.0**-23),
        ("WAV", "PCM_32", 1e-7),
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 0.0),
        ("WAVEX", "PCM_24", 2.0**-23),
        ("RF64", "PCM_16", LOSSLESS_16),
        ("FLAC", "PCM_16", LOSSLESS_16),
        ("FLAC", "PCM_24", 2.0**-23),
        ("AIFF", "PCM_24", 2.0**-23),
        ("AIFF", "FLOAT", 0.0),
        ("CAF", "PCM_16", LOSSLESS_16),
        ("W64", "PCM_16", LOSSLESS_16),
        ("AU", "PCM_16", LOSSLESS_16),
    ],
)
def test_lossless_samples_come_back_within_one_step(
    tmp_path: Path, container: str, subtype: str, tolerance: float
) -> None:
    sound = tones(1.5, 44100)
    audio, info = decode_bytes(tmp_path, sndfile_bytes(sound, 44100, container, subtype))
    assert audio.samples.shape == (2, 66150)
    assert audio.samples.dtype == np.float32
    assert np.max(np.abs(audio.samples.T - sound)) <= tolerance
    assert (info.duration_s, info.sample_rate, info.channels) == (1.5, 44100, 2)


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("rate", [8000, 22050, 48000, 192000])
@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_every_rate_and_channel_count_gives_the_asked_rate_and_at_most_two_channels(
    tmp_path: Path, container: str, rate: int, channels: int
) -> None:
    sound = tones(1.2, rate, channels)
    audio, info = decode_bytes(tmp_path, sndfile_bytes(sound, rate, container, "PCM_24"), rate=32000)
    assert (info.sample_rate, info.channels) == (rate, channels)
    assert audio.sample_rate == 32000
    assert audio.channels == min(channels, 2)
    assert abs(audio.n_samples - 1.2 * 32000) <= 1
    matrix = downmix_matrix(["NONE"] * channels)
    before = sound if matrix is None else mix_down(sound, matrix)
    assert np.std(audio.samples) == pytest.approx(np.std(before), rel=0.01)


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", 8000), ("VORBIS", 44100), ("OPUS", 48000)])
@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_ogg_of_any_channel_count_keeps_length_and_level(
    tmp_path: Path, subtype: str, rate: int, channels: int
) -> None:
    sound = tones(1.5, rate, channels)
    audio, info = decode_bytes(tmp_path, sndfile_bytes(sound, rate, "OGG", subtype), rate=rate)
    assert info.channels == channels
    assert abs(audio.n_samples - len(sound)) <= 32  # Opus in more than two channels: FFmpeg's own rounding
    assert np.max(np.abs(audio.samples)) < 3


@pytest.mark.parametrize("name", sorted(FFMPEG_FILES))
def test_whole_files_of_every_kind_keep_length_and_level(tmp_path: Path, name: str) -> None:
    data, sound, rate = ffmpeg_bytes(tmp_path / "written", name)
    audio, _ = decode_bytes(tmp_path, data, rate=rate)
    # Exact where the container says how much padding the encoder added; else up to its frame.
    slack = {"aac-fragments": 2048, "aac-adts": 2048, "mp2": 1152, "wma": 4096}.get(name, 0)
    assert abs(audio.n_samples - len(sound)) <= slack
    level = 0.06 if name == "mp3" else 0.02  # LAME at 128 kbit/s takes 0.4 dB off these tones
    assert np.std(audio.samples) == pytest.approx(np.std(sound), rel=level)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_mp3_is_sample_exact_by_its_own_header_and_silent_on_the_terminal(
    tmp_path: Path, rate: int, capfd: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).standard_normal((2 * rate, 1)).astype(np.float32) * 0.02
    sound = tones(2.0, rate, 1) + noise
    audio, info = decode_bytes(tmp_path, sndfile_bytes(sound, rate, "MP3"), rate=rate)
    assert info.codec == "mp3"
    assert audio.n_samples == len(sound)
    middle = slice(rate // 2, rate)
    assert np.corrcoef(audio.samples[0, middle], sound[middle, 0])[0, 1] > 0.99  # aligned, not just as long
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["song.mp3", "song.txt", "song", "so ng'\".wav", "-song.flac"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(sndfile_bytes(tones(1.5, 44100), 44100, "FLAC"))
    _, info = decode(tmp_path / name, sample_rate=44100, limits=LIMITS)
    assert info.codec == "flac"


def test_names_that_are_not_utf8_can_be_given_as_bytes(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe.wav"
    Path(os.fsdecode(name)).write_bytes(sndfile_bytes(tones(1.5, 44100), 44100, "WAV"))
    assert decode(name, sample_rate=44100, limits=LIMITS)[1].duration_s == 1.5


def test_resampling_while_decoding_equals_resampling_the_whole(tmp_path: Path) -> None:
    import soxr

    sound = np.random.default_rng(1).uniform(-0.5, 0.5, (60000, 2)).astype(np.float32)
    audio, _ = decode_bytes(tmp_path, sndfile_bytes(sound, 44100, "WAV", "FLOAT"), rate=32000)
    whole = soxr.resample(sound, 44100, 32000, "VHQ").T
    assert audio.samples.shape == whole.shape
    assert np.max(np.abs(audio.samples - whole)) < 1e-6


def test_downmix_follows_bs775() -> None:
    block = np.eye(6, dtype=np.float32)  # 5.1 in WAVE's order: one channel sounds in each sample
    mixed = mix_down(block, downmix_matrix(["NONE"] * 6))
    half = 0.5**0.5
    expected = [(1, 0), (0, 1), (half, half), (0, 0), (half, 0), (0, half)]
    np.testing.assert_allclose(mixed, expected, atol=1e-7)


def test_vorbis_channels_keep_their_sides(tmp_path: Path) -> None:
    """Vorbis orders 5.1 as left, centre, right, ...: in WAVE's order, right would be the centre."""
    sound = np.zeros((48000 * 2, 6), dtype=np.float32)
    sound[:, 2] = tones(2.0, 48000, 1)[:, 0]  # third in Vorbis: the right channel
    audio, _ = decode_bytes(tmp_path, sndfile_bytes(sound, 48000, "OGG", "VORBIS"), rate=48000)
    left, right = np.std(audio.samples, axis=1)
    assert right > 0.2
    assert left < 0.01


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_streamed_wav_without_a_size_is_whole(tmp_path: Path, size: int) -> None:
    data = bytearray(sndfile_bytes(tones(1.5, 44100), 44100, "WAV", "PCM_16"))
    at = data.index(b"data") + 4
    data[at : at + 4] = size.to_bytes(4, "little")
    assert decode_bytes(tmp_path, bytes(data))[0].n_samples == 66150


def _tag_behind(tag: str) -> bytes:
    id3v1 = b"TAG" + b"x" * 125
    ape = b"x" * 100 + b"APETAGEX" + b"".join(n.to_bytes(4, "little") for n in (2000, 132, 1, 0)) + bytes(8)
    words = b"LYRICSBEGININD0000200"
    lyrics = words + b"%06dLYRICS200" % len(words)
    return {
        "id3v1": id3v1,
        "ape": ape,
        "lyrics": lyrics + id3v1,
        "ape+id3v1": ape + id3v1,
        "zeros": bytes(999),
    }[tag]


@pytest.mark.parametrize("tag", ["id3v1", "ape", "lyrics", "ape+id3v1", "zeros"])
def test_tags_behind_an_mp3_are_no_damage(tmp_path: Path, tag: str) -> None:
    data = sndfile_bytes(tones(1.5, 44100), 44100, "MP3") + _tag_behind(tag)
    slack = 1152 if tag == "zeros" else 0  # FFmpeg leaves the encoder's padding in where the file is too long
    assert 0 <= decode_bytes(tmp_path, data)[0].n_samples - 66150 <= slack


def test_damage_inside_an_mp3_costs_only_the_damaged_frames(tmp_path: Path) -> None:
    data = sndfile_bytes(tones(5.0, 44100), 44100, "MP3")
    half = len(data) // 2
    audio, _ = decode_bytes(tmp_path, data[:half] + b"junk" * 300 + data[half:])
    assert 4.8 < audio.duration_s <= 5.0


def test_hours_in_a_small_file_are_refused_at_the_limit_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "hours.flac"
    hush = np.zeros((8000 * 60, 1), dtype=np.int16)
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(180):
            file.write(hush)
    data = bytearray(path.read_bytes())
    assert len(data) < 2_000_000  # 3 h, 173 MB as 16-bit samples
    data[21] &= 0xF0  # no sample count in STREAMINFO, so that only decoding tells
    data[22:26] = bytes(4)
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(BadAudio, match="too long: more than 60 s"):
        decode(path, sample_rate=48000, limits=DecodeLimits(max_duration_s=60))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000  # 60 s at 48 kHz are 11.5 MB, and again the file's bytes


def test_the_same_file_gives_the_same_samples(tmp_path: Path) -> None:
    data, _, _ = ffmpeg_bytes(tmp_path / "written", "aac-index-last")
    first, second = (decode_bytes(tmp_path, data, rate=32000)[0].samples for _ in range(2))
    assert np.array_equal(first, second)


def _files(tmp_path: Path) -> dict[str, bytes]:
    made = {name: ffmpeg_bytes(tmp_path / "written", name, 1.2)[0] for name in FFMPEG_FILES}
    return made | {
        kind: sndfile_bytes(tones(1.2, 44100), 44100, kind) for kind in ("WAV", "FLAC", "OGG", "MP3")
    }


def test_audio_is_recognized_by_its_first_bytes_or_its_file_name(tmp_path: Path) -> None:
    assert all(looks_like_audio(data[:64], "noname") for data in _files(tmp_path).values())
    assert looks_like_audio(b"This is text", "renamed.MP3")
    for head, name in (
        (b"This is text", "notes.txt"),
        (b"", "x"),
        (b"\x89PNG\r\n\x1a\n", "cover.png"),
        (b"%PDF", "a.pdf"),
    ):
        assert not looks_like_audio(head, name)


def test_the_package_is_cheap_to_import() -> None:
    heavy = ("scipy", "av", "soxr", "soundfile", "pyloudnorm")
    code = f"import pipeline.audio, sys; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
