"""From conditions to sound: the library's own generate(), one variation at a time.

The library samples from torch's global generator and hides the tokens. Here it runs greedily on
scores that a hook has already turned into a choice, so each variation has its own random stream,
the tokens can be looked at, and the hook reports every step and can end the run at any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen.loader import Checkpoint
from pipeline.engines.musicgen.sampling import Sampler, Tokens
from pipeline.records import Samples

if TYPE_CHECKING:
    import torch

OnStep = Callable[[int, int], None]  # steps done, of how many; may raise


@dataclass(frozen=True, eq=False)
class Generated:
    """What the model made."""

    samples: Samples  # float32, (channels, frames * hop)
    codes: NDArray[np.int64]  # (codebooks, frames); stereo checkpoints interleave left and right


def generate(
    checkpoint: Checkpoint,
    *,
    chroma: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
    n_frames: int,
    sampler: Sampler,
    on_step: OnStep,
) -> Generated:
    """Make `n_frames` frames of tokens and their sound.

    Codebook k lags k frames behind the first (the delay pattern, per channel), so a run takes
    `n_frames + codebooks per channel - 1` steps.
    """
    import torch
    from transformers import LogitsProcessorList

    lags = delays(checkpoint)
    steps = n_frames + max(lags)
    pick = _PickingHook(sampler, lambda done: on_step(done, steps))
    ids, mask = text
    with torch.inference_mode():
        samples = checkpoint.model.generate(
            input_ids=ids.to(checkpoint.device),
            attention_mask=mask.to(checkpoint.device),
            input_features=chroma.to(checkpoint.device),
            max_length=steps + 1,  # the first position holds the start token
            guidance_scale=sampler.params.guidance,
            do_sample=False,
            logits_processor=LogitsProcessorList([pick]),
        )
    picked = np.stack(pick.picked, axis=1)  # (codebooks, steps)
    codes = np.stack([row[lag : lag + n_frames] for row, lag in zip(picked, lags, strict=True)])
    return Generated(samples[0].to("cpu", torch.float32).numpy(), codes)


def delays(checkpoint: Checkpoint) -> list[int]:
    """By how many frames each codebook lags; in stereo, left and right take turns."""
    return [codebook // checkpoint.channels for codebook in range(checkpoint.codebooks)]


class _PickingHook:
    """A logits processor that leaves one token to choose from in each row: the sampler's."""

    def __init__(self, sampler: Sampler, on_step: Callable[[int], None]) -> None:
        self.picked: list[Tokens] = []
        self._sampler, self._on_step = sampler, on_step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (rows, vocabulary): the codebooks, and with guidance the null condition's after them."""
        import torch

        rows = scores.detach().to("cpu", torch.float64).numpy()
        n_codebooks = input_ids.shape[0]
        unconditional = rows[n_codebooks:] if len(rows) > n_codebooks else None
        tokens = self._sampler.pick(len(self.picked), rows[:n_codebooks], unconditional)
        self.picked.append(tokens)
        self._on_step(len(self.picked))
        # The library's guidance comes after this hook: of two equal halves it makes that same half.
        chosen = torch.from_numpy(np.tile(tokens, len(rows) // n_codebooks)).to(scores.device)
        return torch.zeros_like(scores).scatter_(1, chosen[:, None], 1.0)
