"""The decoder in torch's own operations, on any device: what a GPU uses, in half precision.

Every step runs with the same number of rows, `ROWS`, padded where there are fewer, so that the
library computes its products in the same way whatever the batch. On a GPU the padding is nearly
free. Attention rounds according to the number of positions, so each row attends by itself, over its
own positions only. Still, the place of a row in the batch can change the last bit and, rarely, a
token: equal bits in any batch are promised by `cpu_decoder`, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.engines.musicgen.decoder import EmbeddingAndHead, Shape, StepInput
from pipeline.engines.musicgen.layers import LayerFiles
from pipeline.records import Samples

if TYPE_CHECKING:
    import torch

ROWS = 32  # of every step


class TorchKVCache:
    """One tensor for rows, one for prefixes: (layers, 2, slots, heads, steps, head size)."""

    def __init__(
        self, decoder: TorchDecoder, rows: int, steps: int, prefixes: int, prefix_steps: int
    ) -> None:
        self.rows = self._zeros(decoder, rows + 1, steps)  # the last row is for the padding
        self.prefixes = self._zeros(decoder, prefixes, prefix_steps)
        self.prefix_lengths = np.zeros(prefixes, np.int64)

    @staticmethod
    def _zeros(decoder: TorchDecoder, slots: int, steps: int) -> torch.Tensor:
        import torch

        shape = decoder.shape
        size = (shape.layers, 2, slots, shape.heads, steps, shape.head_size)
        return torch.zeros(size, dtype=decoder.dtype, device=decoder.device)


class TorchDecoder:
    """The layers as tensors on a device."""

    def __init__(self, files: LayerFiles, ends: EmbeddingAndHead, device: str, precision: str) -> None:
        """`precision`: the name of a torch type, "float16", "bfloat16" or "float32".

        Raises:
            BadCheckpoint: as `LayerFiles.layers`.
        """
        import torch

        self.shape: Shape = files.shape
        self.precision, self.device = precision, torch.device(device)
        self.dtype: torch.dtype = getattr(torch, precision)
        self.ends = ends
        self.layers = [
            {name: self._tensor(value) for name, value in layer.items()} for layer in files.layers()
        ]
        self.heads, self.norm = self._tensor(ends.heads), self._tensor(ends.norm)

    def new_cache(self, rows: int, steps: int, prefixes: int, prefix_steps: int) -> TorchKVCache:
        """See `Decoder.new_cache`; it is in the device's memory."""
        return TorchKVCache(self, rows, steps, prefixes, prefix_steps)

    def cache_bytes(self, steps: int) -> int:
        return 2 * self.shape.layers * self.shape.hidden * self.dtype.itemsize * steps

    def prefill(self, cache: TorchKVCache, prefix: int, inputs: Samples) -> None:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as attention

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.prefixes[layer, 0, prefix, :, : len(inputs)] = k[0]
            cache.prefixes[layer, 1, prefix, :, : len(inputs)] = v[0]
            return attention(q, k, v, is_causal=True)

        x = inputs + self.ends.positions[: len(inputs)]
        with torch.inference_mode():
            self._run(self._tensor(x)[None], attend)
        cache.prefix_lengths[prefix] = len(inputs)

    def advance(self, cache: TorchKVCache, step_inputs: Sequence[StepInput]) -> Samples:
        """See `Decoder.advance`. Several steps are run one by one, so that each rounds as it did at first."""
        import torch

        last: list[Samples] = [np.empty(0, np.float32)] * len(step_inputs)
        with torch.inference_mode():
            for step in range(max(len(one.tokens) for one in step_inputs)):
                going = [index for index, one in enumerate(step_inputs) if step < len(one.tokens)]
                for start in range(0, len(going), ROWS):
                    part = going[start : start + ROWS]
                    logits = self._step(cache, [step_inputs[index] for index in part], step)
                    for index, row in zip(part, logits, strict=True):
                        last[index] = row
        return np.stack(last)

    def _step(self, cache: TorchKVCache, step_inputs: Sequence[StepInput], step: int) -> Samples:
        """One step of up to `ROWS` rows."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention as attention

        n, padding = len(step_inputs), ROWS - len(step_inputs)
        slots = np.array([one.slot for one in step_inputs] + [cache.rows.shape[2] - 1] * padding)
        positions = np.array([one.position + step for one in step_inputs] + [0] * padding)
        lengths = [int(cache.prefix_lengths[one.prefix]) for one in step_inputs]
        tokens = np.zeros((ROWS, self.shape.codebooks), np.int64)
        tokens[:n] = [one.tokens[step] for one in step_inputs]
        before = np.array(lengths + [0] * padding)
        x = self._tensor(self.ends.embed(tokens) + self.ends.positions[before + positions])[:, None]
        slot_indices, step_indices = (torch.from_numpy(array).to(self.device) for array in (slots, positions))

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            """Each row attends to its prefix and to its own steps up to this one."""
            own, prefixes = cache.rows[layer], cache.prefixes[layer]
            own[0][slot_indices, :, step_indices] = k[:, :, 0]
            own[1][slot_indices, :, step_indices] = v[:, :, 0]
            out = torch.zeros_like(q)
            for row, (one, length) in enumerate(zip(step_inputs, lengths, strict=True)):
                prefix = prefixes[:, one.prefix, :, :length]
                steps = own[:, one.slot, :, : one.position + step + 1]
                keys, values = torch.cat([prefix, steps], dim=2)
                out[row] = attention(q[row, None], keys[None], values[None])[0]
            return out

        return self._logits(self._run(x, attend)[:, 0])[:n]

    def _run(self, x: torch.Tensor, attend: Any) -> torch.Tensor:
        """All layers over x (rows, steps, hidden); `attend(layer, q, k, v)` stores k and v and attends."""
        from torch.nn.functional import gelu, layer_norm, linear

        rows, steps, hidden = x.shape
        for index, layer in enumerate(self.layers):
            normal = layer_norm(x, (hidden,), *layer["attention_norm"])
            qkv = linear(normal, layer["qkv"]).reshape(rows, steps, 3, self.shape.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (rows, heads, steps, head size) each
            attended = attend(index, q, k, v).transpose(1, 2).reshape(rows, steps, hidden)
            x = x + linear(attended, layer["out"])
            normal = layer_norm(x, (hidden,), *layer["feed_forward_norm"])
            x = x + linear(gelu(linear(normal, layer["up"])), layer["down"])
        return x

    def _logits(self, x: torch.Tensor) -> Samples:
        """(rows, hidden) to float32 (rows, codebooks, vocabulary)."""
        from torch.nn.functional import layer_norm, linear

        out = linear(layer_norm(x, (self.shape.hidden,), *self.norm), self.heads)
        result: Samples = out.float().cpu().numpy()
        return result.reshape(len(x), self.shape.codebooks, self.shape.vocabulary)

    def _tensor(self, values: Samples) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, self.dtype)
