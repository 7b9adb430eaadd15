"""Files that can't be processed are refused with one clear sentence; no file makes FFmpeg open others."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from sounds import FFMPEG_FILES, ffmpeg_bytes, silent_video, sndfile_bytes, tones

from pipeline.audio import DecodeLimits, decode
from pipeline.audio.decode import decode_file
from pipeline.errors import BadAudio

LIMITS = DecodeLimits()


def complaint(path: Path, data: bytes, limits: DecodeLimits = LIMITS) -> str:
    path.write_bytes(data)
    with pytest.raises(BadAudio) as caught:
        decode(path, sample_rate=44100, limits=limits)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name not in message  # the caller says which file
    return message


NO_AUDIO = "is not audio in a format that can be read"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"This is text, not music.\n" * 400, "it is text"),
        ("Das hier ist Text für Menschen.\n".encode() * 100, "it is text"),
        ("This is text.\n".encode("utf-16"), "it is text"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "it is an HTML page"),
        (b"PK\x03\x04" + bytes(range(256)), "it is a ZIP archive"),
        (b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk\0\0\0\4\0\xff\x2f\0", "it is a MIDI file"),
        (bytes(100_000), "it is filled with zeros"),
        (b"ID3\x04\x00\x00\x00\x00\x00\x05hello", "it holds nothing but tags"),
        (b"fLaC", "it begins as FLAC, but its header is damaged or incomplete"),
        (b"\x1a\x45\xdf\xa3", "it begins as Matroska, but its header is damaged or incomplete"),
        (b"\xff\xfb\x90\x00 and text " * 300, ""),  # the sync word of MPEG audio, by chance
        (np.random.default_rng(0).bytes(200_000), ""),
    ],
)
def test_a_file_that_is_not_audio_is_named_for_what_it_is(tmp_path: Path, data: bytes, what: str) -> None:
    message = complaint(tmp_path / "renamed.mp3", data)
    assert message.startswith(NO_AUDIO)
    assert what in message


def test_an_mp4_without_its_index_says_so(tmp_path: Path) -> None:
    message = complaint(tmp_path / "x.m4a", b"\0\0\0\x20ftypM4A \0\0\0\0")
    assert message == "is cut off or damaged: its index (moov) is missing or can't be read"


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    assert complaint(tmp_path / "x.wav", b"") == "is empty: it has 0 bytes"


def test_a_picture_is_no_audio(tmp_path: Path) -> None:
    picture = silent_video(tmp_path / "picture", "image2pipe", "png", 1)
    assert complaint(tmp_path / "x.mp3", picture) == f"{NO_AUDIO}: it is a picture"


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video"), ("flv", "flv")],
)
def test_a_video_without_sound_is_refused(tmp_path: Path, container: str, codec: str) -> None:
    video = silent_video(tmp_path / "video", container, codec)
    assert complaint(tmp_path / "the-file", video) == "has no audio stream"


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
@pytest.mark.parametrize(
    ("container", "subtype", "has_total"),
    [
        ("WAV", "PCM_16", True),
        ("WAV", "FLOAT", True),
        ("RF64", "PCM_16", True),
        ("FLAC", "PCM_16", True),
        ("MP3", None, True),
        ("OGG", "VORBIS", False),
        ("OGG", "OPUS", False),
    ],
)
def test_a_truncated_file_is_refused_with_how_much_of_it_is_there(
    tmp_path: Path, container: str, subtype: str | None, has_total: bool, share: float
) -> None:
    rate = 48000 if subtype == "OPUS" else 44100
    data = sndfile_bytes(tones(8.0, rate), rate, container, subtype)
    message = complaint(tmp_path / "the-file", data[: int(len(data) * share)])
    assert "is cut off" in message
    if has_total:
        present_s, promised_s = (float(word) for word in message.split() if word[0].isdigit())
        assert promised_s == pytest.approx(8.0, abs=0.06)
        assert present_s == pytest.approx(8.0 * share, abs=0.45)  # for the header and the last block
    else:
        assert "its last page is incomplete" in message


@pytest.mark.parametrize("name", sorted(FFMPEG_FILES))
def test_truncated_files_of_every_kind_are_detected(tmp_path: Path, name: str) -> None:
    data, _, _ = ffmpeg_bytes(tmp_path / "written", name)
    for share in (0.37, 0.93):  # within a frame: a cut between two frames of MP2 or ADTS can't be detected
        assert "cut off" in complaint(tmp_path / "the-file", data[: int(len(data) * share)])


def test_one_missing_byte_of_an_ogg_page_is_detected(tmp_path: Path) -> None:
    data = sndfile_bytes(tones(2.0, 44100), 44100, "OGG")
    assert "is cut off" in complaint(tmp_path / "the-file", data[:-1])


def test_a_hole_in_an_ogg_is_not_taken_for_its_end(tmp_path: Path) -> None:
    data = bytearray(sndfile_bytes(tones(8.0, 44100), 44100, "OGG"))
    half = len(data) // 2
    data[half : half + 50] = bytes(50)
    assert "is cut off or damaged" in complaint(tmp_path / "the-file", bytes(data))


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_truncated_file_is_accepted_when_the_limits_allow_it(
    tmp_path: Path, container: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = sndfile_bytes(tones(8.0, 44100), 44100, container)
    (tmp_path / "the-file").write_bytes(data[: len(data) * 3 // 4])
    audio, info = decode(tmp_path / "the-file", sample_rate=44100, limits=DecodeLimits(accept_truncated=True))
    assert 4.0 < audio.duration_s == info.duration_s < 6.5
    assert "is cut off" in info.notes[0]
    assert np.std(audio.samples) == pytest.approx(0.4 * 0.5**0.5, rel=0.1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("channels", [1, 6])
def test_a_sample_that_is_no_number_is_found_with_its_time(
    tmp_path: Path, value: float, channels: int
) -> None:
    sound = tones(3.0, 44100, channels).astype(np.float64)
    sound[66150, min(3, channels - 1)] = value  # of six, the low-frequency one, which is not mixed in
    message = complaint(tmp_path / "the-file", sndfile_bytes(sound, 44100, "WAV", "DOUBLE"))
    assert message == "has a sample that is not a finite number at 1.500 s"


@pytest.mark.parametrize(
    ("rate", "shape", "limits", "says"),
    [
        (44100, (1, 0.1), LIMITS, "is too short: 0.10 s, at least 1 s are needed"),
        (44100, (1, 3.0), DecodeLimits(max_duration_s=2.0), "is too long: more than 2 s"),
        (44100, (1, 3.0), DecodeLimits(max_bytes=1000), "is too big: 264,644 bytes, the limit is 1,000"),
        (44100, (9, 1.5), LIMITS, "has 9 channels; up to 8 can be used"),
        (7999, (1, 1.5), LIMITS, "has a sample rate of 7999 Hz; 8000 to 192000 can be used"),
        (193000, (1, 1.5), LIMITS, "has a sample rate of 193000 Hz; 8000 to 192000 can be used"),
        (44100, (1, 0.0), LIMITS, "has no sound in it: not one sample can be decoded"),
    ],
)
def test_limits_are_named(
    tmp_path: Path, rate: int, shape: tuple[int, float], limits: DecodeLimits, says: str
) -> None:
    channels, seconds = shape
    data = sndfile_bytes(tones(seconds, rate, channels), rate, "WAV", "PCM_16")
    assert complaint(tmp_path / "the-file", data, limits) == says


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    good = tmp_path / "good.wav"
    good.write_bytes(sndfile_bytes(tones(3.0, 44100), 44100, "WAV"))
    playlists = [
        f"ffconcat version 1.0\nfile '{good}'\n",
        "ffconcat version 1.0\nfile good.wav\n",
        f"#EXTM3U\n#EXTINF:3,\n{good}\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{good}\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        f"[playlist]\nFile1={good}\nNumberOfEntries=1\n",
    ]
    for text in playlists:
        message = complaint(tmp_path / "list.m3u8", text.encode())
        assert message.startswith(NO_AUDIO)


def test_a_folder_or_a_pipe_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("x.wav", "pipe.wav"):
        with pytest.raises(BadAudio, match="is not a file"):
            decode(tmp_path / name, sample_rate=44100, limits=LIMITS)


def test_an_unreadable_file_says_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(sndfile_bytes(tones(1.5, 44100), 44100, "WAV"))
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root reads everything
        with pytest.raises(BadAudio, match=r"^can't be read: permission denied$"):
            decode(path, sample_rate=44100, limits=LIMITS)
    finally:
        os.seteuid(user)


def test_a_file_that_is_gone_is_not_bad_audio(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "gone.wav", sample_rate=44100, limits=LIMITS)


class FailingDisk(io.BytesIO):
    """A file whose reads fail beyond the first 100 kB."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 100_000:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3", "AIFF"])
def test_a_failing_disk_is_not_the_files_fault(container: str) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (44100 * 10, 2)).astype(np.float32)
    data = sndfile_bytes(noise, 44100, container)
    with pytest.raises(OSError, match="Input/output error"):
        decode_file(FailingDisk(data), len(data), sample_rate=44100, limits=LIMITS)
