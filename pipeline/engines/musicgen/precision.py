"""The precision that the decoder computes in: int8 if it passes its check, otherwise float32.

The first start with a checkpoint quantizes its layers and stores them, so that later starts do not
read the float32 layers (see `quantized_store`). Every start checks int8 against float32 (see
`int8_check`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline.engines.musicgen.checkpoint import Checkpoint
from pipeline.engines.musicgen.decoder import Decoder, EmbeddingAndHead
from pipeline.engines.musicgen.int8_check import Int8Check, compare, write_passage
from pipeline.engines.musicgen.layers import Stack, check_shape
from pipeline.engines.musicgen.quantized_store import QuantizedStore
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
        store = QuantizedStore(folder, checkpoint.weights.revision)
        decoder, check = _int8_decoder(checkpoint, ends, threads, store)
        if check.passed:
            return decoder, check
        log.warning("musicgen: int8 is too far from float32 with this checkpoint; float32 is used")
        del decoder  # before the float32 layers take memory
    return CpuDecoder(Stack.packed(checkpoint.layers, "float32"), ends, threads), check


def _int8_decoder(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, threads: int | None, store: QuantizedStore
) -> tuple[Decoder[Any], Int8Check]:
    """The int8 decoder, from the stored layers or from the checkpoint's, and its check."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

    stored_stack = store.stack(checkpoint.layers.shape)
    if stored_stack is None:
        log.info("musicgen: compiling and quantizing, once for this machine and checkpoint; a minute or two")
    stack = stored_stack or Stack.packed(checkpoint.layers, "int8")
    decoder = CpuDecoder(stack, ends, threads)
    stored_passage = store.passage() if stored_stack is not None else None
    passage = stored_passage or write_passage(checkpoint, decoder, ends, threads)
    check = compare(checkpoint, decoder, passage)
    store.save(
        None if stored_stack is not None else stack, None if stored_passage is not None else passage, check
    )
    log.info("musicgen: %s", check.words)
    return decoder, check


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
