"""Picking tokens, in audiocraft's order: guidance, temperature, top-k or top-p, draw.

The noise of a draw is a pure function of (seed, step, codebook, token): Philox4x64-10 (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed as its key and the rest as its
counter. There is no state between steps, so a variation's tokens can't depend on the other requests,
on their order, or on where a run was interrupted. The draw is the Gumbel-max trick (Gumbel 1954;
Maddison et al. 2014): the largest of log p + Gumbel noise is a sample of p. As each token has noise of
its own, cutting the tail changes no noise of the tokens that remain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen import SamplingParams
from pipeline.errors import EngineFailure

Logits = NDArray[np.float64]  # (codebooks, vocabulary)
Tokens = NDArray[np.int64]  # (codebooks,)


@dataclass(frozen=True)
class Sampler:
    """Picks the tokens of one variation; holds no state."""

    params: SamplingParams
    seed: int  # 0 <= seed < 2**63

    def pick(self, step: int, conditional: Logits, unconditional: Logits | None = None) -> Tokens:
        """One token per codebook at a step, counted from 0; `unconditional` is None without guidance.

        Raises:
            EngineFailure: the logits are not finite, also divided by the temperature.
        """
        logits = conditional
        if unconditional is not None:
            logits = unconditional + (conditional - unconditional) * self.params.guidance
        with np.errstate(over="ignore"):
            scaled = logits / (self.params.temperature or 1.0)
        if not np.isfinite(scaled).all():
            raise EngineFailure("musicgen computed NaN or infinity instead of probabilities.")
        if self.params.temperature == 0:
            return np.asarray(logits.argmax(axis=-1))
        return draw(log_probabilities(logits, self.params), gumbel(self.seed, step, *logits.shape))


def log_probabilities(logits: Logits, params: SamplingParams) -> Logits:
    """Log-probabilities at the temperature, up to a constant per row; -inf for the tail that is cut."""
    scaled = logits / params.temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    if params.top_p > 0:
        return np.where(_nucleus(scaled, params.top_p), scaled, -np.inf)
    if 0 < params.top_k < scaled.shape[-1]:
        least = np.partition(scaled, -params.top_k, axis=-1)[:, -params.top_k, None]
        return np.where(scaled >= least, scaled, -np.inf)
    return scaled


def gumbel(seed: int, step: int, codebooks: int, vocabulary: int) -> Logits:
    """Standard Gumbel noise for every token of a step, float64, (codebooks, vocabulary)."""
    rows = [
        np.random.Philox(key=seed, counter=[0, codebook, step, 0]).random_raw(vocabulary)
        for codebook in range(codebooks)
    ]
    uniform = ((np.stack(rows) >> np.uint64(12)) + 0.5) * 2.0**-52  # in (0, 1), without 0 and 1
    return np.asarray(-np.log(-np.log(uniform)))


def draw(log_probabilities: Logits, noise: Logits) -> Tokens:
    """Gumbel-max: one token per row, with the probabilities softmax(`log_probabilities`)."""
    return np.asarray((log_probabilities + noise).argmax(axis=-1), dtype=np.int64)


def _nucleus(scaled: Logits, top_p: float) -> NDArray[np.bool_]:
    """True for the likeliest tokens up to the one at which their sum reaches `top_p`; ties by index."""
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=-1)
    before = ranked.cumsum(axis=-1) - ranked
    keep = np.zeros(probabilities.shape, dtype=bool)
    np.put_along_axis(keep, order, before < top_p, axis=-1)
    return keep
