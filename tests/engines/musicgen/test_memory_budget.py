"""How many rows go together, and memory that is given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from musicgen_setup import Watched, run_batch, voice
from tones import RequestFn

from pipeline.engines.musicgen import codec, memory_budget


def rows_of(row_bytes: int) -> Callable[[int], int]:
    return lambda rows: rows * row_bytes


def test_as_many_rows_as_are_wanted_if_there_is_memory() -> None:
    assert memory_budget.rows_at_once(rows_of(1), 6, None) == 6
    assert memory_budget.rows_at_once(rows_of(1), 6, 1e6) == 6


def test_no_more_than_help() -> None:
    assert memory_budget.rows_at_once(rows_of(1), 100, None) == memory_budget.MOST_ROWS


@pytest.mark.parametrize("limit_gb", [None, 0.001])
def test_never_fewer_than_one_variation_needs(limit_gb: float | None) -> None:
    assert memory_budget.rows_at_once(rows_of(10**15), 100, limit_gb) == 2


def test_the_limit_is_the_whole_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 GB, 3 are taken and 2 left aside: five rows of 1 GB."""
    monkeypatch.setattr(memory_budget, "_resident_bytes", lambda: 3e9)
    assert memory_budget.rows_at_once(rows_of(10**9), 16, 10.0, 2 * 10**9) == 5


def test_rows_are_counted_with_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1 GB with three prefixes of 2 GB among them: 9 GB are three of each, 11 GB five rows."""
    monkeypatch.setattr(memory_budget, "_resident_bytes", lambda: 0.0)

    def needs(rows: int) -> float:
        return 1e9 * rows + 2e9 * min(rows, 3)

    assert [memory_budget.rows_at_once(needs, 16, limit_gb) for limit_gb in (8.9, 9.0, 11.0, 22.0)] == [
        2,
        3,
        5,
        16,
    ]


def test_a_tracks_variations_get_room_for_the_prefixes_they_share(
    musicgen: Any, request_for: RequestFn
) -> None:
    """Eight with guidance: the track's and nothing's; one more for another track or window."""

    def prefixes(*tracks: tuple[float, float], duration_s: float = 0.2) -> int:
        requests = [
            request_for(f"{pitches}-{n}", pitches_hz=pitches, seed=n, duration_s=duration_s)
            for pitches in tracks
            for n in range(8)
        ]
        voices = musicgen.prepare(requests, lambda: False)
        return int(musicgen.batch(voices, lambda voice, new: None, lambda: None).n_prefixes)

    assert prefixes((440.0, 554.37)) == 2
    assert prefixes((440.0, 554.37), (220.0, 293.66)) == 3
    assert prefixes((440.0, 554.37), duration_s=31.0) == 3


def test_a_limit_that_cannot_be_kept_is_told(caplog: pytest.LogCaptureFixture) -> None:
    memory_budget.rows_at_once(rows_of(1), 6, 1e6)
    assert not caplog.text
    memory_budget.rows_at_once(rows_of(10**9), 6, 0.001)
    assert "0.0 GB can't be kept; one variation at a time takes" in caplog.text


def test_what_sound_takes_grows_with_the_length_up_to_a_minute(musicgen: Any) -> None:
    one, ten, longest, longer = (
        codec.decoding_bytes(musicgen.checkpoint, 50 * seconds) for seconds in (1, 10, 60, 600)
    )
    assert ten == 10 * one
    assert longer == longest == 60 * one


def test_pages_that_are_given_back_are_zero_and_their_neighbours_are_not() -> None:
    import mmap
    import sys

    from pipeline.engines.musicgen.shm import Pages

    if sys.platform != "linux":
        pytest.skip("only Linux says what is in memory that was given back")
    size = 8 * mmap.PAGESIZE
    pages = Pages(size)
    array = pages.array(np.uint8)
    array[:] = 1
    pages.release(mmap.PAGESIZE // 2, 5 * mmap.PAGESIZE + 1)  # whole pages: 1 to 4
    assert array.reshape(8, -1).sum(axis=1).tolist() == [mmap.PAGESIZE, 0, 0, 0, 0] + [mmap.PAGESIZE] * 3


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_a_row_that_was_given_back_can_be_used_again(musicgen: Any, kind: str) -> None:
    from musicgen_setup import decoder_of

    from pipeline.engines.musicgen.decoder import Feed

    memory = decoder_of(musicgen.checkpoint, kind).memory(3, 40, 1, 8)
    memory.prefill(0, np.ones((8, 32), np.float32))
    tokens = np.random.default_rng(0).integers(0, 2048, (40, 4))

    def logits(slot: int) -> np.ndarray:
        return memory.advance([Feed(slot, 0, 0, tokens)])

    first, neighbour = logits(1), logits(2)
    memory.release(1)
    np.testing.assert_array_equal(logits(1), first)
    again = memory.advance([Feed(2, 0, 40, tokens[:1])])
    memory.release(2)
    logits(2)
    np.testing.assert_array_equal(memory.advance([Feed(2, 0, 40, tokens[:1])]), again)
    np.testing.assert_array_equal(neighbour, first)


def test_memory_is_given_back_before_sound_is_made_unless_others_wait(musicgen: Any) -> None:
    """Three variations in two rows without guidance: the first one's row is the third's."""
    decoder = Watched(musicgen.decoder)
    voices = [
        voice(musicgen.checkpoint, name, frames=frames, guidance=1.0)
        for name, frames in (("short", 10), ("long", 40), ("third", 20))
    ]
    released = [
        (its.voice.request_id, list(decoder.released))
        for its in run_batch(musicgen.checkpoint, decoder, voices, 2)
    ]
    assert released == [("short", []), ("third", [0]), ("long", [0, 0, 1])]
