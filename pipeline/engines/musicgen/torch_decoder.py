"""The decoder in torch, on any device: what a GPU uses, in half precision.

A step runs entirely on the device, from the embedding to the picked tokens, which are the next step's
inputs. On CUDA it is captured once per KV cache as a graph, which is replayed for several steps
between two returns to the host, so that the device does not wait for Python.

A step runs with the least of a few numbers of rows that is enough, of which some may be idle, and with
kernels (`triton_ops`) that round a row's numbers in the same way in any batch: so a request gets the
same tokens in any company on one kind of device. Without Triton every step has the largest number
of rows, so that the library computes its products by the same functions. Prefixes are run in
batches of one size for the same reason.

x is kept in float32 from layer to layer; the products' inputs are in the decoder's precision.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from pipeline.engines.musicgen import memory_budget, torch_ops
from pipeline.engines.musicgen.decoder import (
    Continuation,
    EmbeddingAndHead,
    Shape,
    StepInput,
    Tokens,
)
from pipeline.engines.musicgen.layers import NORMS, LayerFiles
from pipeline.engines.musicgen.torch_cache import MOST_STEPS, Step, TorchKVCache
from pipeline.engines.pretrained import first_line
from pipeline.errors import EngineFailure
from pipeline.records import Samples

log = logging.getLogger("pipeline")

MOST_ROWS = 64  # 32 variations with guidance
RETURN_S = 0.15  # how long steps are run before the host looks for a stop
LENGTH_UNIT = 64  # prefixes are padded to multiples of so many steps

Attend = Callable[[int, torch.Tensor], torch.Tensor]


class TorchDecoder:
    """The layers as tensors on a device."""

    prefixes_at_once = 4

    def __init__(
        self,
        files: LayerFiles,
        ends: EmbeddingAndHead,
        device: str,
        precision: str,
        most_rows: int = MOST_ROWS,
    ) -> None:
        """`precision`: the name of a torch type, "float16", "bfloat16" or "float32".

        Raises:
            BadCheckpoint: as `LayerFiles.layers`.
        """
        self.most_rows = most_rows
        self.shape: Shape = files.shape
        self.precision, self.device = precision, torch.device(device)
        self.dtype: torch.dtype = getattr(torch, precision)
        self.ops: Any = ops_for(self.device, self.shape)
        self.row_counts = (most_rows,) if self.ops is torch_ops else (2, 16, most_rows)
        self.layers = [
            {
                name: self._tensor(value, torch.float32 if name in NORMS else self.dtype)
                for name, value in layer.items()
            }
            for layer in files.layers()
        ]
        self.heads = self._tensor(ends.heads, self.dtype)
        self.norm, self.positions = self._tensor(ends.norm), self._tensor(ends.positions)
        books, tokens, hidden = ends.embeddings.shape
        self.embeddings = self._tensor(ends.embeddings.reshape(books * tokens, hidden))
        self._first_tokens = torch.arange(books, device=self.device) * tokens
        self._step_s = RETURN_S / 8  # as measured last

    @property
    def steps_at_once(self) -> int:
        """See `Decoder.steps_at_once`."""
        return max(1, min(MOST_STEPS, int(RETURN_S / self._step_s)))

    def new_cache(self, rows: int, steps: int, prefixes: int, prefix_steps: int) -> TorchKVCache:
        """See `Decoder.new_cache`; it is in the device's memory, with `most_rows` rows at most."""
        step = Step.idle(self.most_rows, self.shape.codebooks, self.device)
        return TorchKVCache(self.shape, (rows, steps, prefixes, prefix_steps), step, self.dtype)

    def cache_bytes(self, steps: int) -> int:
        return 2 * self.shape.layers * self.shape.hidden * self.dtype.itemsize * steps

    def prefill(self, cache: TorchKVCache, prefixes: Mapping[int, Samples]) -> None:
        by_length: dict[int, list[int]] = {}
        for slot, inputs in prefixes.items():
            by_length.setdefault(-(-len(inputs) // LENGTH_UNIT) * LENGTH_UNIT, []).append(slot)
        for length, slots in by_length.items():
            for start in range(0, len(slots), self.prefixes_at_once):
                part = {slot: prefixes[slot] for slot in slots[start : start + self.prefixes_at_once]}
                self._prefill(cache, part, length)

    def advance(self, cache: TorchKVCache, step_inputs: Sequence[StepInput]) -> Samples:
        """See `Decoder.advance`."""
        cache.step.load_rows(step_inputs, cache.prefix_lengths)
        with torch.inference_mode():
            logits: Samples = self._logits(cache, self._row_count(len(step_inputs))).cpu().numpy()
        return logits[: len(step_inputs)]

    def generate(
        self, cache: TorchKVCache, continuations: Sequence[Continuation]
    ) -> list[Tokens | EngineFailure]:
        """See `Decoder.generate`: as many steps as the inputs of each have, all on the device."""
        steps, began_s = min(len(one.inputs) for one in continuations), time.perf_counter()
        inputs = [row for one in continuations for row in one.of_rows(steps)]
        rows = self._row_count(len(inputs))
        if self.device.type == "cuda" and rows not in cache.graphs:
            cache.graphs[rows] = self._capture(cache, rows)
        cache.step.load_rows(inputs, cache.prefix_lengths)
        cache.step.load_variations(continuations)
        with torch.inference_mode():
            for _ in range(steps):
                if cache.graphs:
                    cache.graphs[rows].replay()
                else:
                    self._step(cache, rows)
            picked = cache.step.picked[:steps, : len(continuations)].cpu().numpy()
        self._step_s = (time.perf_counter() - began_s) / steps
        return [
            tokens
            if (tokens != torch_ops.NOT_FINITE).all()
            else EngineFailure("musicgen computed NaN or infinity instead of probabilities.")
            for tokens in picked.swapaxes(0, 1)
        ]

    def _row_count(self, rows: int) -> int:
        """The number of rows that a step of so many has."""
        return next(count for count in self.row_counts if count >= rows)

    def _capture(self, cache: TorchKVCache, rows: int) -> Any:
        """A graph of a step. All rows are idle meanwhile."""
        cache.step.load_rows([], cache.prefix_lengths)
        with torch.inference_mode():
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):  # what is compiled or chosen at first use
                self._step(cache, rows)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step(cache, rows)
        return graph

    def _step(self, cache: TorchKVCache, rows: int) -> None:
        """Step `number` of the first rows, and the tokens after it."""
        self.ops.pick(self._logits(cache, rows), cache.step)
        cache.step.number += 1

    def _logits(self, cache: TorchKVCache, rows: int) -> torch.Tensor:
        """The logits after step `number` of the first rows: float32 (rows, codebooks, vocabulary)."""
        step = cache.step
        step.at.copy_(torch.where(step.position >= 0, step.position + step.number, -1))
        tokens = step.inputs[:rows].index_select(1, step.number)[:, 0] + self._first_tokens
        positions = step.prefix_length[:rows] + step.at[:rows].clamp(min=0)
        x = self.embeddings[tokens].sum(dim=1) + self.positions[positions]

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.ops.attend(qkv, cache.rows[layer], cache.prefixes[layer], step)
            return out

        normal = self.ops.add_norm(x, self._layers(x, attend, self.ops), self.norm, self.dtype)
        logits: torch.Tensor = self.ops.product_float32(normal, self.heads)
        return logits.view(rows, self.shape.codebooks, self.shape.vocabulary)

    def _prefill(self, cache: TorchKVCache, prefixes: Mapping[int, Samples], length: int) -> None:
        """Run prefixes, padded to `length` and to the number that is run at once."""
        n, heads, head_size = self.prefixes_at_once, self.shape.heads, self.shape.head_size
        inputs = np.zeros((n, length, self.shape.hidden), np.float32)
        for index, prefix in enumerate(prefixes.values()):
            inputs[index, : len(prefix)] = prefix

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = qkv.view(n, length, 3, heads, head_size).permute(2, 0, 3, 1, 4)
            for index, (slot, prefix) in enumerate(prefixes.items()):
                for stored, new in zip(cache.prefixes[layer], (k, v), strict=True):
                    stored[slot, :, : len(prefix)] = new[index, :, : len(prefix)]
            out = scaled_dot_product_attention(q, k, v, is_causal=True)
            return out.transpose(1, 2).reshape(n * length, self.shape.hidden)

        with torch.inference_mode():
            x = self._tensor(inputs) + self.positions[:length]
            self._layers(x.view(n * length, self.shape.hidden), attend, torch_ops)
        for slot, prefix in prefixes.items():
            cache.prefix_lengths[slot] = len(prefix)

    def _layers(self, x: torch.Tensor, attend: Attend, ops: Any) -> torch.Tensor | None:
        """All layers over x, float32 (n, hidden), in place; returns what the last of them adds to x."""
        added: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            normal = ops.add_norm(x, added, layer["attention_norm"], self.dtype)
            attended = attend(index, ops.product(normal, layer["qkv"]))
            normal = ops.add_norm(
                x, ops.product_in_parts(attended, layer["out"]), layer["feed_forward_norm"], self.dtype
            )
            added = ops.product_in_parts(ops.product(normal, layer["up"], with_gelu=True), layer["down"])
        return added

    def _tensor(self, values: Samples, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, dtype)


def ops_for(device: torch.device, shape: Shape) -> Any:
    """The faster of the modules with a step's parts that works here."""
    if not kernels_fit(device, shape):
        return torch_ops
    try:
        from pipeline.engines.musicgen import triton_ops

        ones = torch.ones((2, 16), device=device)
        triton_ops.add_norm(ones, None, ones, torch.float32)
    except Exception as error:  # no Triton (it comes with torch for Linux), or no C compiler for it
        if memory_budget.is_exhausted(error):
            raise
        log.warning("musicgen: Triton can't be used (%s): steps take longer without it", first_line(error))
        return torch_ops
    return triton_ops


def kernels_fit(device: torch.device, shape: Shape) -> bool:
    """Whether `triton_ops` is for such a device and model.

    The kernels need heads and a vocabulary of a power of two, as all published checkpoints have them. They
    were written for NVIDIA's GPUs: on AMD's, which torch calls "cuda" too, their launch options don't exist.
    """
    has_powers_of_two = not any(size & (size - 1) for size in (shape.head_size, shape.vocabulary))
    return device.type == "cuda" and not torch.version.hip and has_powers_of_two
