"""The comparison of int8 or half precision with float32, made at the first start with a checkpoint.

The decoder to be checked writes a passage, which is then run through the float32 layers on the CPU,
read one at a time. The next-token distributions of both are compared step by step: the Kullback-Leibler
divergence, and how often both have the same likeliest token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines.musicgen import SamplingParams
from pipeline.engines.musicgen.checkpoint import Checkpoint
from pipeline.engines.musicgen.conditioning import project_chroma
from pipeline.engines.musicgen.decoder import Decoder, EmbeddingAndHead, StepInput, Tokens
from pipeline.engines.musicgen.layers import Stack
from pipeline.engines.musicgen.sampling import Sampler
from pipeline.fs.atomic import write_atomically
from pipeline.records import Samples

MAX_KL = 0.05  # nats per codebook, mean over the passage: above it float32 is used
PASSAGE_STEPS = 48
PASSAGE_SEED = 0


@dataclass(frozen=True)
class PrecisionCheck:
    """How near a precision is to float32 on the passage."""

    model: str
    kl: list[float]  # nats, mean over the passage, per codebook
    top1: list[float]  # share of steps where both have the same likeliest token, per codebook
    steps: int
    passed: bool
    precision: str = "int8"

    @property
    def words(self) -> str:
        """The figures in one line."""
        return (
            f"{self.precision} against float32 over {self.steps} steps: KL {max(self.kl):.4f} nats at most "
            f"(limit {MAX_KL:g}), same likeliest token in {min(self.top1):.0%} or more"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The figures for the manifest."""
        return {
            "kl_nats": [round(value, 5) if math.isfinite(value) else None for value in self.kl],
            "top1": [round(value, 4) for value in self.top1],
            "steps": self.steps,
        }


def check_precision(
    checkpoint: Checkpoint, decoder: Decoder[Any], ends: EmbeddingAndHead, threads: int | None
) -> PrecisionCheck:
    """Let a decoder write a passage, and compare its distributions with those of float32."""
    from scipy.special import log_softmax

    prefix = _prefix(checkpoint)
    cache = decoder.new_cache(1, PASSAGE_STEPS, 1, len(prefix))
    decoder.prefill(cache, {0: prefix})
    sampler = Sampler(SamplingParams(guidance=1.0), PASSAGE_SEED)
    tokens = np.full((PASSAGE_STEPS + 1, decoder.shape.codebooks), decoder.shape.vocabulary, np.int64)
    found = []
    for step in range(PASSAGE_STEPS):
        found.append(decoder.advance(cache, [StepInput(0, 0, step, tokens[step : step + 1])])[0])
        tokens[step + 1] = sampler.pick(step, found[step].astype(np.float64))
    exact = _float32_logits(checkpoint, ends, prefix, tokens[:-1], threads)
    p, q = (log_softmax(logits.astype(np.float64), axis=-1) for logits in (exact, np.stack(found)))
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean(axis=0)
    same = (p.argmax(axis=-1) == q.argmax(axis=-1)).mean(axis=0)
    return PrecisionCheck(
        model=checkpoint.weights.model,
        kl=kl.tolist(),
        top1=same.tolist(),
        steps=PASSAGE_STEPS,
        passed=bool(np.isfinite(kl).all() and kl.max() <= MAX_KL),
        precision=decoder.precision,
    )


def stored_or_made(path: Path | None, make: Callable[[], PrecisionCheck]) -> PrecisionCheck:
    """The check in a JSON file, or one that is made and stored there."""
    if path is None:
        return make()
    try:
        check = read(path)
    except (OSError, ValueError, TypeError):
        check = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, path.with_suffix(".tmp"), json.dumps(asdict(check)).encode())
    with suppress(OSError):
        path.touch()  # for `quantized_store.last_check`
    return check


def read(path: Path) -> PrecisionCheck:
    """The check in a JSON file.

    Raises:
        OSError, ValueError, TypeError: there is none, or a damaged one.
    """
    return PrecisionCheck(**json.loads(path.read_bytes()))


def _prefix(checkpoint: Checkpoint) -> Samples:
    """A rising chromatic scale, without a prompt."""
    length, n_chroma = checkpoint.chroma_length, checkpoint.config.num_chroma
    scale = np.eye(n_chroma, dtype=np.float32)[np.arange(length) * n_chroma // length]
    return project_chroma(checkpoint, scale)


def _float32_logits(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, prefix: Samples, tokens: Tokens, threads: int | None
) -> Samples:
    """Logits of the float32 layers after each step, with one layer in memory at a time."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

    files = checkpoint.layers
    layer_stack = Stack.empty(replace(files.shape, layers=1), "float32")
    decoder = CpuDecoder(layer_stack, ends, threads)
    x = np.concatenate([prefix, ends.embed(tokens)])
    x += ends.positions[: len(x)]
    for layer in files.layers():
        layer_stack.put(0, layer)
        decoder.run(x)
    return decoder.logits(x[len(prefix) :])
