"""Continuous batching: each request gets the tokens it would get alone, and nothing is run twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from musicgen_setup import CountingDecoder, codes_of, decoder_of, generator_with, request_state, run_requests
from tones import C_MAJOR, RequestFn, tones

from pipeline.errors import EngineFailure
from pipeline.records import VariationRequest


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
    """The tokens of each request alone, by kind of decoder."""
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


def test_requests_together_in_any_order_get_the_tokens_they_get_alone(
    any_musicgen: Any, requests: list[VariationRequest], alone: dict
) -> None:
    for order in (requests, requests[3:] + requests[2::-1]):
        assert_as_alone(any_musicgen, requests, codes_of(any_musicgen, *order), alone)


def test_requests_in_the_fewest_rows_get_the_tokens_they_get_alone(
    any_musicgen: Any, requests: list[VariationRequest], alone: dict
) -> None:
    """A limit below what the process holds already leaves two rows: one variation with guidance."""
    decoder = CountingDecoder(any_musicgen.decoder)
    small = generator_with(any_musicgen.checkpoint, decoder, max_memory_gb=0.001)
    assert_as_alone(any_musicgen, requests, codes_of(small, *requests), alone)
    assert max(decoder.rows) == 2


@pytest.mark.parametrize("rows", [3, 4, 5, 7])
def test_any_number_of_rows_gives_the_same_tokens(musicgen: Any, rows: int) -> None:
    """Guidance takes two rows; an odd row stays free, or is taken by a request without guidance."""

    def states() -> list[Any]:
        return [
            request_state(
                musicgen.checkpoint, str(n), frames=10 + 7 * (n % 3), seed=n, guidance=1.0 if n % 2 else 3.0
            )
            for n in range(7)
        ]

    decoder = CountingDecoder(musicgen.decoder)
    found, in_16_rows = (
        {
            finished.request_id: finished.codes
            for finished in run_requests(musicgen.checkpoint, decoder, states(), n)
        }
        for n in (rows, 16)
    )
    assert found.keys() == in_16_rows.keys()
    for name, codes in in_16_rows.items():
        np.testing.assert_array_equal(found[name], codes)


def test_a_free_row_goes_to_the_next_request_at_once(musicgen: Any) -> None:
    """Two rows, a short and a long request: the third runs in the short one's row beside the long one."""
    states = [
        request_state(musicgen.checkpoint, name, frames=frames, guidance=1.0)
        for name, frames in (("short", 10), ("long", 40), ("third", 20))
    ]
    decoder = CountingDecoder(musicgen.decoder)
    order = [finished.request_id for finished in run_requests(musicgen.checkpoint, decoder, states, 2)]
    assert order == ["short", "third", "long"]
    assert decoder.rows == [2] * (13 + 23) + [1] * (43 - 13 - 23)


def test_the_cache_is_freed_before_the_last_variation_is_decoded(musicgen: Any) -> None:
    """Three variations in two rows without guidance: the third one gets the first one's row."""
    decoder = CountingDecoder(musicgen.decoder)
    states = [
        request_state(musicgen.checkpoint, name, frames=frames, guidance=1.0)
        for name, frames in (("short", 10), ("long", 40), ("third", 20))
    ]
    is_freed = [
        (finished.request_id, decoder.cache() is None)
        for finished in run_requests(musicgen.checkpoint, decoder, states, 2)
    ]
    assert is_freed == [("short", False), ("third", False), ("long", True)]


# -- prefixes ----------------------------------------------------------------------------------------


def prefills(musicgen: Any, rows: int, states: list[Any]) -> int:
    decoder = CountingDecoder(musicgen.decoder)
    assert all(
        finished.error is None for finished in run_requests(musicgen.checkpoint, decoder, states, rows)
    )
    return decoder.prefills


@pytest.mark.parametrize("rows", [2, 4, 16])
def test_the_variations_of_a_track_share_their_prefixes(musicgen: Any, rows: int) -> None:
    """One conditional and one unconditional, however many variations there are and however few rows."""
    states = [request_state(musicgen.checkpoint, str(n), frames=5, seed=n) for n in range(8)]
    assert prefills(musicgen, rows, states) == 2


def test_tracks_share_the_unconditional_prefix(musicgen: Any) -> None:
    pitches = (220.0, 261.63, 293.66, 329.63)
    states = [request_state(musicgen.checkpoint, str(f), frames=5, audio=tones(f)) for f in pitches]
    assert prefills(musicgen, 8, states) == 4 + 1


def test_each_prompt_has_a_prefix_and_an_unconditional_one_of_its_length(musicgen: Any) -> None:
    prompts = ("", "warm piano", "slow drums", "warm analog synths")
    states = [request_state(musicgen.checkpoint, prompt, frames=5, prompt=prompt) for prompt in prompts]
    assert prefills(musicgen, 8, states) == 4 + 3  # 1, 3, 3 and 4 tokens


def test_without_guidance_there_is_no_unconditional_prefix(musicgen: Any) -> None:
    states = [request_state(musicgen.checkpoint, str(n), frames=5, seed=n, guidance=1.0) for n in range(4)]
    assert prefills(musicgen, 4, states) == 1


def test_a_prefix_that_was_evicted_is_prefilled_again(musicgen: Any) -> None:
    """More tracks than slots; each variation still has the tokens it gets alone."""
    pitches = (220.0, 261.63, 293.66, 220.0, 261.63)
    states = [
        request_state(musicgen.checkpoint, str(n), frames=8, audio=tones(f)) for n, f in enumerate(pitches)
    ]
    for finished in run_requests(musicgen.checkpoint, musicgen.decoder, states, 2):
        number = int(finished.request_id)
        (single,) = run_requests(
            musicgen.checkpoint,
            musicgen.decoder,
            [request_state(musicgen.checkpoint, "alone", frames=8, audio=tones(pitches[number]))],
            2,
        )
        np.testing.assert_array_equal(finished.codes, single.codes)


# -- failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 6])
def test_a_request_whose_logits_are_not_numbers_fails_alone(any_musicgen: Any, rows: int) -> None:
    checkpoint = any_musicgen.checkpoint
    good = [request_state(checkpoint, name, frames=12, seed=seed) for seed, name in enumerate("ab")]
    bad = request_state(checkpoint, "bad", frames=12, prompt="fast drums")
    decoder = CountingDecoder(any_musicgen.decoder)
    decoder.broken = bad.conditions.conditional(0)
    ended = {
        finished.request_id: finished
        for finished in run_requests(checkpoint, decoder, [good[0], bad, good[1]], rows)
    }
    assert isinstance(ended["bad"].error, EngineFailure)
    assert "NaN or infinity" in str(ended["bad"].error)
    for seed, name in enumerate("ab"):
        assert ended[name].error is None
        (single,) = run_requests(
            checkpoint, any_musicgen.decoder, [request_state(checkpoint, name, frames=12, seed=seed)], 2
        )
        np.testing.assert_array_equal(ended[name].codes, single.codes)


def test_a_prefix_that_cannot_be_made_fails_its_request_alone(
    musicgen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two rows: those of the failed request have to be free again."""
    from pipeline.engines.musicgen.conditioning import Conditions

    checkpoint, conditional = musicgen.checkpoint, Conditions.conditional
    bad = request_state(checkpoint, "bad", frames=12, prompt="fast drums")

    def fail(self: Conditions, start: int) -> np.ndarray:
        if self is bad.conditions:
            raise ValueError("no prefix")
        return conditional(self, start)

    monkeypatch.setattr(Conditions, "conditional", fail)
    states = [
        request_state(checkpoint, "a", frames=12),
        bad,
        request_state(checkpoint, "b", frames=12, seed=1),
    ]
    ended = {
        finished.request_id: finished.error
        for finished in run_requests(checkpoint, musicgen.decoder, states, 2)
    }
    assert str(ended.pop("bad")) == "no prefix"
    assert ended == {"a": None, "b": None}


# -- half precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_makes_valid_tokens_and_the_same_again(
    musicgen: Any, request_for: RequestFn, kind: str
) -> None:
    """The precision of a GPU, on the CPU."""
    engine = generator_with(musicgen.checkpoint, decoder_of(musicgen.checkpoint, kind))
    asked = [request_for("a", duration_s=0.2), request_for("b", duration_s=0.3, guidance=1.0)]
    found, again = codes_of(engine, *asked), codes_of(engine, *asked)
    assert {name: codes.shape for name, codes in found.items()} == {"a": (4, 10), "b": (4, 15)}
    for name, codes in found.items():
        assert ((codes >= 0) & (codes < 2048)).all()
        np.testing.assert_array_equal(codes, again[name])
