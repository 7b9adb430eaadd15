"""Picking tokens, in audiocraft's order: guide, divide by the temperature, cut the tail, draw.

Every variation draws from its own stream, a PCG64 seeded with all 64 bits of its seed: torch's
own generator takes the low 32 alone, and a shared one would make a result depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import EngineFailure

Logits = NDArray[np.float64]  # (codebooks, vocabulary)
Tokens = NDArray[np.int64]  # (codebooks,)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are picked; see `MusicgenParams` for the ranges."""

    temperature: float = 1.0  # 0: the likeliest
    top_k: int = 250  # 0: all
    top_p: float = 0.0  # 0: off; otherwise replaces top_k, as in audiocraft
    guidance: float = 3.0  # 1: none


class Sampler:
    """Picks the tokens of one variation, step after step; holds nothing but its random stream."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(seed))

    def pick(self, conditional: Logits, unconditional: Logits | None) -> Tokens:
        """One token per codebook; `unconditional` is None without guidance.

        A uniform number is drawn per codebook whatever the parameters are, so that the streams of
        two variations with one seed stay comparable.

        Raises:
            EngineFailure: the logits aren't finite.
        """
        logits = conditional
        if unconditional is not None:
            logits = unconditional + (conditional - unconditional) * self.params.guidance
        if not np.isfinite(logits).all():
            raise EngineFailure("musicgen gave NaN or infinity instead of probabilities.")
        uniform = self._random.random(len(logits))
        if self.params.temperature == 0:
            return np.asarray(logits.argmax(axis=-1))
        return draw(probabilities(logits, self.params), uniform)


def probabilities(logits: Logits, params: SamplingParams) -> Logits:
    """Softmax of logits over temperature, without the tail; each row sums to 1."""
    scaled = logits / params.temperature
    chances = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    chances /= chances.sum(axis=-1, keepdims=True)
    if params.top_p > 0:
        chances = np.where(_nucleus(chances, params.top_p), chances, 0.0)
    elif 0 < params.top_k < chances.shape[-1]:
        least = np.partition(chances, -params.top_k, axis=-1)[:, -params.top_k, None]
        chances = np.where(chances >= least, chances, 0.0)
    return np.asarray(chances / chances.sum(axis=-1, keepdims=True))


def draw(chances: Logits, uniform: NDArray[np.float64]) -> Tokens:
    """Inverse-CDF sampling: the first token whose cumulated chance exceeds `uniform` (one per row)."""
    cumulated = chances.cumsum(axis=-1)
    token = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(axis=-1)
    return np.asarray(token, dtype=np.int64)


def _nucleus(chances: Logits, top_p: float) -> NDArray[np.bool_]:
    """True for the likeliest tokens up to the one that brings their sum to `top_p`; ties by index."""
    order = np.argsort(-chances, axis=-1, kind="stable")
    ranked = np.take_along_axis(chances, order, axis=-1)
    before = ranked.cumsum(axis=-1) - ranked
    keep = np.zeros(chances.shape, dtype=bool)
    np.put_along_axis(keep, order, before < top_p, axis=-1)
    return keep
