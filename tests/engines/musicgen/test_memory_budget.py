"""How many rows the memory allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tones import RequestFn

from pipeline.engines.musicgen import codec, memory_budget
from pipeline.errors import EngineUnusable


def rows_of(row_bytes: int) -> Callable[[int], int]:
    return lambda rows: rows * row_bytes


def test_all_wanted_rows_run_together_if_there_is_memory() -> None:
    assert memory_budget.rows_at_once(rows_of(1), 6, None) == 6
    assert memory_budget.rows_at_once(rows_of(1), 6, 1e6) == 6


def test_there_are_never_more_rows_than_are_useful(musicgen: Any) -> None:
    from musicgen_setup import request_state

    states = [request_state(musicgen.checkpoint, str(n), seed=n) for n in range(20)]
    assert musicgen.scheduler(states, lambda state: None, lambda: None).rows == musicgen.decoder.most_rows


@pytest.mark.parametrize("limit_gb", [None, 0.001])
def test_there_are_never_fewer_rows_than_one_variation_needs(limit_gb: float | None) -> None:
    assert memory_budget.rows_at_once(rows_of(10**15), 100, limit_gb) == 2


def test_the_limit_includes_what_the_process_holds_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 GB, 3 are in use and 2 are reserved: five rows of 1 GB."""
    monkeypatch.setattr(memory_budget, "_resident_bytes", lambda: 3e9)
    assert memory_budget.rows_at_once(rows_of(10**9), 16, 10.0, 2 * 10**9) == 5


def test_the_prefixes_that_rows_share_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1 GB that share three prefixes of 2 GB: 9 GB are enough for three rows, 11 GB for five."""
    monkeypatch.setattr(memory_budget, "_resident_bytes", lambda: 0.0)

    def bytes_of_rows(rows: int) -> float:
        return 1e9 * rows + 2e9 * min(rows, 3)

    assert [
        memory_budget.rows_at_once(bytes_of_rows, 16, limit_gb) for limit_gb in (8.9, 9.0, 11.0, 22.0)
    ] == [
        2,
        3,
        5,
        16,
    ]


def test_variations_of_a_track_need_memory_for_the_prefixes_they_share(
    musicgen: Any, request_for: RequestFn
) -> None:
    """Eight with guidance: one conditional and one unconditional prefix; one more per track or window."""

    def prefixes(*tracks: tuple[float, float], duration_s: float = 0.2) -> int:
        requests = [
            request_for(f"{pitches}-{n}", pitches_hz=pitches, seed=n, duration_s=duration_s)
            for pitches in tracks
            for n in range(8)
        ]
        states = musicgen.prepare(requests, lambda: False)
        return int(musicgen.scheduler(states, lambda state: None, lambda: None).n_prefixes)

    assert prefixes((440.0, 554.37)) == 2
    assert prefixes((440.0, 554.37), (220.0, 293.66)) == 3
    assert prefixes((440.0, 554.37), duration_s=31.0) == 3


def test_a_limit_that_is_too_low_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    memory_budget.rows_at_once(rows_of(1), 6, 1e6)
    assert not caplog.text
    memory_budget.rows_at_once(rows_of(10**9), 6, 0.001)
    assert "0.0 GB are not enough; one variation at a time takes" in caplog.text


def test_decoding_takes_more_memory_up_to_a_minute_of_music(musicgen: Any) -> None:
    one, ten, longest, longer = (
        codec.decoding_bytes(musicgen.checkpoint, 50 * seconds) for seconds in (1, 10, 60, 600)
    )
    assert ten == 10 * one
    assert longer == longest == 60 * one


def test_rows_are_halved_while_there_is_no_memory_for_them_and_one_variation_is_the_least(
    musicgen: Any, request_for: RequestFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request_for(str(n), duration_s=0.2, seed=n) for n in range(5)]
    states = musicgen.prepare(requests, lambda: False)
    new_cache, limit, tried = musicgen.decoder.new_cache, 2, []

    def limited(rows: int, *sizes: int) -> Any:
        tried.append(rows)
        if rows > limit:
            raise MemoryError
        return new_cache(rows, *sizes)

    monkeypatch.setattr(musicgen.decoder, "new_cache", limited)
    assert musicgen.scheduler(states, lambda *_: None, lambda: None).rows == 2
    assert tried == [10, 5, 2]
    limit = 1
    with pytest.raises(EngineUnusable, match="no memory for one variation"):
        musicgen.scheduler(states, lambda *_: None, lambda: None)
