"""Parts of a decoder's step in torch's own operations, on any device: the reference for `triton_ops`.

They take and give tensors of fixed shapes and never wait for the device, so a step can be captured as
a graph. Both modules have the same functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from pipeline.engines.musicgen.decoder import UNKNOWN

if TYPE_CHECKING:
    from pipeline.engines.musicgen.torch_cache import Step

NOT_FINITE = -2  # instead of a token: the logits were not finite

# Of Philox4x64-10, see `sampling`.
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
ROUNDS = 10
_LOW = 0xFFFFFFFF


def add_norm(
    x: torch.Tensor, added: torch.Tensor | None, norm: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Add the sum of `added` to x in place, and give x normalized, in `dtype`.

    x is float32 (n, hidden), `added` of any type (parts, n, hidden), `norm` float32 (2, hidden): weight
    and bias.
    """
    if added is not None:
        x += added.sum(dim=0, dtype=torch.float32)
    return layer_norm(x, x.shape[1:], norm[0], norm[1]).to(dtype)


def product(x: torch.Tensor, weights: torch.Tensor, *, with_gelu: bool = False) -> torch.Tensor:
    """x (n, inputs) by weights (outputs, inputs), of one type, and GELU of it; (n, outputs) of that type."""
    out = linear(x, weights)
    return gelu(out) if with_gelu else out


def product_in_parts(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same product in parts, to be summed: (parts, n, outputs)."""
    return linear(x, weights)[None]


def product_float32(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same product in float32."""
    return linear(x, weights).float()


def attend(qkv: torch.Tensor, own: torch.Tensor, prefixes: torch.Tensor, step: Step) -> torch.Tensor:
    """Store each row's key and value, and attend to its prefix and to its own steps up to this one.

    Args:
        qkv: queries, keys and values of this step, (rows, 3 * hidden), of the first rows of the step.
        own: keys and values of one layer, (2, slots, heads, steps, head size).
        prefixes: the same of the prefixes.

    Returns (rows, hidden), zeros for rows that are idle.
    """
    rows, (_, _, heads, steps, head_size) = len(qkv), own.shape
    q, k, v = qkv.view(rows, 3, heads, head_size).unbind(1)
    slot, at = step.slot[:rows], step.at[:rows]
    for stored, new in zip(own, (k, v), strict=True):
        stored[slot, :, at] = new  # an idle row is at -1, the last step
    prefix = step.prefix[:rows]
    keys, values = (torch.cat([prefixes[i][prefix], own[i][slot]], dim=2) for i in (0, 1))
    of_prefix = torch.arange(prefixes.shape[3], device=qkv.device) < step.prefix_length[:rows, None]
    of_own = torch.arange(steps, device=qkv.device) <= at[:, None]
    mask = torch.cat([of_prefix, of_own], dim=1)[:, None, None]
    for each in (keys, values):  # NaN that another row has left there is NaN at any weight
        each.masked_fill_(~mask.mT, 0)
    out = scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask)[:, :, 0]
    return torch.where((at >= 0)[:, None], out.flatten(1), 0)


def pick(logits: torch.Tensor, step: Step) -> None:
    """Pick the tokens of each variation, as `sampling.Sampler` does, and store them as the next inputs.

    `logits`: float32 (rows, codebooks, vocabulary), of the first rows of the step.
    """
    rows = len(logits)
    conditional, unconditional = (
        logits[chosen[:rows]].double() for chosen in (step.conditional, step.unconditional)
    )
    guidance, temperature, top_k, top_p = (
        values[:rows, None, None] for values in (step.guidance, step.temperature, step.top_k, step.top_p)
    )
    mixed = unconditional + (conditional - unconditional) * guidance
    is_random = temperature > 0
    scaled = mixed / torch.where(is_random, temperature, 1)
    is_finite = scaled.isfinite().flatten(1).all(dim=1)[:, None]
    scaled = scaled - scaled.amax(dim=-1, keepdim=True)
    keep = torch.where(top_p > 0, _nucleus(scaled, top_p), _largest(scaled, top_k))
    noise = gumbel(step.seed[:rows], step.first_noise[:rows] + step.number, *logits.shape[1:])
    score = scaled.masked_fill(~keep, -torch.inf) + torch.where(is_random, noise, 0)
    picked = torch.where(is_finite, score.argmax(dim=-1), NOT_FINITE)
    step.picked[:, :rows].index_copy_(0, step.number, picked[None])
    inputs = step.inputs[:rows]
    following = inputs.index_select(1, step.number + 1)
    chosen = picked.clamp(min=0)[step.variation[:rows], None]
    inputs.index_copy_(1, step.number + 1, torch.where(following == UNKNOWN, chosen, following))


def _largest(scaled: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """True for the `top_k` largest of each row, and what equals the last of them; 0: for all."""
    vocabulary = scaled.shape[-1]
    at = (top_k - 1).clamp(0, vocabulary - 1).expand(*scaled.shape[:-1], 1)
    least = scaled.sort(dim=-1, descending=True).values.gather(-1, at)
    return (scaled >= least) | (top_k == 0) | (top_k >= vocabulary)


def _nucleus(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """True for the likeliest tokens up to the one at which their sum reaches `top_p`; ties by index."""
    probabilities = scaled.softmax(dim=-1)
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1) - ranked
    return torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, order, before < top_p)


def gumbel(seeds: torch.Tensor, steps: torch.Tensor, codebooks: int, vocabulary: int) -> torch.Tensor:
    """`sampling.gumbel` of several variations: seeds and steps int64 (n,).

    Returns float64 (n, codebooks, vocabulary).
    """
    device = seeds.device
    block = torch.arange(1, vocabulary // 4 + 1, device=device)  # numpy counts before it draws
    book = torch.arange(codebooks, device=device)[:, None]
    counter = [block.expand(len(seeds), codebooks, -1), book, steps[:, None, None], torch.zeros_like(block)]
    key = [seeds[:, None, None], torch.zeros_like(seeds)[:, None, None]]
    for _ in range(ROUNDS):
        products = [_product(counter[i], m) for i, m in zip((0, 2), MULTIPLIERS, strict=True)]
        (high_0, low_0), (high_2, low_2) = products
        counter = [high_2 ^ counter[1] ^ key[0], low_2, high_0 ^ counter[3] ^ key[1], low_0]
        key = [part + signed(added) for part, added in zip(key, KEY_STEPS, strict=True)]
    words = torch.stack(torch.broadcast_tensors(*counter), dim=-1).flatten(-2)  # type: ignore[no-untyped-call]
    uniform = (((words >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the product of unsigned words of 64 bits, in words of 32 bits."""
    a_high, a_low, b_high, b_low = (a >> 32) & _LOW, a & _LOW, b >> 32, b & _LOW
    low, cross, other = a_low * b_low, a_low * b_high, a_high * b_low
    middle = ((low >> 32) & _LOW) + (cross & _LOW) + (other & _LOW)
    carried = ((cross >> 32) & _LOW) + ((other >> 32) & _LOW) + (middle >> 32)
    return a_high * b_high + carried, a * signed(b)


def signed(word: int) -> int:
    """The word of 64 bits as a signed number."""
    return word - (1 << 64) if word >> 63 else word
