"""The loop around a peer's decoder that has no loop of its own: guidance, top-k, and timed steps.

The delay pattern is left out, as it takes no time. To reach long contexts without minutes of steps the
decoder is moved there: the cost of a step depends on how many positions are cached, not on their values.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from peer_transformers import GUIDANCE, TOP_K
from steps import CODEBOOKS, WARM_STEPS, PeerRun, Point, fits

if TYPE_CHECKING:
    import torch

START = 2048  # the token before the first


class PeerDecoder(Protocol):
    """A decoder with a KV cache for the variations of one track.

    Its rows are the conditional ones of all variations, then the unconditional ones.
    """

    position_bytes: int  # of keys and values of one position of one row
    own: int  # own positions of each row that the cache holds

    def prefill(self, prefixes: torch.Tensor, variations: int, steps: int) -> None:
        """Run the prefixes with and without condition, (2, positions, hidden), for `steps` steps at most."""
        ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next tokens of each row, (rows, codebooks); returns (rows, codebooks, vocabulary) logits."""
        ...

    def move(self, own: int) -> None:
        """Fill keys and values with numbers, and go on after so many own positions of each row."""
        ...


def measure(
    name: str,
    decoder: PeerDecoder,
    prefixes: torch.Tensor,
    variations: int,
    *,
    own_steps: Sequence[int],
    timed: int,
    load_s: float,
) -> PeerRun:
    """Time the prefill, the first steps and those at `own_steps` as far as their cache fits into memory."""
    import torch

    rows, prefix = 2 * variations, prefixes.shape[1]
    possible = [own for own in own_steps if fits(own * rows * decoder.position_bytes)]
    tokens = torch.full((rows, CODEBOOKS), START)
    began_s = time.perf_counter()
    decoder.prefill(prefixes, variations, max(possible, default=0) + 2 * (WARM_STEPS + timed))
    tokens = pick(decoder.step(tokens))
    prefill_s = time.perf_counter() - began_s

    def point() -> Point:
        nonlocal tokens
        seconds = []
        for _ in range(WARM_STEPS + timed):
            start_s = time.perf_counter()
            tokens = pick(decoder.step(tokens))
            seconds.append(time.perf_counter() - start_s)
        own = decoder.own - (timed - 1) // 2
        return Point(prefix + own, own, tuple(seconds[WARM_STEPS:]))

    untouched, points = point(), []
    for own in possible:
        decoder.move(own - WARM_STEPS - (timed + 1) // 2)
        points.append(point())
    return PeerRun(
        name=name,
        variations=variations,
        rows=rows,
        prefill_s=prefill_s,
        untouched=untouched,
        points=tuple(points),
        left_out=tuple(own for own in own_steps if own not in possible),
        load_s=load_s,
        peak_bytes=0,
    )


def pick(logits: torch.Tensor) -> torch.Tensor:
    """Tokens for all rows by guidance and top-k: (rows, codebooks, vocabulary) to (rows, codebooks)."""
    import torch

    conditional, unconditional = logits.chunk(2)
    likeliest, tokens = torch.lerp(unconditional, conditional, GUIDANCE).topk(TOP_K)
    chosen = torch.multinomial(likeliest.softmax(-1).flatten(0, 1), 1)
    return tokens.gather(-1, chosen.unflatten(0, tokens.shape[:2]))[..., 0].repeat(2, 1)
