"""Picking tokens from logits; needs no model."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.engines.musicgen import SamplingParams
from pipeline.engines.musicgen.sampling import Sampler, draw, gumbel, log_probabilities
from pipeline.errors import EngineFailure

LOGITS = np.random.default_rng(0).normal(0, 3, (4, 2048))


def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The softmax of the log-probabilities."""
    weights = np.exp(log_probabilities(logits, params))
    return weights / weights.sum(axis=-1, keepdims=True)


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
    kept = probabilities(np.log([[0.1, 0.4, 0.2, 0.3]]), SamplingParams(top_k=1, top_p=0.6))
    np.testing.assert_allclose(kept, [[0, 4 / 7, 0, 3 / 7]], atol=1e-12)


def test_a_top_p_smaller_than_any_keeps_the_likeliest() -> None:
    assert probabilities(LOGITS, SamplingParams(top_p=1e-9)).max(axis=-1).tolist() == [1, 1, 1, 1]


def test_guidance_moves_away_from_the_null_condition() -> None:
    conditional, null = np.array([[0.0, 1.0, 0.9]]), np.array([[0.0, 1.0, 0.0]])
    greedy = SamplingParams(temperature=0.0, guidance=3.0)
    assert Sampler(greedy, 0).pick(0, conditional, None) == [1]
    assert Sampler(greedy, 0).pick(0, conditional, null) == [2]


def test_draws_follow_the_probabilities() -> None:
    """Reference: the frequencies themselves; 5 standard deviations of 40,000 draws."""
    wanted = np.array([0.5, 0.0, 0.3, 0.2])
    with np.errstate(divide="ignore"):
        rows = np.tile(np.log(wanted), (40_000, 1))
    noise = gumbel(1, 0, 1, rows.size).reshape(rows.shape)
    frequencies = np.bincount(draw(rows, noise), minlength=4) / len(rows)
    np.testing.assert_allclose(frequencies, wanted, atol=5 * np.sqrt(0.25 / len(rows)))


def test_the_noise_is_standard_gumbel() -> None:
    """Reference: scipy's, Kolmogorov-Smirnov over 200,000 values; p > 1e-3 (the seed is fixed)."""
    stats = pytest.importorskip("scipy.stats")
    noise = np.concatenate([gumbel(7, step, 4, 2048).ravel() for step in range(25)])
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3


def test_the_noise_depends_on_seed_step_and_codebook_and_on_nothing_else() -> None:
    seeds, steps = (0, 1, 2**32, 2**62, 2**63 - 1), (0, 1, 1499, 50 * 3600)
    rows = {
        (seed, step, codebook): row.tobytes()
        for seed in seeds
        for step in steps
        for codebook, row in enumerate(gumbel(seed, step, 4, 64))
    }
    assert len(set(rows.values())) == len(rows) == 80
    again = gumbel(2**62, 1499, 8, 64)  # of a stereo checkpoint, with other draws before
    assert again[3].tobytes() == rows[2**62, 1499, 3]
    assert gumbel(0, 5, 1, 2048)[:, :64].tobytes() == gumbel(0, 5, 1, 64).tobytes()


def test_a_step_can_be_drawn_again_alone() -> None:
    """What a resumed run relies on."""
    sampler = Sampler(SamplingParams(), 5)
    in_order = [sampler.pick(step, LOGITS, None).tolist() for step in range(5)]
    assert Sampler(SamplingParams(), 5).pick(3, LOGITS, None).tolist() == in_order[3]
    assert len({str(tokens) for tokens in in_order}) == 5


def test_top_k_does_not_change_the_noise_of_the_tokens_that_it_keeps() -> None:
    for step in range(50):
        free = Sampler(SamplingParams(top_k=0), 3).pick(step, LOGITS, None)
        cut = Sampler(SamplingParams(top_k=250), 3).pick(step, LOGITS, None)
        kept = np.isfinite(log_probabilities(LOGITS, SamplingParams(top_k=250)))[np.arange(4), free]
        assert (cut[kept] == free[kept]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail(bad: float) -> None:
    with pytest.raises(EngineFailure, match="NaN or infinity"):
        Sampler(SamplingParams(), 0).pick(0, np.full((4, 8), bad), None)
