"""Picking tokens; needs no model."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.engines.musicgen.sampling import Sampler, SamplingParams, draw, probabilities
from pipeline.errors import EngineFailure

LOGITS = np.random.default_rng(0).normal(0, 3, (4, 2048))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 250), (0.7, 50), (1.3, 0), (1.0, 1)])
def test_temperature_and_top_k_are_the_librarys(temperature: float, top_k: int) -> None:
    """Reference: transformers' warpers in float64; 1e-12."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    scores = transformers.TemperatureLogitsWarper(temperature)(None, torch.from_numpy(LOGITS))
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    ours = probabilities(LOGITS, SamplingParams(temperature=temperature, top_k=top_k))
    np.testing.assert_allclose(ours, scores.softmax(-1).numpy(), atol=1e-12)


def test_top_p_keeps_the_likeliest_up_to_that_probability_and_replaces_top_k() -> None:
    chances = np.array([[0.1, 0.4, 0.2, 0.3]])
    kept = probabilities(np.log(chances), SamplingParams(top_k=1, top_p=0.6))
    np.testing.assert_allclose(kept, [[0, 4 / 7, 0, 3 / 7]], atol=1e-12)


def test_a_top_p_smaller_than_any_keeps_the_likeliest() -> None:
    assert probabilities(LOGITS, SamplingParams(top_p=1e-9)).max(axis=-1).tolist() == [1, 1, 1, 1]


def test_guidance_moves_away_from_the_null_condition() -> None:
    conditional, null = np.array([[0.0, 1.0, 0.9]]), np.array([[0.0, 1.0, 0.0]])
    greedy = SamplingParams(temperature=0.0, guidance=3.0)
    assert Sampler(greedy, 0).pick(conditional, None) == [1]
    assert Sampler(greedy, 0).pick(conditional, null) == [2]


def test_draws_follow_the_probabilities() -> None:
    """Reference: the frequencies themselves; 5 standard deviations of 40,000 draws."""
    chances = np.array([0.5, 0.0, 0.3, 0.2])
    tokens = draw(np.tile(chances, (40_000, 1)), np.random.default_rng(1).random(40_000))
    frequencies = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(frequencies, chances, atol=5 * np.sqrt(0.25 / len(tokens)))


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform: float) -> None:
    chances = np.array([[0.0, 0.5, 0.5, 0.0]])
    assert chances[0, draw(chances, np.array([uniform]))[0]] > 0


def test_a_stream_depends_on_all_bits_of_the_seed_and_on_nothing_else() -> None:
    def tokens(seed: int) -> list[list[int]]:
        sampler = Sampler(SamplingParams(), seed)
        return [sampler.pick(LOGITS, None).tolist() for _ in range(5)]

    assert tokens(0) == tokens(0)
    assert len({str(tokens(seed)) for seed in (0, 1, 2**32, 2**62, 2**63 - 1)}) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail(bad: float) -> None:
    with pytest.raises(EngineFailure, match="NaN or infinity"):
        Sampler(SamplingParams(), 0).pick(np.full((4, 8), bad), None)
