"""MusicGen's decoder in plain torch, as a good engineer writes it in a day: the peer to be compared with.

Keys and values are allocated once. The two prefixes of a track, with and without its condition, are run
once and shared by the rows of all variations. Attention is torch's own for the CPU. A row's prefix and its
own positions are attended to separately, and the two results are weighed by the sums of their
exponentials, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135). Linear layers are in float32, or in
int8 by FBGEMM's dynamic quantization: weights with a scale per output, activations with one range per
product. torchao, to which torch refers instead, needs a compiler and takes two to three times as long.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import peer_transformers
from child import forget_peak
from peer_loop import measure
from steps import OWN_STEPS, TIMED_STEPS, PeerRun

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "int8"]


def run(
    precision: Precision,
    variations: int,
    folder: Path,
    own_steps: Sequence[int] = OWN_STEPS,
    timed: int = TIMED_STEPS,
) -> PeerRun:
    """Time prefill and steps for the variations of one track, in this process."""
    import torch

    began_s = time.perf_counter()
    model = peer_transformers.load(folder)
    with torch.inference_mode():
        prefixes = peer_transformers.prefixes(model, peer_transformers.inputs(folder, 1))
        decoder = PlainDecoder(model.decoder, precision)
        del model
        forget_peak()
        load_s = time.perf_counter() - began_s
        return measure(
            f"torch, {precision}",
            decoder,
            prefixes,
            variations,
            own_steps=own_steps,
            timed=timed,
            load_s=load_s,
        )


class PlainDecoder:
    """The decoder of a checkpoint, with keys and values for the variations of one track."""

    def __init__(self, decoder: Any, precision: Precision) -> None:
        """`decoder`: transformers.MusicgenMelodyForCausalLM in float32, of which nothing is kept."""
        import torch
        from torch.nn.functional import linear

        inner, config = copy.deepcopy(decoder.model.decoder), decoder.config  # the library's are mapped files
        product = int8_linear if precision == "int8" else lambda weight: partial(linear, weight=weight)
        self.position_bytes = 2 * len(inner.layers) * config.hidden_size * 4
        self.n_heads, self.codebooks = config.num_attention_heads, config.num_codebooks
        self.embeddings = torch.cat([embedding.weight for embedding in inner.embed_tokens])
        self.first = torch.arange(self.codebooks) * (config.vocab_size + 1)  # rows of each codebook
        self.positions = inner.embed_positions.get_embedding(4096, config.hidden_size)
        self.layers = [
            (
                layer.self_attn_layer_norm,
                product(torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"])),
                product(layer.self_attn.out_proj.weight),
                layer.final_layer_norm,
                product(layer.fc1.weight),
                product(layer.fc2.weight),
            )
            for layer in inner.layers
        ]
        self.norm = inner.layer_norm
        self.heads = product(torch.cat([head.weight for head in decoder.lm_heads]))

    def prefill(self, prefixes: torch.Tensor, variations: int, steps: int) -> None:
        """See `PeerDecoder`."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        self.variations, self.own, self.prefix = variations, 0, prefixes.shape[1]
        self.in_rows = (
            self.prefix if variations == 1 else 0
        )  # a single variation shares its prefixes with none
        size = prefixes.shape[2] // self.n_heads
        shared = (len(self.layers), 2, 2, self.n_heads, self.prefix, size)
        own = (len(self.layers), 2, 2 * variations, self.n_heads, self.in_rows + steps, size)
        self.shared, self.cache = torch.zeros(shared), torch.zeros(own)  # keys and values of each layer

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.shared[layer] = torch.stack([k, v])
            return scaled_dot_product_attention(q, k, v, is_causal=True)

        self._run(prefixes + self.positions[: self.prefix], attend)
        if self.in_rows:
            self.cache[..., : self.prefix, :] = self.shared

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `PeerDecoder`."""
        x = self.embeddings[tokens + self.first].sum(1) + self.positions[self.prefix + self.own]
        x = self._run(x[:, None], self._attend)
        self.own += 1
        return self.heads(self.norm(x[:, 0])).unflatten(-1, (self.codebooks, -1))

    def move(self, own: int) -> None:
        """See `PeerDecoder`."""
        import torch

        self.cache[:] = torch.rand(self.cache.shape[1:])
        self.own = own

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store keys and values (rows, heads, 1, head) and attend to the prefix and all own positions."""
        import torch

        # What scaled_dot_product_attention calls; only here it returns the logarithm of the sums as well.
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        position = self.in_rows + self.own
        keys, values = self.cache[layer][..., : position + 1, :]
        keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
        own, own_sums = attention(q, keys, values)
        if self.in_rows:
            return own  # type: ignore[no-any-return]
        by_prefix = q.reshape(2, self.variations, self.n_heads, -1).transpose(1, 2)
        shared, shared_sums = attention(by_prefix, *self.shared[layer])
        shared = shared.transpose(1, 2).reshape(q.shape)
        shared_sums = shared_sums.transpose(1, 2).reshape(own_sums.shape)
        return torch.lerp(own, shared, torch.sigmoid(shared_sums - own_sums)[..., None])

    def _run(self, x: torch.Tensor, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        """x (rows, positions, hidden) through all layers; `attend(layer, q, k, v)` attends."""
        from torch.nn.functional import gelu

        for index, (attention_norm, qkv, out, norm, up, down) in enumerate(self.layers):
            q, k, v = qkv(attention_norm(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + out(attend(index, q, k, v).transpose(1, 2).flatten(2))
            x = x + down(gelu(up(norm(x))))
        return x


def int8_linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A product with weights (outputs, inputs) that are quantized here."""
    import torch

    torch.backends.quantized.engine = "fbgemm"
    scales = weight.abs().amax(1).double() / 127
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated")
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)  # type: ignore[no-any-return]
