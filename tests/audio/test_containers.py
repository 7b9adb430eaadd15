"""Files as users have them: joined, tagged, from broadcasts, with wrong size fields, with damage."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from sounds import apev2, encoded, ffmpeg_bytes, id3v2, sndfile_bytes, tones, wav_bytes

from pipeline.audio import DecodeLimits, decode
from pipeline.errors import BadAudio
from pipeline.records import Audio, Samples, SourceInfo

COVER = id3v2(
    b"APIC\0\x04\0\0\0\0\0image/jpeg\0\3\0\xff\xd8\xff\xe0" + np.random.default_rng(5).bytes(300_000)
)
ID3V1 = b"TAG" + b"x" * 125


def decoded(
    folder: Path, data: bytes, *, rate: int = 44100, limits: DecodeLimits | None = None
) -> tuple[Audio, SourceInfo]:
    (folder / "sound").write_bytes(data)
    return decode(folder / "sound", sample_rate=rate, limits=limits or DecodeLimits())


def refusal(folder: Path, data: bytes) -> str:
    with pytest.raises(BadAudio) as caught:
        decoded(folder, data)
    return str(caught.value)


def mp3(seconds: float, rate: int = 44100, channels: int = 2) -> bytes:
    return sndfile_bytes(tones(seconds, rate, channels), rate, "MP3")


def ogg(seconds: float, rate: int = 44100, channels: int = 2, subtype: str = "VORBIS") -> bytes:
    return sndfile_bytes(tones(seconds, rate, channels), rate, "OGG", subtype)


def adts(folder: Path, seconds: float, rate: int = 44100, layout: str = "stereo") -> bytes:
    channels = 1 if layout == "mono" else 2
    return encoded(folder / "w", tones(seconds, rate, channels), rate, "adts", "aac", layout=layout)


def level(samples: Samples) -> list[float]:
    return [float(np.std(row)) for row in samples]


# Joined files


@pytest.mark.parametrize(
    "between", [b"", ID3V1, COVER, ID3V1 + COVER, apev2(5000), id3v2(b"ID3\3\0\0" * 900)]
)
@pytest.mark.parametrize(("rate", "channels"), [(44100, 2), (22050, 1), (48000, 2)])
def test_joined_mp3s_are_decoded_whole(tmp_path: Path, between: bytes, rate: int, channels: int) -> None:
    audio, info = decoded(tmp_path, mp3(2, rate, channels) + between + mp3(3))
    assert audio.duration_s == pytest.approx(5.0, abs=0.1)  # encoder delay and padding at the join
    assert (info.sample_rate, info.channels) == (44100, 2)  # of the longer one
    assert audio.channels == 2
    assert min(level(audio.samples[:, 10_000:80_000]) + level(audio.samples[:, 100_000:200_000])) > 0.2
    changes = "the format changes on the way" in " ".join(info.notes)
    assert changes == ((rate, channels) != (44100, 2))


def test_joined_mp3s_of_different_rates_are_decoded_whole(tmp_path: Path) -> None:
    audio, info = decoded(tmp_path, mp3(8, 44100) + mp3(8, 48000))
    assert audio.duration_s == pytest.approx(16.0, abs=0.1)
    assert [note.partition(":")[0] for note in info.notes] == ["the format changes on the way"]


@pytest.mark.parametrize("between", [b"", COVER])
def test_joined_adts_files_are_decoded_whole(tmp_path: Path, between: bytes) -> None:
    data = adts(tmp_path, 2, 22050, "mono") + between + adts(tmp_path, 3)
    audio, info = decoded(tmp_path, data)
    assert audio.duration_s == pytest.approx(5.0, abs=0.15)
    assert info.notes == ("the format changes on the way: 22050 Hz, 1 ch; 44100 Hz, 2 ch",)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, 44100, 2, "VORBIS"), (3, 44100, 2, "VORBIS")),
        ((2, 22050, 1, "VORBIS"), (3, 48000, 2, "VORBIS")),
        ((2, 48000, 2, "OPUS"), (3, 24000, 2, "OPUS")),
        ((2, 48000, 1, "OPUS"), (3, 44100, 2, "VORBIS")),
    ],
)
def test_chained_ogg_streams_are_decoded_one_after_another(
    tmp_path: Path, first: tuple[float, int, int, str], second: tuple[float, int, int, str]
) -> None:
    audio, _ = decoded(tmp_path, ogg(*first) + ogg(*second))
    assert audio.n_samples == pytest.approx(5 * 44100, abs=2)


JOINED = ["wav", "flac", "vorbis", "opus", "m4a", "wavpack"]  # with headers that can be told from audio data


@pytest.mark.parametrize("second", JOINED)
@pytest.mark.parametrize("first", ["wav", "vorbis", "m4a"])
def test_a_file_behind_one_of_another_kind_is_decoded_as_well(
    tmp_path: Path, first: str, second: str
) -> None:
    audio, info = decoded(tmp_path, KINDS[first](tmp_path, 1.5) + KINDS[second](tmp_path, 2))
    assert audio.duration_s == pytest.approx(3.5, abs=0.1)
    assert info.notes == (
        ("the format changes on the way: 44100 Hz, 2 ch; 48000 Hz, 2 ch",) * (second == "opus")
    )


@pytest.mark.parametrize("between", [b"", ID3V1, id3v2(bytes(3001)), apev2()])
@pytest.mark.parametrize("kind", ["wav", "rf64", "aiff", "flac", "m4a"])
def test_two_files_of_one_kind_are_decoded_with_tags_between_them(
    tmp_path: Path, kind: str, between: bytes
) -> None:
    data = ffmpeg_bytes(tmp_path / "w", "rf64", 1.5)[0] if kind == "rf64" else KINDS[kind](tmp_path, 1.5)
    audio, info = decoded(tmp_path, data + between + data)
    assert audio.duration_s == pytest.approx(3.0, abs=0.01)
    assert info.notes == ()


@pytest.mark.parametrize("first", ["wav", "m4a", "vorbis"])
def test_an_mp3_with_a_tag_in_front_is_decoded_behind_another_file(tmp_path: Path, first: str) -> None:
    audio, _ = decoded(tmp_path, KINDS[first](tmp_path, 1.5) + id3v2(bytes(100)) + mp3(2))
    assert audio.duration_s == pytest.approx(3.5, abs=0.1)


def test_joined_flac_files_of_large_blocks_lose_nothing_at_the_join(tmp_path: Path) -> None:
    frames, options = tones(1.7, 44100, 1), {"frame_size": "65535"}
    with av.open(str(tmp_path / "w"), "w", format="flac") as output:
        stream = output.add_stream("flac", rate=44100, layout="mono", options=options)
        frame = av.AudioFrame.from_ndarray((frames.T * 32767).astype("<i2"), format="s16", layout="mono")
        frame.sample_rate = 44100
        for part in av.AudioResampler(format="s16", layout="mono", frame_size=65535).resample(frame):
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    data = (tmp_path / "w").read_bytes()
    once, twice = decoded(tmp_path, data)[0], decoded(tmp_path, data + data)
    assert (twice[0].n_samples, twice[1].notes) == (2 * once.n_samples, ())


@pytest.mark.parametrize("kind", ["flac", "vorbis", "opus", "m4a"])
def test_junk_behind_the_end_is_noted(tmp_path: Path, kind: str) -> None:
    junk = np.random.default_rng(3).bytes(100_000)
    audio, info = decoded(tmp_path, KINDS[kind](tmp_path, 1.5) + junk)
    assert audio.duration_s == pytest.approx(1.5, abs=1e-4)
    assert len(info.notes) == 1
    assert "left out" in info.notes[0]


def test_a_joined_mp3_whose_second_half_is_cut_off_is_refused(tmp_path: Path) -> None:
    second = mp3(3)
    assert "of 5.0 s can be decoded" in refusal(tmp_path, mp3(2) + second[: len(second) // 2])


# Opus and channel layouts


@pytest.mark.parametrize("input_rate", [0, 8000, 44100])
def test_opus_is_decoded_at_48_khz_whatever_its_input_rate(tmp_path: Path, input_rate: int) -> None:
    """RFC 7845, 5.1: the field is informative."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (96000, 2)).astype(np.float32)
    data = bytearray(sndfile_bytes(noise, 48000, "OGG", "OPUS"))
    n_body = sum(data[27 : 27 + data[26]])
    head = data.index(b"OpusHead")
    data[head + 12 : head + 16] = input_rate.to_bytes(4, "little")
    data[22:26] = bytes(4)
    data[22:26] = _ogg_crc(bytes(data[: 27 + data[26] + n_body])).to_bytes(4, "little")
    audio, info = decoded(tmp_path, bytes(data), rate=48000)
    assert (info.sample_rate, audio.n_samples) == (48000, 96000)
    spectrum = np.abs(np.fft.rfft(audio.samples[0]))
    assert spectrum[30_000:36_000].mean() > 0.2 * spectrum[2000:8000].mean()  # 15 to 18 kHz


def _ogg_crc(page: bytes) -> int:
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc


H = 0.5**0.5
LAYOUTS = {
    "FL FR FC BC": (0x107, [(1, 0), (0, 1), (H, H), (0.5, 0.5)]),
    "quad": (0x33, [(1, 0), (0, 1), (H, 0), (0, H)]),
    "no mask, four": (0, [(1, 0), (0, 1), (H, 0), (0, H)]),
    "no mask, six": (0, [(1, 0), (0, 1), (H, H), (0, 0), (H, 0), (0, H)]),
    "2.1": (0xB, [(1, 0), (0, 1), (0, 0)]),
    "3.0": (0x7, [(1, 0), (0, 1), (H, H)]),
    "5.0 back": (0x37, [(1, 0), (0, 1), (H, H), (H, 0), (0, H)]),
    "5.1 back": (0x3F, [(1, 0), (0, 1), (H, H), (0, 0), (H, 0), (0, H)]),
    "5.1 side": (0x60F, [(1, 0), (0, 1), (H, H), (0, 0), (H, 0), (0, H)]),
    "6.1": (0x70F, [(1, 0), (0, 1), (H, H), (0, 0), (0.5, 0.5), (H, 0), (0, H)]),
    "7.1": (0x63F, [(1, 0), (0, 1), (H, H), (0, 0), (H, 0), (0, H), (H, 0), (0, H)]),
    "centre and LFE": (0xC, [(H, H), (0, 0)]),
}


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_each_channel_of_a_wave_mask_goes_where_it_belongs(tmp_path: Path, name: str) -> None:
    mask, expected = LAYOUTS[name]
    n = len(expected)
    sound = np.zeros((44100 * n, n), dtype="<i2")  # each channel sounds for one second
    for channel in range(n):
        sound[44100 * channel : 44100 * (channel + 1), channel] = 10_000
    audio, _ = decoded(tmp_path, wav_bytes(sound.tobytes(), n, mask=mask))
    heard = audio.samples.T[22050::44100] / np.float32(10_000 / 32768)
    np.testing.assert_allclose(heard, expected, atol=1e-6)


@pytest.mark.parametrize("mask", [0x1, 0x4, 0])
def test_a_single_channel_is_mono_wherever_it_belongs(tmp_path: Path, mask: int) -> None:
    audio, _ = decoded(tmp_path, wav_bytes((10_000 * np.ones(50_000, "<i2")).tobytes(), 1, mask=mask))
    assert audio.channels == 1
    assert np.all(audio.samples == np.float32(10_000 / 32768))


@pytest.mark.parametrize(
    ("container", "codec"), [("flac", "flac"), ("ogg", "flac"), ("adts", "aac"), ("ogg", "libopus")]
)
def test_layouts_of_other_containers_are_honoured(tmp_path: Path, container: str, codec: str) -> None:
    sound = np.zeros((48000 * 2, 6), dtype=np.float32)
    sound[:, 2] = tones(2.0, 48000, 1)[:, 0]  # the centre in FFmpeg's order
    data = encoded(tmp_path / "w", sound, 48000, container, codec, layout="5.1")
    left, right = level(decoded(tmp_path, data, rate=48000)[0].samples)
    assert left == pytest.approx(right, rel=0.01)
    assert left == pytest.approx(0.2, rel=0.1)  # 0.4 / sqrt(2), at -3 dB


# Compressed audio in the place of PCM


def _spdif(path: Path) -> bytes:
    """AC-3 in bursts of IEC 61937."""
    raw = encoded(path, tones(2.0, 44100), 44100, "ac3", "ac3")
    with av.open(io.BytesIO(raw)) as source, av.open(str(path), "w", format="spdif") as output:
        stream = output.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    return path.read_bytes()


def test_ac3_in_a_wav_is_decoded_and_in_flac_refused(tmp_path: Path) -> None:
    words = _spdif(tmp_path / "w")
    audio, info = decoded(tmp_path, wav_bytes(words, 2))
    assert info.codec == "ac3"
    assert level(audio.samples) == pytest.approx([0.28, 0.28], abs=0.02)
    flac = sndfile_bytes(np.frombuffer(words, "<i2").reshape(-1, 2), 44100, "FLAC", "PCM_16")
    assert "bit stream where its PCM samples should be" in refusal(tmp_path, flac)


@pytest.mark.parametrize("word", ["7ffe8001", "fe7f0180", "1fffe800", "ff1f00e8"])
def test_dts_in_flac_is_refused_and_not_played_as_noise(tmp_path: Path, word: str) -> None:
    frame = bytes.fromhex(word) + np.random.default_rng(0).bytes(2044)
    samples = np.frombuffer(frame * 100, "<i2").reshape(-1, 2)
    flac = sndfile_bytes(samples, 44100, "FLAC", "PCM_16")
    assert "bit stream where its PCM samples should be" in refusal(tmp_path, flac)


def test_sync_words_that_occur_by_chance_in_antiphase_stereo_are_sound(tmp_path: Path) -> None:
    left = np.random.default_rng(0).integers(-400, -380, 44100).astype("<i2")
    samples = np.stack([left, ~left], axis=1)  # (-385, 384) reads 7ffe8001
    assert samples.tobytes().count(bytes.fromhex("7ffe8001")) > 100
    audio, _ = decoded(tmp_path, sndfile_bytes(samples, 44100, "WAV", "PCM_16"))
    assert audio.n_samples == 44100


# Tags and size fields

TAGS_BEHIND = [
    ID3V1,
    apev2(),
    apev2(200_000),
    apev2() + ID3V1,
    id3v2(bytes(3000)),
]
KINDS: dict[str, Callable[[Path, float], bytes]] = {
    "wav": lambda folder, s: sndfile_bytes(tones(s, 44100), 44100, "WAV"),
    "flac": lambda folder, s: sndfile_bytes(tones(s, 44100), 44100, "FLAC"),
    "mp3": lambda folder, s: mp3(s),
    "vorbis": lambda folder, s: ogg(s),
    "opus": lambda folder, s: ogg(s, 48000, 2, "OPUS"),
    "m4a": lambda folder, s: ffmpeg_bytes(folder / "w", "aac-index-last", s)[0],
    "aac": adts,
    "aiff": lambda folder, s: sndfile_bytes(tones(s, 44100), 44100, "AIFF"),
    "au": lambda folder, s: sndfile_bytes(tones(s, 44100), 44100, "AU"),
    "wavpack": lambda folder, s: ffmpeg_bytes(folder / "w", "wavpack", s)[0],
}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"au"}))
def test_tags_in_front_and_behind_change_nothing(tmp_path: Path, kind: str) -> None:
    data = KINDS[kind](tmp_path, 1.5)
    plain, info = decoded(tmp_path, data)
    assert plain.duration_s == pytest.approx(1.5, abs=0.05 if kind == "aac" else 1e-4)
    for tagged in (*(data + tag for tag in TAGS_BEHIND), id3v2(bytes(3000)) + data, COVER + COVER + data):
        audio, tagged_info = decoded(tmp_path, tagged)
        assert np.array_equal(audio.samples, plain.samples)
        assert tagged_info == info


@pytest.mark.parametrize(
    "tag",
    [
        b"LYRICSBEGIN" + b"la " * 1500 + b"LYRICSEND" + ID3V1,
        b"LYRICSBEGININD0000200" + b"la " * 3000 + b"009021LYRICS200" + ID3V1,
        b"TAG+" + b"x" * 223 + ID3V1,
        ID3V1 + apev2(),
    ],
)
def test_further_tags_behind_an_mp3_change_nothing(tmp_path: Path, tag: bytes) -> None:
    plain, info = decoded(tmp_path, mp3(1.5))
    audio, tagged_info = decoded(tmp_path, mp3(1.5) + tag)
    assert np.array_equal(audio.samples, plain.samples)
    assert tagged_info == info


@pytest.mark.parametrize("tag", [b"999999LYRICS200", apev2(5000)[-32:-20] + b"\xff" * 20])
def test_a_tag_that_states_more_than_the_file_has_is_no_tag(tmp_path: Path, tag: bytes) -> None:
    audio, _ = decoded(tmp_path, KINDS["wav"](tmp_path, 1.5) + tag)
    assert audio.n_samples == 66150


def test_a_tag_within_the_metadata_of_a_flac_is_part_of_it(tmp_path: Path) -> None:
    data = KINDS["flac"](tmp_path, 1.5)
    riff = b"riffid3 " + (2010).to_bytes(4, "little") + id3v2(bytes(2000))  # of flac --keep-foreign-metadata
    block = b"\2" + len(riff).to_bytes(3) + riff
    assert decoded(tmp_path, data[:42] + block + data[42:])[0].n_samples == 66150


@pytest.mark.parametrize("box", [b"\0\0\0\x08wide", b"\0\0\0\x10free" + bytes(8)])
def test_an_mp4_may_begin_with_other_boxes(tmp_path: Path, box: bytes) -> None:
    data = ffmpeg_bytes(tmp_path / "w", "aac-index-last", 1.5)[0]
    at = data.rindex(b"stco") + 8
    (count,) = struct.unpack_from(">I", data, at)
    offsets = struct.unpack_from(f">{count}I", data, at + 4)
    moved = struct.pack(f">{count}I", *(offset + len(box) for offset in offsets))
    audio, info = decoded(tmp_path, box + data[: at + 4] + moved + data[at + 4 + 4 * count :])
    assert audio.duration_s == pytest.approx(1.5, abs=1e-3)
    assert info.notes == ()


@pytest.mark.parametrize(
    "junk", [np.random.default_rng(2).bytes(1000), bytes(50_000), b"<html>hello</html>\n" * 9]
)
def test_junk_in_front_of_an_mp3_is_passed_over(tmp_path: Path, junk: bytes) -> None:
    audio, _ = decoded(tmp_path, junk + mp3(1.5))
    assert 0 <= audio.n_samples - 66150 <= 2304  # with encoder delay and padding


@pytest.mark.parametrize("change", [-1, 1, 8, 44])
def test_a_data_chunk_whose_size_is_slightly_wrong_is_read_whole(tmp_path: Path, change: int) -> None:
    data = bytearray(sndfile_bytes(tones(1.5, 44100), 44100, "WAV"))
    data[40:44] = (len(data) - 44 + change).to_bytes(4, "little")
    audio, info = decoded(tmp_path, bytes(data))
    assert audio.n_samples >= 66149
    assert info.notes == ()


@pytest.mark.parametrize("stated_s", [0.005, 0.75, 1.3])
def test_a_data_chunk_that_states_too_little_is_read_to_the_end(tmp_path: Path, stated_s: float) -> None:
    data = bytearray(sndfile_bytes(tones(1.5, 44100), 44100, "WAV"))
    data[40:44] = (round(stated_s * 44100) * 4).to_bytes(4, "little")
    audio, info = decoded(tmp_path, bytes(data))
    assert audio.n_samples == 66150
    assert info.notes == ("the header states an end before that of the sound",)


@pytest.mark.parametrize(
    "behind", [bytes(200_000), COVER, b"LIST" + (90_000).to_bytes(4, "little") + b"x" * 90_000]
)
def test_padding_tags_and_chunks_behind_the_data_are_no_sound(tmp_path: Path, behind: bytes) -> None:
    audio, info = decoded(tmp_path, sndfile_bytes(tones(1.5, 44100), 44100, "WAV") + behind)
    assert (audio.n_samples, info.notes) == (66150, ())


@pytest.mark.parametrize(
    ("container", "size_at", "stated_bytes"),
    [("W64", 16, (132_324).to_bytes(8, "little")), ("CAF", 4, (132_304).to_bytes(8))],
)
def test_sound_behind_the_stated_end_of_other_containers_is_not_passed_over(
    tmp_path: Path, container: str, size_at: int, stated_bytes: bytes
) -> None:
    data = bytearray(sndfile_bytes(tones(1.5, 44100), 44100, container, "PCM_16"))
    size_at += data.rindex(b"data", 0, 5000)
    data[size_at : size_at + 8] = stated_bytes
    assert "0.8 s of 1.5 s" in refusal(tmp_path, bytes(data))


@pytest.mark.parametrize("size", [0, 100, 0xFFFFFFFF])
def test_the_size_of_the_whole_riff_does_not_matter(tmp_path: Path, size: int) -> None:
    data = bytearray(sndfile_bytes(tones(1.5, 44100), 44100, "WAV"))
    data[4:8] = size.to_bytes(4, "little")
    assert decoded(tmp_path, bytes(data))[0].n_samples == 66150


def test_odd_chunks_before_and_behind_the_data(tmp_path: Path) -> None:
    pcm = (tones(1.5, 44100) * 32767).astype("<i2").tobytes()
    odd = b"LIST\x05\0\0\0INFOx"
    for data in (wav_bytes(pcm, 2, before_data=odd + b"\0"), wav_bytes(pcm, 2) + odd):
        assert decoded(tmp_path, data)[0].n_samples == 66150


@pytest.mark.parametrize("stated", [4, 5, 6, 49])
def test_chunks_with_a_wrong_size_in_front_of_the_data(tmp_path: Path, stated: int) -> None:
    pcm = (tones(1.5, 44100) * 32767).astype("<i2").tobytes()
    chunk = b"LIST" + stated.to_bytes(4, "little") + b"INFOx"  # without a pad byte
    audio, info = decoded(tmp_path, wav_bytes(pcm, 2, before_data=chunk))
    assert (audio.n_samples, info.notes) == (66150, ())


def test_bw64_is_rf64(tmp_path: Path) -> None:
    data = ffmpeg_bytes(tmp_path / "w", "rf64", 1.5)[0]
    assert decoded(tmp_path, b"BW64" + data[4:])[0].n_samples == 66150


@pytest.mark.parametrize("extra", [44, 10_000_000])
def test_a_flac_header_that_counts_too_many_samples(tmp_path: Path, extra: int) -> None:
    data = bytearray(sndfile_bytes(tones(1.5, 44100), 44100, "FLAC"))
    data[22:26] = (66150 + extra).to_bytes(4, "big")
    if extra == 44:
        assert decoded(tmp_path, bytes(data))[0].n_samples == 66150
    else:
        assert "1.5 s of 228.3 s can be decoded" in refusal(tmp_path, bytes(data))


def test_a_fragmented_mp4_is_whole_and_refused_when_cut(tmp_path: Path) -> None:
    options = {"movflags": "+empty_moov+default_base_moof", "frag_duration": "500000"}
    data = encoded(tmp_path / "w", tones(3, 44100), 44100, "mp4", "aac", options=options)
    assert decoded(tmp_path, data)[0].duration_s == pytest.approx(3.0, abs=0.05)
    assert "is cut off: the end of its last frame is missing" in refusal(tmp_path, data[: len(data) // 2])


# Broadcasts


def _pages(data: bytes) -> list[bytes]:
    pages, at = [], 0
    while at < len(data):
        end = at + 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        pages.append(data[at:end])
        at = end
    return pages


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", 44100), ("OPUS", 48000)])
def test_a_recording_that_begins_within_an_ogg_stream_is_decoded_whole(
    tmp_path: Path, subtype: str, rate: int
) -> None:
    pages = _pages(ogg(12, rate, 2, subtype))
    granules = [struct.unpack("<q", page[6:14])[0] for page in pages]
    n_headers = granules.count(0)
    headers, rest = b"".join(pages[:n_headers]), pages[n_headers + 4 : -1]
    expected_s = (granules[-2] - granules[n_headers + 3]) / rate
    audio, info = decoded(tmp_path, headers + b"".join(rest), rate=rate)
    assert audio.duration_s == pytest.approx(expected_s, abs=0.06)
    assert info.notes == ("the end-of-stream mark is missing",)
    _, info = decoded(tmp_path, headers + b"".join(rest)[:-50], rate=rate)
    assert info.notes[0].startswith("its last page is incomplete")


def test_vorbis_whose_first_header_comes_twice_is_decoded(tmp_path: Path) -> None:
    """As some web radio servers write it. Players that use libvorbis accept it, FFmpeg does not."""
    pages = _pages(ogg(2))
    header = pages[0][28:]
    page = bytearray(pages[2])
    n = page[26]
    page[27 + n : 27 + n] = header
    page[26:27] = bytes([n + 1, len(header)])
    page[22:26] = bytes(4)
    page[22:26] = _ogg_crc(bytes(page)).to_bytes(4, "little")
    audio, info = decoded(tmp_path, b"".join([*pages[:2], bytes(page), *pages[3:]]))
    assert audio.n_samples == pytest.approx(2 * 44100, abs=1024)
    assert info.codec == "vorbis"


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", 44100), ("OPUS", 48000)])
def test_a_missing_end_of_stream_mark_costs_nothing(tmp_path: Path, subtype: str, rate: int) -> None:
    pages = _pages(ogg(2, rate, 2, subtype))
    last = bytearray(pages[-1])
    last[5] &= ~4
    last[22:26] = bytes(4)
    last[22:26] = _ogg_crc(bytes(last)).to_bytes(4, "little")
    audio, info = decoded(tmp_path, b"".join(pages[:-1]) + bytes(last), rate=rate)
    assert audio.n_samples == 2 * rate
    assert info.notes == ("the end-of-stream mark is missing",)


def test_an_mp3_stream_may_begin_and_end_within_a_frame(tmp_path: Path) -> None:
    data = encoded(tmp_path / "w", tones(5, 44100), 44100, "mp3", "libmp3lame", options={"write_xing": "0"})
    audio, info = decoded(tmp_path, data[len(data) // 4 + 7 : -100])
    assert audio.duration_s == pytest.approx(3.75, abs=0.1)
    assert info.notes[0].startswith("the end of its last frame is missing")


# Damage


def _damaged(data: bytes, start: float, share: float, fill: str) -> bytes:
    at, n = int(len(data) * start), int(len(data) * share)
    return data[:at] + (bytes(n) if fill == "zeros" else np.random.default_rng(3).bytes(n)) + data[at + n :]


@pytest.mark.parametrize("fill", ["zeros", "garbage"])
@pytest.mark.parametrize("kind", ["mp3", "mp2", "aac", "flac", "m4a"])
def test_a_second_of_damage_is_refused_and_a_little_is_noted(tmp_path: Path, kind: str, fill: str) -> None:
    sound = tones(12, 44100)
    data = {
        "mp3": lambda: sndfile_bytes(sound, 44100, "MP3"),
        "flac": lambda: sndfile_bytes(sound, 44100, "FLAC"),
        "mp2": lambda: encoded(tmp_path / "w", sound, 44100, "mp2", "mp2"),
        "aac": lambda: encoded(tmp_path / "w", sound, 44100, "adts", "aac"),
        "m4a": lambda: encoded(
            tmp_path / "w", sound, 44100, "mp4", "aac", options={"movflags": "+faststart"}
        ),
    }[kind]()
    message = refusal(tmp_path, _damaged(data, 0.5, 1 / 12, fill))
    assert message.startswith("is cut off or damaged: 1")
    audio, info = decoded(tmp_path, _damaged(data, 0.5, 30 / len(data), "zeros"))
    assert 11.85 < audio.duration_s < 12.05
    assert "can't be decoded" in info.notes[0]


def test_holes_all_over_a_long_mp3_cost_only_what_is_damaged(tmp_path: Path) -> None:
    data = bytearray(mp3(60, 22050, 1))
    with av.open(io.BytesIO(data)) as file:
        frames = [(packet.pos, packet.size) for packet in file.demux(audio=0) if packet.size]
    for at, size in frames[100::200]:
        data[at : at + size] = bytes(size)
    audio, info = decoded(tmp_path, bytes(data))
    assert 59.4 < audio.duration_s < 59.8
    assert "s of 60.0" in info.notes[0]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("page", [2, -1])
def test_a_damaged_page_at_either_end_of_an_ogg_stream_is_missed(
    tmp_path: Path, subtype: str, page: int
) -> None:
    data = bytearray(ogg(10, 48000, 2, subtype))
    pages = [match.start() for match in re.finditer(b"OggS", bytes(data))]
    audio_pages = [at for at in pages if any(data[at + 6 : at + 14])]
    data[audio_pages[0 if page > 0 else page] + 200] ^= 1
    assert "can be decoded" in refusal(tmp_path, bytes(data))


def test_an_mp3_whose_beginning_is_missing_behind_its_header_frame_is_refused(tmp_path: Path) -> None:
    data = bytearray(mp3(12))
    data[1300:31300] = bytes(30_000)
    assert "of 12.0 s can be decoded" in refusal(tmp_path, bytes(data))


@pytest.mark.parametrize("rate", [8000, 22050])
def test_an_mp3_of_a_low_rate_lacks_nothing(tmp_path: Path, rate: int) -> None:
    audio, info = decoded(tmp_path, mp3(1.2, rate, 1), rate=rate)
    assert audio.duration_s == pytest.approx(1.2, abs=0.01)
    assert info.notes == ()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_tail_of_zeros_is_refused_or_noted(tmp_path: Path, kind: str) -> None:
    """As in a download that was cut off after the space for it had been reserved."""
    data = KINDS[kind](tmp_path, 5.0)
    half = len(data) // 2
    data = data[:half] + bytes(len(data) - half)
    if kind in ("wav", "aiff", "au"):
        assert "are digital silence" in decoded(tmp_path, data)[1].notes[0]
    elif kind == "m4a":
        assert "its index (moov) is missing" in refusal(tmp_path, data)
    else:
        assert "is cut off" in refusal(tmp_path, data)


# Encryption


@pytest.mark.parametrize("entry", [b"drms", b"enca"])
def test_an_encrypted_file_is_called_encrypted(tmp_path: Path, entry: bytes) -> None:
    data = _encrypted(ffmpeg_bytes(tmp_path / "w", "aac-index-first")[0], entry)
    assert refusal(tmp_path, data) == "is encrypted (copy protection) and can't be decoded"


def _encrypted(data: bytes, entry: bytes) -> bytes:
    """Make a protected MP4 of one whose index comes first (ISO/IEC 14496-12, 8.12): AAC becomes noise."""

    def box(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", 8 + len(body)) + name + body

    protection = box(b"sinf", box(b"frma", b"mp4a") + box(b"schm", bytes(4) + b"cenc\0\1\0\0"))
    made = bytearray(data)
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"mp4a"):
        at = made.index(name) - 4
        made[at : at + 4] = struct.pack(">I", struct.unpack(">I", made[at : at + 4])[0] + len(protection))
    chunks = made.index(b"stco") + 4
    for at in range(chunks + 8, chunks + 8 + 4 * made[chunks + 7], 4):
        made[at : at + 4] = struct.pack(">I", struct.unpack(">I", made[at : at + 4])[0] + len(protection))
    start = made.index(b"mp4a") - 4
    end = start + struct.unpack(">I", made[start : start + 4])[0] - len(protection)
    made[start + 4 : start + 8] = entry
    made[end:end] = protection
    payload = made.index(b"mdat") + 4
    return bytes(made[:payload]) + np.random.default_rng(0).bytes(len(made) - payload)


# Against another decoder


@pytest.mark.parametrize("rate", [8000, 44100, 192000])
@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *(
            ("WAV", subtype)
            for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
        ),
        *(("FLAC", subtype) for subtype in ("PCM_S8", "PCM_16", "PCM_24")),
        *(("AIFF", subtype) for subtype in ("PCM_S8", "PCM_16", "PCM_32", "DOUBLE")),
    ],
)
def test_lossless_samples_equal_those_of_libsndfile(
    tmp_path: Path, container: str, subtype: str, rate: int
) -> None:
    loudest = 20 if subtype in ("FLOAT", "DOUBLE") else 1  # far above full scale, if the format allows it
    sound = np.random.default_rng(1).uniform(-loudest, loudest, (rate + 777, 2))
    data = sndfile_bytes(sound, rate, container, subtype)
    expected = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].T
    assert np.array_equal(decoded(tmp_path, data, rate=rate)[0].samples, expected)


@pytest.mark.parametrize(("container", "subtype"), [("OGG", "VORBIS"), ("MP3", None)])
@pytest.mark.parametrize("rate", [24000, 44100])
def test_lossy_samples_equal_those_of_libsndfile_up_to_rounding(
    tmp_path: Path, container: str, subtype: str | None, rate: int
) -> None:
    data = sndfile_bytes(tones(3, rate), rate, container, subtype)
    expected = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].T
    samples = decoded(tmp_path, data, rate=rate)[0].samples
    assert samples.shape == expected.shape
    assert np.max(np.abs(samples - expected)) < 1e-5
