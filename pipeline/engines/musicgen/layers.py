"""The decoder's layers: read one at a time from a checkpoint's files, packed for the CPU's kernels.

A true-size decoder is 5.5 GB in float32 and 1.4 GB in int8. Reading layer by layer keeps one
layer of the checkpoint in memory beside what is made of it.
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
WIDEST_HEAD = 512  # products of int16 and int8 are summed in 32 bits
LARGEST_GROUP = 128  # inputs that share a scale of the activations
GROUP_STEP = 16  # the int8 kernel takes four times four inputs at a time


@dataclass(frozen=True, eq=False)
class LayerFiles:
    """Where a checkpoint's layers are."""

    folder: Path
    shape: Shape

    def layers(self) -> Iterator[dict[str, Samples]]:
        """Each layer's matrices (outputs, inputs) and norms (2, hidden), float32, under our names.

        Raises:
            BadCheckpoint: a tensor is missing, of another shape, or can't be read.
        """
        from safetensors import SafetensorError, safe_open

        files: dict[
            str, Any
        ] = {}  # anew for each layer: what was read of a file stays mapped while it is open
        where = self._where()

        def tensor(name: str) -> Samples:
            file = self.folder / where.get(name, WEIGHTS)
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
                        f"{self.folder}: the {name!r} weights of layer {index} are of the size "
                        f"{layer[name].shape}, config.json says {size}."
                    )
            yield layer

    def _where(self) -> dict[str, str]:
        if not (self.folder / INDEX).is_file():
            return {}
        names: dict[str, str] = json.loads((self.folder / INDEX).read_bytes())["weight_map"]
        return names


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers in the kernels' layout."""

    shape: Shape
    precision: Precision
    arrays: dict[str, Array]  # see `layout`

    @classmethod
    def empty(cls, shape: Shape, precision: Precision) -> Stack:
        """Room for all layers, nothing in it."""
        return cls(
            shape,
            precision,
            {name: aligned(size, kind) for name, (size, kind) in layout(shape, precision).items()},
        )

    @classmethod
    def packed(cls, files: LayerFiles, precision: Precision) -> Stack:
        """All layers of a checkpoint. Raises BadCheckpoint as `LayerFiles.layers`."""
        stack = cls.empty(files.shape, precision)
        for index, layer in enumerate(files.layers()):
            stack.put(index, layer)
        return stack

    def put(self, index: int, layer: dict[str, Samples]) -> None:
        """Pack a layer into its place."""
        from pipeline.engines.musicgen.kernels import pack_columns, quantize_rows

        for name in MATRICES:
            weights: Array = layer[name]
            if self.precision == "int8":
                weights, self.arrays[f"{name}_scales"][index] = quantize_rows(weights)
            self.arrays[name][index] = pack_columns(weights)
        for name in NORMS:
            self.arrays[name][index] = layer[name]

    def group(self, inputs: int) -> int:
        """How many inputs share a scale of the activations: the most that divide them evenly."""
        sizes = range(min(LARGEST_GROUP, inputs) // GROUP_STEP * GROUP_STEP, 0, -GROUP_STEP)
        return next(size for size in sizes if inputs % size == 0)


def layout(shape: Shape, precision: Precision) -> dict[str, tuple[tuple[int, ...], type]]:
    """Sizes and types of a stack's arrays, by name; matrices are (layers, outputs / 16, inputs * 16)."""
    from pipeline.engines.musicgen.kernels import LANES

    quantized = precision == "int8"
    arrays: dict[str, tuple[tuple[int, ...], type]] = {}
    n, of_a_layer = shape.layers, sizes(shape)
    for name in MATRICES:
        outputs, inputs = of_a_layer[name]
        kind = np.uint8 if quantized else np.float32
        arrays[name] = ((n, outputs // LANES, inputs * LANES), kind)
        arrays[f"{name}_scales"] = ((n, outputs if quantized else 0), np.float32)
    return arrays | {name: ((n, *of_a_layer[name]), np.float32) for name in NORMS}


def sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Of one layer's matrices, (outputs, inputs), and norms, (weight and bias, hidden)."""
    hidden, wide = shape.hidden, shape.wide
    matrices = {
        "qkv": (3 * hidden, hidden),
        "out": (hidden, hidden),
        "up": (wide, hidden),
        "down": (hidden, wide),
    }
    return matrices | dict.fromkeys(NORMS, (2, hidden))


def check_shape(shape: Shape) -> None:
    """Raise BadCheckpoint if the kernels' layout doesn't fit; every published checkpoint does."""
    from pipeline.engines.musicgen.kernels import LANES

    dim = shape.hidden // shape.heads
    sizes = (shape.hidden, shape.wide, dim, shape.codebooks * shape.vocabulary)
    if any(size % LANES for size in sizes) or shape.hidden % shape.heads or dim > WIDEST_HEAD:
        raise BadCheckpoint(
            f"The CPU's kernels need widths in multiples of {LANES}, and heads of {WIDEST_HEAD} at most; "
            f"this checkpoint's heads are {dim} wide, its layers {shape.hidden} and {shape.wide}."
        )


def aligned(size: tuple[int, ...], kind: type) -> Array:
    """An array that begins at a cache line."""
    n_bytes = int(np.prod(size)) * np.dtype(kind).itemsize
    room = np.empty(n_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + n_bytes].view(kind).reshape(size)
