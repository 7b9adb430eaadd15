"""The precision that the decoder computes in: int8 if it passes its check, otherwise float32.

The first start with a checkpoint quantizes its layers, checks them against float32 (see `int8_check`)
and stores both (see `quantized_store`), so that later starts do not read the float32 layers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline.engines.musicgen import quantized_store
from pipeline.engines.musicgen.checkpoint import Checkpoint
from pipeline.engines.musicgen.decoder import Decoder, EmbeddingAndHead
from pipeline.engines.musicgen.int8_check import Int8Check, check_int8
from pipeline.engines.musicgen.layers import Stack, check_shape
from pipeline.errors import ConfigError

log = logging.getLogger("pipeline")


def open_decoder(
    checkpoint: Checkpoint, precision: str, threads: int | None, folder: Path | None
) -> tuple[Decoder[Any], Int8Check | None]:
    """The decoder of a checkpoint, and the check of int8 if there was one.

    Args:
        checkpoint: an open checkpoint.
        precision: "float32", "int8" or "auto": int8 on a CPU, half precision on a GPU.
        threads: of the CPU; None: all cores.
        folder: where the quantized layers are stored; None: they are made again at each start.

    Raises:
        ConfigError: int8 on a GPU.
        BadCheckpoint: layers are missing, or do not fit the kernels.
    """
    if checkpoint.device != "cpu":
        return _torch_decoder(checkpoint, precision), None
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

    check_shape(checkpoint.layers.shape)
    ends = checkpoint.embedding_and_head()
    check = None
    if precision != "float32":
        stack, check = _quantized(checkpoint, ends, threads, folder)
        log.info("musicgen: %s", check.words)
        if check.passed:
            return CpuDecoder(stack, ends, threads), check
        log.warning("musicgen: int8 is too far from float32 with this checkpoint; float32 is used")
        del stack  # before the float32 layers take memory
    return CpuDecoder(Stack.packed(checkpoint.layers, "float32"), ends, threads), check


def _quantized(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, threads: int | None, folder: Path | None
) -> tuple[Stack, Int8Check]:
    """The quantized layers and their check, as they are stored or made now."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

    path = quantized_store.path_of(folder, checkpoint.weights.revision) if folder else None
    stored = quantized_store.read(path, checkpoint.layers.shape) if path else None
    if stored:
        return stored
    log.info("musicgen: compiling and quantizing, once for this machine and checkpoint; a minute or two")
    stack = Stack.packed(checkpoint.layers, "int8")
    check = check_int8(checkpoint, CpuDecoder(stack, ends, threads), ends, threads)
    if path:
        quantized_store.save(path, stack, check)
    return stack, check


def _torch_decoder(checkpoint: Checkpoint, precision: str) -> Decoder[Any]:
    import torch

    from pipeline.engines.musicgen.torch_decoder import TorchDecoder

    if precision == "int8":
        raise ConfigError(
            f"generate.musicgen.precision: int8 is for the CPU; use auto or float32 on {checkpoint.device}."
        )
    if precision == "auto":
        has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if has_bfloat16 else "float16"
    ends = checkpoint.embedding_and_head()
    return TorchDecoder(checkpoint.layers, ends, checkpoint.device, precision)
