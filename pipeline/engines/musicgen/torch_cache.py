"""What a step on a device reads and writes: the KV cache, and the inputs and outputs of its rows.

Everything is allocated once, so that a captured graph finds it at the same addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.engines.musicgen.decoder import Continuation, Shape, StepInput

MOST_STEPS = 64  # between two returns to the host


@dataclass(eq=False)
class Step:
    """The rows and variations of a step. All are tensors of the device; integers are int64."""

    number: torch.Tensor  # (1,), of the step since the last return to the host
    slot: torch.Tensor  # (rows,), of each row in the KV cache
    position: torch.Tensor  # (rows,), own steps before step number 0; -1: an idle row
    at: torch.Tensor  # (rows,), own steps before this one; -1: an idle row
    prefix: torch.Tensor  # (rows,), slot of each row's prefix
    prefix_length: torch.Tensor  # (rows,)
    inputs: torch.Tensor  # (rows, MOST_STEPS + 1, codebooks), UNKNOWN what is to be picked
    variation: torch.Tensor  # (rows,), to which of the variations each row belongs
    n_variations: torch.Tensor  # (1,)
    conditional: torch.Tensor  # (rows,), row of each variation, of which there are as many as rows at most
    unconditional: torch.Tensor  # (rows,), the same without guidance
    guidance: torch.Tensor  # (rows,) float64, as the next: of each variation
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor
    first_noise: torch.Tensor  # number of step 0 in the noise
    picked: torch.Tensor  # (MOST_STEPS, rows, codebooks), of each variation

    @classmethod
    def idle(cls, rows: int, codebooks: int, device: torch.device) -> Step:
        """No row does anything."""
        numbers = {
            name: torch.zeros(rows, dtype=torch.int64, device=device) for name in (*_OF_ROWS, *_OF_VARIATIONS)
        }
        for name in _FLOATS:
            numbers[name] = torch.ones(rows, dtype=torch.float64, device=device)
        number, n_variations = torch.zeros(2, 1, dtype=torch.int64, device=device)
        step = cls(
            number=number,
            n_variations=n_variations,
            inputs=torch.zeros((rows, MOST_STEPS + 1, codebooks), dtype=torch.int64, device=device),
            picked=torch.zeros((MOST_STEPS, rows, codebooks), dtype=torch.int64, device=device),
            **numbers,
        )
        step.position.fill_(-1)
        return step

    def load_rows(self, step_inputs: Sequence[StepInput], prefix_lengths: np.ndarray[Any, Any]) -> None:
        """Set the inputs of the next steps of the first rows; all others are idle."""
        n = len(step_inputs)
        values = {name: np.zeros(len(self.slot), np.int64) for name in ("slot", "prefix")}
        position, inputs = np.full(len(self.slot), -1), np.zeros(self.inputs.shape, np.int64)
        values["slot"][:n] = [one.slot for one in step_inputs]
        values["prefix"][:n] = [one.prefix for one in step_inputs]
        position[:n] = [one.position for one in step_inputs]
        for row, one in enumerate(step_inputs):
            inputs[row, : len(one.tokens)] = one.tokens
        lengths = prefix_lengths[values["prefix"]]
        self._put(position=position, prefix_length=lengths, inputs=inputs, **values)
        self.number.zero_()
        self.n_variations.zero_()

    def load_variations(self, continuations: Sequence[Continuation]) -> None:
        """Set how the tokens of variations are picked, whose rows follow one another."""
        rows = len(self.slot)
        values: dict[str, np.ndarray[Any, Any]] = {
            name: np.full(rows, 1.0 if name in _FLOATS else 0) for name in ("variation", *_OF_VARIATIONS)
        }
        row = 0
        for index, one in enumerate(continuations):
            params, last = one.sampler.params, row + len(one.slots) - 1
            values["variation"][row : last + 1] = index
            of_one = {
                "conditional": row,
                "unconditional": last,
                "seed": one.sampler.seed,
                "first_noise": one.first_step,
                "top_k": params.top_k,
                "guidance": params.guidance,
                "temperature": params.temperature,
                "top_p": params.top_p,
            }
            for name, value in of_one.items():
                values[name][index] = value
            row = last + 1
        self._put(n_variations=np.array([len(continuations)]), **values)

    def _put(self, **arrays: np.ndarray[Any, Any]) -> None:
        for name, array in arrays.items():
            getattr(self, name).copy_(torch.from_numpy(array))


_OF_ROWS = ("slot", "position", "at", "prefix", "prefix_length", "variation")
_FLOATS = ("guidance", "temperature", "top_p")
_OF_VARIATIONS = ("conditional", "unconditional", "seed", "first_noise", "top_k", *_FLOATS)


class TorchKVCache:
    """Keys and values, (layers, 2, slots, heads, steps, head size), of rows and of prefixes.

    Rows have a step more than was asked for, the last, where idle rows may write.
    """

    def __init__(
        self, shape: Shape, sizes: tuple[int, int, int, int], step: Step, dtype: torch.dtype
    ) -> None:
        """`sizes`: rows, steps, prefixes and their steps, as `Decoder.new_cache`."""
        rows, steps, prefixes, prefix_steps = sizes
        self.rows, self.prefixes = (
            torch.zeros(
                (shape.layers, 2, slots, shape.heads, length, shape.head_size),
                dtype=dtype,
                device=step.slot.device,
            )
            for slots, length in ((rows, steps + 1), (prefixes, prefix_steps))
        )
        self.prefix_lengths = np.zeros(prefixes, np.int64)
        self.step = step
        self.graphs: dict[int, Any] = {}  # torch.cuda.CUDAGraph of a step over this cache, by number of rows
