"""The decoder's layers: read one at a time from a checkpoint's files, and packed for the CPU's kernels.

The published decoder is 5.5 GB in float32 and 1.4 GB in int8. Reading layer by layer holds only one
float32 layer in memory beside the packed ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen.decoder import Shape
from pipeline.errors import BadCheckpoint
from pipeline.records import Samples
from pipeline.weights.layout import INDEX, WEIGHTS

Precision = Literal["float32", "int8"]
Array = NDArray[Any]

PREFIX = "decoder.model.decoder.layers."
MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "up": ("fc1",),
    "down": ("fc2",),
}
NORMS = {"attention_norm": "self_attn_layer_norm", "feed_forward_norm": "final_layer_norm"}
LARGEST_HEAD = 512  # products of int16 and int8 are summed in 32 bits
LARGEST_GROUP = 128  # inputs that share one scale of the activations
GROUP_STEP = 16  # the int8 kernel takes four times four inputs at once


@dataclass(frozen=True, eq=False)
class LayerFiles:
    """The layers in a checkpoint's files."""

    folder: Path
    shape: Shape

    def layers(self) -> Iterator[dict[str, Samples]]:
        """Each layer's matrices (outputs, inputs) and norms (2, hidden), float32, by the names used here.

        Raises:
            BadCheckpoint: a tensor is missing, has another shape, or can't be read.
        """
        from safetensors import SafetensorError, safe_open

        # Opened again for each layer: the pages that were read stay mapped while a file is open.
        files: dict[str, Any] = {}
        index_file = self.folder / INDEX
        file_of = json.loads(index_file.read_bytes())["weight_map"] if index_file.is_file() else {}

        def tensor(name: str) -> Samples:
            file = self.folder / file_of.get(name, WEIGHTS)
            try:
                if file.name not in files:
                    files[file.name] = safe_open(file, framework="pt")
                found: Samples = files[file.name].get_tensor(name).float().numpy()
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(f"{self.folder} lacks {name}.") from error
            return found

        for index in range(self.shape.layers):
            files.clear()
            layer = {}
            for ours, theirs in MATRICES.items():
                layer[ours] = np.concatenate([tensor(f"{PREFIX}{index}.{name}.weight") for name in theirs])
            for ours, name in NORMS.items():
                layer[ours] = np.stack(
                    [tensor(f"{PREFIX}{index}.{name}.{part}") for part in ("weight", "bias")]
                )
            for name, size in sizes(self.shape).items():
                if layer[name].shape != size:
                    raise BadCheckpoint(
                        f"{self.folder}: the {name!r} weights of layer {index} have the shape "
                        f"{layer[name].shape}, config.json says {size}."
                    )
            yield layer


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers in the kernels' layout."""

    shape: Shape
    precision: Precision
    arrays: dict[str, Array]  # matrices are (layers, outputs / 16, inputs * 16), norms (layers, 2, hidden)

    @classmethod
    def empty(cls, shape: Shape, precision: Precision) -> Stack:
        """Memory for all layers, not filled."""
        from pipeline.engines.musicgen.kernels import LANES, aligned

        n, layer_sizes = shape.layers, sizes(shape)
        arrays = {name: aligned((n, *layer_sizes[name]), np.float32) for name in NORMS}
        for name in MATRICES:
            outputs, inputs = layer_sizes[name]
            kind, n_scales = (np.uint8, outputs) if precision == "int8" else (np.float32, 0)
            arrays[name] = aligned((n, outputs // LANES, inputs * LANES), kind)
            arrays[f"{name}_scales"] = aligned((n, n_scales), np.float32)
        return cls(shape, precision, arrays)

    @classmethod
    def packed(cls, files: LayerFiles, precision: Precision) -> Stack:
        """All layers of a checkpoint. Raises BadCheckpoint as `LayerFiles.layers`."""
        stack = cls.empty(files.shape, precision)
        for index, layer in enumerate(files.layers()):
            stack.put(index, layer)
        return stack

    def put(self, index: int, layer: dict[str, Samples]) -> None:
        """Pack one layer."""
        from pipeline.engines.musicgen.kernels import pack_columns, quantize_rows

        for name in MATRICES:
            weights: Array = layer[name]
            if self.precision == "int8":
                weights, self.arrays[f"{name}_scales"][index] = quantize_rows(weights)
            self.arrays[name][index] = pack_columns(weights)
        for name in NORMS:
            self.arrays[name][index] = layer[name]

    def group(self, inputs: int) -> int:
        """Number of inputs that share one scale of the activations: the largest that divides them evenly."""
        sizes = range(min(LARGEST_GROUP, inputs) // GROUP_STEP * GROUP_STEP, 0, -GROUP_STEP)
        return next(size for size in sizes if inputs % size == 0)


def sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Shapes of one layer's matrices, (outputs, inputs), and norms, (weight and bias, hidden)."""
    hidden, feed_forward = shape.hidden, shape.feed_forward
    matrices = {
        "qkv": (3 * hidden, hidden),
        "out": (hidden, hidden),
        "up": (feed_forward, hidden),
        "down": (hidden, feed_forward),
    }
    return matrices | dict.fromkeys(NORMS, (2, hidden))


def check_shape(shape: Shape) -> None:
    """Raise BadCheckpoint unless the shape fits the kernels' layout, as all published ones do."""
    from pipeline.engines.musicgen.kernels import LANES

    widths = (shape.hidden, shape.feed_forward, shape.head_size, shape.codebooks * shape.vocabulary)
    if any(width % LANES for width in widths) or shape.hidden % shape.heads or shape.head_size > LARGEST_HEAD:
        raise BadCheckpoint(
            f"The CPU's kernels need widths in multiples of {LANES}, and heads of {LARGEST_HEAD} at most; "
            f"this checkpoint's heads are {shape.head_size} wide, its layers {shape.hidden} and "
            f"{shape.feed_forward}."
        )
