"""Many variations in few rows: each comes out as if it were alone, and nothing is run twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from musicgen_setup import Watched, codes_of, decoder_of, generator_with, run_batch, voice
from tones import RequestFn, tones

from pipeline.errors import EngineFailure
from pipeline.records import VariationRequest

C_MAJOR = (261.63, 329.63, 392.0)


@pytest.fixture
def requests() -> list[VariationRequest]:
    """Of two tracks, with and without guidance, of three lengths, with and without a prompt."""
    ours, other = tones(440.0, 554.37), tones(*C_MAJOR)
    return [
        VariationRequest("a", "track", ours, 0.5, 7, {}),
        VariationRequest("b", "track", ours, 0.7, 7, {"guidance": 1.0}),
        VariationRequest("c", "track", ours, 0.3, 0, {"prompt": "warm synths", "temperature": 1.4}),
        VariationRequest("d", "other", other, 0.5, 7, {"guidance": 1.0, "prompt": "slow piano"}),
        VariationRequest("e", "other", other, 0.7, 2**40, {"guidance": 6.0, "top_p": 0.9}),
        VariationRequest("f", "other", other, 0.3, 7, {}),
    ]


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], np.ndarray]:
    """What each request gave by itself, by kind of decoder."""
    return {}


def assert_as_alone(
    engine: Any, requests: list[VariationRequest], found: dict[str, np.ndarray], alone: dict
) -> None:
    kind = type(engine.decoder).__name__ + engine.decoder.precision
    assert found.keys() == {request.request_id for request in requests}
    for request in requests:
        key = kind, request.request_id
        if key not in alone:
            alone[key] = codes_of(engine, request)[request.request_id]
        np.testing.assert_array_equal(found[request.request_id], alone[key], err_msg=request.request_id)


def test_together_and_in_any_order_it_is_as_alone(
    any_musicgen: Any, requests: list[VariationRequest], alone: dict
) -> None:
    for order in (requests, requests[::-1], requests[3:] + requests[:3]):
        assert_as_alone(any_musicgen, requests, codes_of(any_musicgen, *order), alone)


def test_in_as_few_rows_as_there_is_memory_for_it_is_as_alone(
    any_musicgen: Any, requests: list[VariationRequest], alone: dict
) -> None:
    """A limit below what the process has already leaves two rows: one variation with guidance."""
    decoder = Watched(any_musicgen.decoder)
    small = generator_with(any_musicgen.checkpoint, decoder, max_memory_gb=0.001)
    assert_as_alone(any_musicgen, requests, codes_of(small, *requests), alone)
    assert max(decoder.rows) == 2


@pytest.mark.parametrize("rows", [3, 4, 5, 7])
def test_any_number_of_rows_gives_the_same(musicgen: Any, rows: int) -> None:
    """Guidance takes two rows; an odd one is left over, or taken by one without."""

    def voices() -> list[Any]:
        return [
            voice(
                musicgen.checkpoint, str(n), frames=10 + 7 * (n % 3), seed=n, guidance=1.0 if n % 2 else 3.0
            )
            for n in range(7)
        ]

    decoder = Watched(musicgen.decoder)
    found, plenty = (
        {
            its.voice.request_id: its.voice.codes
            for its in run_batch(musicgen.checkpoint, decoder, voices(), n)
        }
        for n in (rows, 16)
    )
    assert found.keys() == plenty.keys()
    for name, codes in plenty.items():
        np.testing.assert_array_equal(found[name], codes)


def test_rows_that_are_free_are_given_to_the_next_at_once(musicgen: Any) -> None:
    """Of a short and a long variation in two rows, the short one's row takes a third beside the long one."""
    voices = [
        voice(musicgen.checkpoint, name, frames=frames, guidance=1.0)
        for name, frames in (("short", 10), ("long", 40), ("third", 20))
    ]
    decoder = Watched(musicgen.decoder)
    ended = [its.voice.request_id for its in run_batch(musicgen.checkpoint, decoder, voices, 2)]
    assert ended == ["short", "third", "long"]
    assert decoder.rows == [2] * (13 + 23) + [1] * (43 - 13 - 23)


def test_those_that_were_begun_go_first(musicgen: Any) -> None:
    """Others would take the rows that hold what they go on from."""
    new, begun = (voice(musicgen.checkpoint, name, frames=20, guidance=1.0) for name in ("new", "begun"))
    begun.codes[:, :10] = 5
    ended = [
        its.voice.request_id for its in run_batch(musicgen.checkpoint, musicgen.decoder, [new, begun], 1)
    ]
    assert ended == ["begun", "new"]


# -- prefixes ----------------------------------------------------------------------------------------


def prefills(musicgen: Any, rows: int, voices: list[Any]) -> int:
    decoder = Watched(musicgen.decoder)
    assert all(its.error is None for its in run_batch(musicgen.checkpoint, decoder, voices, rows))
    return decoder.prefills


@pytest.mark.parametrize("rows", [2, 4, 16])
def test_the_variations_of_a_track_share_their_prefixes(musicgen: Any, rows: int) -> None:
    """One of the track, one of nothing, however many variations there are and however few rows."""
    voices = [voice(musicgen.checkpoint, str(n), frames=5, seed=n) for n in range(8)]
    assert prefills(musicgen, rows, voices) == 2


def test_tracks_share_the_prefix_of_nothing(musicgen: Any) -> None:
    pitches = (220.0, 261.63, 293.66, 329.63)
    voices = [voice(musicgen.checkpoint, str(f), frames=5, audio=tones(f)) for f in pitches]
    assert prefills(musicgen, 8, voices) == 4 + 1


def test_each_prompt_has_its_prefix_and_nothing_is_as_long(musicgen: Any) -> None:
    prompts = ("", "warm piano", "slow drums", "warm analog synths")
    voices = [voice(musicgen.checkpoint, prompt, frames=5, prompt=prompt) for prompt in prompts]
    assert prefills(musicgen, 8, voices) == 4 + 3  # 1, 3, 3 and 4 tokens


def test_without_guidance_nothing_has_no_prefix(musicgen: Any) -> None:
    voices = [voice(musicgen.checkpoint, str(n), frames=5, seed=n, guidance=1.0) for n in range(4)]
    assert prefills(musicgen, 4, voices) == 1


def test_a_prefix_that_had_to_make_room_is_run_again(musicgen: Any) -> None:
    """More tracks than places; each variation still as alone."""
    pitches = (220.0, 261.63, 293.66, 220.0, 261.63)
    voices = [voice(musicgen.checkpoint, str(n), frames=8, audio=tones(f)) for n, f in enumerate(pitches)]
    for its in run_batch(musicgen.checkpoint, musicgen.decoder, voices, 2):
        number = int(its.voice.request_id)
        (single,) = run_batch(
            musicgen.checkpoint,
            musicgen.decoder,
            [voice(musicgen.checkpoint, "alone", frames=8, audio=tones(pitches[number]))],
            2,
        )
        np.testing.assert_array_equal(its.voice.codes, single.voice.codes)


# -- failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 6])
def test_a_voice_whose_logits_are_not_numbers_fails_alone(any_musicgen: Any, rows: int) -> None:
    checkpoint = any_musicgen.checkpoint
    good = [voice(checkpoint, name, frames=12, seed=seed) for seed, name in enumerate("ab")]
    bad = voice(checkpoint, "bad", frames=12, prompt="fast drums")
    decoder = Watched(any_musicgen.decoder)
    decoder.broken = bad.conditions.told(bad.conditions.window(0.0))
    ended = {
        its.voice.request_id: its for its in run_batch(checkpoint, decoder, [good[0], bad, good[1]], rows)
    }
    assert isinstance(ended["bad"].error, EngineFailure)
    assert "NaN or infinity" in str(ended["bad"].error)
    for seed, name in enumerate("ab"):
        assert ended[name].error is None
        (single,) = run_batch(
            checkpoint, any_musicgen.decoder, [voice(checkpoint, name, frames=12, seed=seed)], 2
        )
        np.testing.assert_array_equal(ended[name].voice.codes, single.voice.codes)


def test_a_prefix_that_cannot_be_made_fails_its_voice_alone(
    musicgen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two rows: what the broken one took has to be free again."""
    from pipeline.engines.musicgen.conditioning import Conditions

    checkpoint, told = musicgen.checkpoint, Conditions.told
    bad = voice(checkpoint, "bad", frames=12, prompt="fast drums")

    def fail(self: Conditions, window: np.ndarray) -> np.ndarray:
        if self is bad.conditions:
            raise MemoryError("no room")
        return told(self, window)

    monkeypatch.setattr(Conditions, "told", fail)
    voices = [voice(checkpoint, "a", frames=12), bad, voice(checkpoint, "b", frames=12, seed=1)]
    ended = {its.voice.request_id: its.error for its in run_batch(checkpoint, musicgen.decoder, voices, 2)}
    assert str(ended.pop("bad")) == "no room"
    assert ended == {"a": None, "b": None}


# -- half precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_makes_what_is_asked_for(musicgen: Any, request_for: RequestFn, kind: str) -> None:
    """What a GPU calculates in; the same request gives the same tokens again."""
    engine = generator_with(musicgen.checkpoint, decoder_of(musicgen.checkpoint, kind))
    asked = [request_for("a", duration_s=0.2), request_for("b", duration_s=0.3, guidance=1.0)]
    found, again = codes_of(engine, *asked), codes_of(engine, *asked)
    assert {name: codes.shape for name, codes in found.items()} == {"a": (4, 10), "b": (4, 15)}
    for name, codes in found.items():
        assert ((codes >= 0) & (codes < 2048)).all()
        np.testing.assert_array_equal(codes, again[name])
