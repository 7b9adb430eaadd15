"""What is encoded is checked, and each check refuses the wrong content that it is made to refuse."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest

from pipeline import audio
from pipeline.config import Output
from pipeline.errors import EngineFailure
from pipeline.executors.encode import (
    FileForm,
    check_sound,
    check_vectors,
    embedding_file,
    sound_file,
    variations_file,
)
from pipeline.records import Audio, Embedding

RATE, N = 22050, 22051  # an odd length: the data chunk is padded
TONE = Audio(0.5 * np.sin(np.arange(2 * N, dtype=np.float32).reshape(2, N) / 20), RATE)


def written(sound: Audio, bit_depth: Any = 24) -> io.BytesIO:
    file = io.BytesIO()
    audio.write_wav(file, sound, bit_depth=bit_depth, tags={"title": "t"})
    file.seek(0)
    return file


@pytest.mark.parametrize("bit_depth", [16, 24, "float"])
def test_a_wav_as_it_is_written_is_accepted(bit_depth: Any) -> None:
    check_sound(written(TONE, bit_depth), N, RATE, 2)


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "opus"])
def test_every_format_is_encoded_with_its_tags_and_stays_the_same(name: str) -> None:
    sound = Audio(TONE.samples[:, :N], 48000)
    form = FileForm(Output(format=name), {"title": "a song"})
    content = sound_file(sound, form)
    assert content == sound_file(sound, form)
    assert b"a song" in content or "a song".encode("utf-16-le") in content


def test_sound_that_can_not_be_heard_is_not_encoded() -> None:
    with pytest.raises(EngineFailure, match="silent"):
        sound_file(Audio(np.zeros((2, N), np.float32), RATE), FileForm(Output(), {}))


@pytest.mark.parametrize(
    ("meant", "why"),
    [((N - 1, RATE, 2), "samples"), ((N, RATE + 1, 2), "Hz"), ((N, RATE, 1), "channels")],
)
def test_a_wav_of_another_form_is_refused(meant: tuple[int, int, int], why: str) -> None:
    with pytest.raises(EngineFailure, match=why):
        check_sound(written(TONE), *meant)


def test_a_wav_that_is_cut_off_is_refused_whatever_its_header_says() -> None:
    with pytest.raises(EngineFailure, match="samples"):
        check_sound(io.BytesIO(written(TONE).getvalue()[:-7]), N, RATE, 2)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"no sound" * 100])
def test_what_is_no_wav_is_refused(content: bytes) -> None:
    with pytest.raises(EngineFailure, match="decoded"):
        check_sound(io.BytesIO(content), N, RATE, 2)


def test_a_silent_wav_is_refused_and_a_click_is_not() -> None:
    silent = np.zeros((2, N), np.float32)
    with pytest.raises(EngineFailure, match="silent"):
        check_sound(written(Audio(silent, RATE)), N, RATE, 2)
    silent[1, -1] = -0.01
    check_sound(written(Audio(silent, RATE)), N, RATE, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_wav_with_a_sample_that_is_not_finite_is_refused(bad: float) -> None:
    content = bytearray(written(TONE, "float").getvalue())
    content[-8:-4] = struct.pack("<f", bad)
    with pytest.raises(EngineFailure, match="finite"):
        check_sound(io.BytesIO(content), N, RATE, 2)


def test_not_finite_samples_are_seen_in_every_block_of_a_long_file() -> None:
    long = Audio(np.tile(TONE.samples, (1, 10)), RATE)
    content = bytearray(written(long, "float").getvalue())
    content[-8 * 5 * N : -8 * 5 * N + 4] = struct.pack("<f", np.nan)
    with pytest.raises(EngineFailure, match="finite"):
        check_sound(io.BytesIO(content), 10 * N, RATE, 2)


def vectors(**changes: Any) -> io.BytesIO:
    unit = np.eye(3, 4, dtype=np.float32)
    arrays = {"track": unit[0], "windows": unit[:2], "times_s": np.array([[0, 10], [10, 12]], np.float32)}
    file = io.BytesIO()
    np.savez(file, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    file.seek(0)
    return file


SHAPES = {"track": (4,), "windows": (2, 4), "times_s": (2, 2)}


def test_an_embedding_as_it_is_written_is_accepted() -> None:
    check_vectors(vectors(), SHAPES)


def test_an_embedding_is_encoded_unless_its_vectors_are_wrong() -> None:
    unit, times_s = np.eye(3, 4, dtype=np.float32), np.array([[0, 10], [10, 12]], np.float32)
    content = embedding_file(Embedding(unit[0], unit[:2], times_s), 4)
    with np.load(io.BytesIO(content)) as loaded:
        np.testing.assert_array_equal(loaded["windows"], unit[:2])
    with pytest.raises(EngineFailure, match="unit length"):
        embedding_file(Embedding(2 * unit[0], unit[:2], times_s), 4)


def test_the_vectors_of_variations_are_encoded_in_their_order_unless_they_are_wrong() -> None:
    unit = np.eye(3, 4, dtype=np.float32)
    content = variations_file([unit[2], unit[0]], 4)
    assert content == variations_file([unit[2], unit[0]], 4)
    with np.load(io.BytesIO(content)) as loaded:
        assert loaded.files == ["variations"]
        np.testing.assert_array_equal(loaded["variations"], unit[[2, 0]])
    with pytest.raises(EngineFailure, match="unit length"):
        variations_file([unit[0], 2 * unit[1]], 4)
    with pytest.raises(EngineFailure, match=r"variations as float32 \(1, 4\), not float32 \(1, 5\)"):
        variations_file([unit[0]], 5)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"track": None}, "holds"),
        ({"more": np.zeros(1, np.float32)}, "holds"),
        ({"track": np.eye(1, 5, dtype=np.float32)[0]}, "track as"),
        ({"windows": np.eye(3, 4, dtype=np.float32)}, "windows as"),
        ({"times_s": np.zeros((2, 2))}, "times_s as float64"),
        ({"times_s": np.full((2, 2), np.nan, np.float32)}, "finite"),
        ({"track": np.full(4, np.nan, np.float32)}, "finite"),
        ({"windows": np.full((2, 4), 0.6, np.float32)}, "unit length"),
        ({"track": np.zeros(4, np.float32)}, "unit length"),
        ({"track": np.array([{}] * 4, dtype=object)}, "read"),
    ],
)
def test_an_embedding_that_is_not_what_was_meant_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(EngineFailure, match=why):
        check_vectors(vectors(**changes), SHAPES)


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_an_embedding_that_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(EngineFailure, match="read"):
        check_vectors(io.BytesIO(vectors().getvalue()[:cut]), SHAPES)


def test_a_bare_array_is_no_embedding() -> None:
    file = io.BytesIO()
    np.save(file, np.zeros(4, np.float32))
    file.seek(0)
    with pytest.raises(EngineFailure, match="read"):
        check_vectors(file, SHAPES)
