"""The decoder in torch's own operations, on any device: what a GPU uses, in half precision.

All steps run with the same number of rows, `ROWS`, unused ones as padding, so that the library
takes the same way through its products whatever the batch; on a GPU the padding is nearly free.
Attention rounds by the number of positions, so each row attends by itself, over its own alone.
Still a row's place among them can change the last bit, and rarely a token: the promise of equal
bits in any batch is that of `cpu`, not of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.engines.musicgen.decoder import NAMELESS, Ends, Feed, Shape, Tokens
from pipeline.engines.musicgen.layers import LayerFiles
from pipeline.engines.musicgen.shm import Files
from pipeline.records import Samples

if TYPE_CHECKING:
    import torch

ROWS = 32  # of every step


class TorchDecoder:
    """The layers as tensors on a device."""

    def __init__(self, files: LayerFiles, ends: Ends, device: str, precision: str) -> None:
        """`precision`: the name of a torch type, "float16", "bfloat16" or "float32".

        Raises:
            BadCheckpoint: as `LayerFiles.layers`.
        """
        import torch

        self.shape: Shape = files.shape
        self.precision, self.device = precision, torch.device(device)
        self.kind: torch.dtype = getattr(torch, precision)
        self.ends = ends
        self.layers = [
            {name: self.tensor(value) for name, value in layer.items()} for layer in files.layers()
        ]
        self.heads, self.norm = self.tensor(ends.heads), self.tensor(ends.norm)

    def tensor(self, values: Samples) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, self.kind)

    def memory(
        self, rows: int, steps: int, prefixes: int, prefix_steps: int, files: Files | None = None
    ) -> TorchMemory:
        """See `Decoder.memory`; it is in the device's memory, whatever `files` are."""
        return TorchMemory(self, rows, steps, prefixes, prefix_steps)

    def bytes_of(self, steps: int) -> int:
        return 2 * self.shape.layers * self.shape.hidden * self.kind.itemsize * steps

    def run(self, x: torch.Tensor, attend: Any) -> torch.Tensor:
        """All layers over x (rows, steps, hidden); `attend(layer, q, k, v)` keeps k and v and attends."""
        from torch.nn.functional import gelu, layer_norm, linear

        rows, steps, hidden = x.shape
        for index, layer in enumerate(self.layers):
            normal = layer_norm(x, (hidden,), *layer["attention_norm"])
            qkv = linear(normal, layer["qkv"]).reshape(rows, steps, 3, self.shape.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (rows, heads, steps, dim) each
            attended = attend(index, q, k, v).transpose(1, 2).reshape(rows, steps, hidden)
            x = x + linear(attended, layer["out"])
            normal = layer_norm(x, (hidden,), *layer["feed_forward_norm"])
            x = x + linear(gelu(linear(normal, layer["up"])), layer["down"])
        return x

    def logits(self, x: torch.Tensor) -> Samples:
        """(rows, hidden) to float32 (rows, codebooks, vocabulary)."""
        from torch.nn.functional import layer_norm, linear

        out = linear(layer_norm(x, (self.shape.hidden,), *self.norm), self.heads)
        result: Samples = out.float().cpu().numpy()
        return result.reshape(len(x), self.shape.codebooks, self.shape.vocabulary)


class TorchMemory:
    """See `Memory`."""

    def __init__(
        self, decoder: TorchDecoder, rows: int, steps: int, prefixes: int, prefix_steps: int
    ) -> None:
        import torch

        shape = decoder.shape

        def room(slots: int, length: int) -> torch.Tensor:
            size = (shape.layers, 2, slots, shape.heads, length, shape.hidden // shape.heads)
            return torch.zeros(size, dtype=decoder.kind, device=decoder.device)

        self.decoder = decoder
        self.n_rows = rows
        self.places: Sequence[int] = range(prefixes)
        self.rows = room(rows + 1, steps)  # the last is the padding's
        self.prefixes = room(prefixes, prefix_steps)
        self.lengths = np.zeros(prefixes, np.int64)

    def held_prefixes(self) -> dict[bytes, int]:
        return {}

    def choose_rows(self, known: Sequence[tuple[bytes, Tokens]]) -> list[int]:
        return list(range(self.n_rows))

    def take_row(self, key: bytes, tokens: Tokens, free: Sequence[int]) -> tuple[int, int]:
        """All rows are there, and none holds anything."""
        return free[-1], 0

    def leave_row(self, slot: int) -> None:
        """It holds nothing for anybody."""

    def prefill(self, prefix: int, inputs: Samples, key: bytes = NAMELESS) -> None:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as attention

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.prefixes[layer, 0, prefix, :, : len(inputs)] = k[0]
            self.prefixes[layer, 1, prefix, :, : len(inputs)] = v[0]
            return attention(q, k, v, is_causal=True)

        positions = np.arange(len(inputs), dtype=np.int64)
        x = inputs + self.decoder.ends.positions[positions]
        with torch.inference_mode():
            self.decoder.run(self.decoder.tensor(x)[None], attend)
        self.lengths[prefix] = len(inputs)

    def advance(self, feeds: Sequence[Feed]) -> Samples:
        """Feeds of several steps go one by one, so that each step is rounded as it was at first."""
        import torch

        last: list[Samples] = [np.empty(0, np.float32)] * len(feeds)
        with torch.inference_mode():
            for step in range(max(len(feed.tokens) for feed in feeds)):
                going = [index for index, feed in enumerate(feeds) if step < len(feed.tokens)]
                for part in _parts(going):
                    for index, logits in zip(part, self._step([feeds[i] for i in part], step), strict=False):
                        last[index] = logits
        return np.stack(last)

    def release(self, slot: int) -> None:
        """All rows are in one tensor."""

    def _step(self, feeds: Sequence[Feed], step: int) -> Samples:
        """One step of up to `ROWS` feeds."""
        import torch

        n, padding = len(feeds), ROWS - len(feeds)
        slots = np.array([feed.slot for feed in feeds] + [self.rows.shape[2] - 1] * padding)
        positions = np.array([feed.position + step for feed in feeds] + [0] * padding)
        lengths = self.lengths[[feed.prefix for feed in feeds]]
        tokens = np.zeros((ROWS, self.decoder.shape.codebooks), np.int64)
        tokens[:n] = [feed.tokens[step] for feed in feeds]
        ends = self.decoder.ends
        before = np.concatenate([lengths, np.zeros(padding, np.int64)])
        x = self.decoder.tensor(ends.embedded(tokens) + ends.positions[before + positions])[:, None]
        where, at = (torch.from_numpy(array).to(self.decoder.device) for array in (slots, positions))
        seen = [
            _Seen(feed.slot, feed.position + step + 1, feed.prefix, int(length))
            for feed, length in zip(feeds, lengths, strict=True)
        ]
        out = self.decoder.run(x, self._attend(where, at, seen))
        return self.decoder.logits(out[:, 0])[:n]

    def _attend(self, where: torch.Tensor, at: torch.Tensor, seen: Sequence[_Seen]) -> Any:
        """Attention of one step: each row over its prefix and its own steps up to this one."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention as attention

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own, before = self.rows[layer], self.prefixes[layer]
            own[0][where, :, at] = k[:, :, 0]
            own[1][where, :, at] = v[:, :, 0]
            out = torch.zeros_like(q)
            for row, its in enumerate(seen):
                both = torch.cat(
                    [before[:, its.prefix, :, : its.prefix_steps], own[:, its.slot, :, : its.steps]], dim=2
                )
                out[row] = attention(q[row, None], both[0, None], both[1, None])[0]
            return out

        return attend


@dataclass(frozen=True)
class _Seen:
    """What a row attends to."""

    slot: int
    steps: int  # of its own
    prefix: int
    prefix_steps: int


def _parts(indices: list[int]) -> Iterator[list[int]]:
    return (indices[start : start + ROWS] for start in range(0, len(indices), ROWS))
