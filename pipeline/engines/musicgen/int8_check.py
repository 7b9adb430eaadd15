"""The comparison of int8 with float32, made at every start.

The quantized decoder writes a passage. The passage is run through the quantized and the float32
layers, and their next-token distributions are compared step by step: the Kullback-Leibler
divergence, and how often both have the same likeliest token. The float32 layers are read one at a
time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.engines.musicgen.checkpoint import Checkpoint
from pipeline.engines.musicgen.conditioning import project_chroma
from pipeline.engines.musicgen.decoder import Decoder, EmbeddingAndHead, StepInput, Tokens
from pipeline.engines.musicgen.layers import Stack
from pipeline.engines.musicgen.sampling import Sampler, SamplingParams
from pipeline.records import Samples

MAX_KL = 0.05  # nats per codebook, mean over the passage: above it int8 is not used
PASSAGE_STEPS = 48
PASSAGE_SEED = 0


@dataclass(frozen=True)
class Int8Check:
    """How near int8 is to float32 on the passage."""

    model: str
    revision: str
    kl: tuple[float, ...]  # nats, mean over the passage, per codebook
    top1: tuple[float, ...]  # share of steps where both have the same likeliest token, per codebook
    steps: int
    passed: bool

    @property
    def words(self) -> str:
        """The figures in one line."""
        return (
            f"int8 against float32 over {self.steps} steps: KL {max(self.kl):.4f} nats at most "
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


@dataclass(frozen=True, eq=False)
class Passage:
    """A piece of music in tokens, with the logits of the float32 layers."""

    tokens: Tokens  # (steps, codebooks): the input of each step
    logits: Samples  # float32, after each step, (steps, codebooks, vocabulary)


def write_passage(
    checkpoint: Checkpoint, decoder: Decoder[Any], ends: EmbeddingAndHead, threads: int | None
) -> Passage:
    """Let a decoder write a passage, and run it through the float32 layers."""
    shape = decoder.shape
    prefix = _prefix(checkpoint)
    cache = decoder.new_cache(1, PASSAGE_STEPS, 1, len(prefix))
    decoder.prefill(cache, 0, prefix)
    sampler = Sampler(SamplingParams(guidance=1.0), PASSAGE_SEED)
    tokens = np.full((PASSAGE_STEPS, shape.codebooks), shape.vocabulary, np.int64)
    for step in range(PASSAGE_STEPS - 1):
        (logits,) = decoder.advance(cache, [StepInput(0, 0, step, tokens[step : step + 1])])
        tokens[step + 1] = sampler.pick(step, logits.astype(np.float64), None)
    return Passage(tokens, _float32_logits(checkpoint, ends, prefix, tokens, threads))


def compare(checkpoint: Checkpoint, decoder: Decoder[Any], passage: Passage) -> Int8Check:
    """Compare a decoder's distributions after each step of a passage with those of float32."""
    prefix, n_steps = _prefix(checkpoint), len(passage.tokens)
    cache = decoder.new_cache(1, n_steps, 1, len(prefix))
    decoder.prefill(cache, 0, prefix)
    steps = (StepInput(0, 0, n, passage.tokens[n : n + 1]) for n in range(n_steps))
    found = np.concatenate([decoder.advance(cache, [step]) for step in steps])
    p, q = (_log_softmax(logits) for logits in (passage.logits, found))
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean(axis=0)
    same = (p.argmax(axis=-1) == q.argmax(axis=-1)).mean(axis=0)
    return Int8Check(
        model=checkpoint.weights.model,
        revision=checkpoint.weights.revision,
        kl=tuple(float(value) for value in kl),
        top1=tuple(float(value) for value in same),
        steps=n_steps,
        passed=bool(np.isfinite(kl).all() and kl.max() <= MAX_KL),
    )


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


def _log_softmax(logits: Samples) -> Samples:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
