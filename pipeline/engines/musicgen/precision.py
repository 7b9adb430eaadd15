"""The precision that the decoder computes in: int8 on a CPU and half precision on a GPU, or float32.

The fast precision is used if it is near enough to float32 (see `precision_check`). The first start
with a checkpoint checks it and stores the result, on a CPU with the quantized layers
(`quantized_store`), so that later starts do not read the float32 layers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline.engines.musicgen import quantized_store
from pipeline.engines.musicgen.checkpoint import Checkpoint
from pipeline.engines.musicgen.decoder import Decoder, EmbeddingAndHead
from pipeline.engines.musicgen.layers import Stack, check_shape
from pipeline.engines.musicgen.precision_check import PrecisionCheck, check_precision, stored_or_made
from pipeline.errors import ConfigError

log = logging.getLogger("pipeline")


def open_decoder(
    checkpoint: Checkpoint, precision: str, threads: int | None, folder: Path | None
) -> tuple[Decoder[Any], PrecisionCheck | None]:
    """The decoder of a checkpoint, and the check of its fast precision if there was one.

    Args:
        checkpoint: an open checkpoint.
        precision: "float32", "int8" or "auto": int8 on a CPU, half precision on a GPU.
        threads: of the CPU; None: all cores.
        folder: where quantized layers and checks are stored; None: they are made again at each start.

    Raises:
        ConfigError: int8 on a GPU.
        BadCheckpoint: layers are missing, or do not fit the kernels.
    """
    if checkpoint.device != "cpu":
        return _on_device(checkpoint, precision, threads, folder)
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

    check_shape(checkpoint.layers.shape)
    ends = checkpoint.embedding_and_head()
    check = None
    if precision != "float32":
        stack, check = _quantized(checkpoint, ends, threads, folder)
        if _is_near(check):
            return CpuDecoder(stack, ends, threads), check
        del stack  # before the float32 layers take memory
    return CpuDecoder(Stack.packed(checkpoint.layers, "float32"), ends, threads), check


def _quantized(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, threads: int | None, folder: Path | None
) -> tuple[Stack, PrecisionCheck]:
    """The quantized layers and their check, as they are stored or made now."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

    path = quantized_store.path_of(folder, checkpoint.weights.revision) if folder else None
    stored = quantized_store.read(path, checkpoint.layers.shape) if path else None
    if stored:
        return stored
    log.info("musicgen: compiling and quantizing, once for this machine and checkpoint; a minute or two")
    stack = Stack.packed(checkpoint.layers, "int8")
    check = check_precision(checkpoint, CpuDecoder(stack, ends, threads), ends, threads)
    if path:
        quantized_store.save(path, stack, check)
    return stack, check


def _on_device(
    checkpoint: Checkpoint, precision: str, threads: int | None, folder: Path | None
) -> tuple[Decoder[Any], PrecisionCheck | None]:
    import torch

    from pipeline.engines.musicgen.torch_decoder import TorchDecoder

    if precision == "int8":
        raise ConfigError(
            f"generate.musicgen.precision: int8 is for the CPU; use auto or float32 on {checkpoint.device}."
        )
    check_shape(checkpoint.layers.shape)
    ends = checkpoint.embedding_and_head()

    def decoder(precision: str) -> TorchDecoder:
        return TorchDecoder(checkpoint.layers, ends, checkpoint.device, precision)

    check = None
    if precision != "float32":
        has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        fast = decoder("bfloat16" if has_bfloat16 else "float16")
        name = f"{quantized_store.name_of(checkpoint.weights.revision)}.{fast.precision}.json"

        def make() -> PrecisionCheck:
            log.info("musicgen: comparing %s with float32, once for this checkpoint", fast.precision)
            return check_precision(checkpoint, fast, ends, threads)

        check = stored_or_made(folder / name if folder else None, make)
        if _is_near(check):
            return fast, check
        del fast  # before the float32 layers take memory
    return decoder("float32"), check


def _is_near(check: PrecisionCheck) -> bool:
    log.info("musicgen: %s", check.words)
    if not check.passed:
        text = "musicgen: %s is too far from float32 with this checkpoint; float32 is used"
        log.warning(text, check.precision)
    return check.passed
