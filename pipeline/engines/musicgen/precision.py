"""Which numbers the decoder calculates in, and the proof that int8 is good enough.

int8 is checked each time it is loaded: a passage that the quantized model wrote itself is run
through it again and its next-token distributions are held against those of the float32 layers,
position by position (Kullback-Leibler divergence, and how often both find the same token the
likeliest). If they are too far apart, float32 is used, and the log says so.

The quantized layers, the passage and the float32 distributions are kept on the disk, so the float32
layers are read once, one at a time, and never again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines.musicgen.checkpoint import Checkpoint
from pipeline.engines.musicgen.conditioning import project_chroma
from pipeline.engines.musicgen.decoder import Decoder, Ends, Feed, Shape, Tokens
from pipeline.engines.musicgen.layers import Array, Stack, check_shape, layout
from pipeline.engines.musicgen.sampling import Sampler, SamplingParams
from pipeline.errors import ConfigError
from pipeline.fs.atomic import replacing
from pipeline.records import Samples

log = logging.getLogger("pipeline")

LAYOUT = 3  # raised when the kept files mean something else
MAX_KL = 0.05  # nats per codebook, on average: above it float32 is used
PASSAGE_STEPS = 48
PASSAGE_SEED = 0
REPORT = "self-check.json"


@dataclass(frozen=True)
class Check:
    """How near int8 came to float32 on the passage."""

    model: str
    revision: str
    kl: tuple[float, ...]  # nats, mean over the passage, per codebook
    top1: tuple[float, ...]  # share of positions where both have the same likeliest token
    steps: int
    passed: bool

    @property
    def words(self) -> str:
        """For the log and `doctor`."""
        return (
            f"int8 against float32 over {self.steps} steps: KL {max(self.kl):.4f} nats at most "
            f"(limit {MAX_KL:g}), same likeliest token in {min(self.top1):.0%} or more"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "kl_nats": [round(value, 5) if math.isfinite(value) else None for value in self.kl],
            "top1": [round(value, 4) for value in self.top1],
            "steps": self.steps,
        }


@dataclass(frozen=True, eq=False)
class Opened:
    """A decoder ready for use."""

    decoder: Decoder
    check: Check | None = None  # of int8, whether it is used or not


def open_decoder(checkpoint: Checkpoint, precision: str, threads: int | None, folder: Path | None) -> Opened:
    """The decoder of a checkpoint in the precision asked for: auto, float32 or int8.

    auto is int8 on a CPU and half precision on a GPU. `folder` is where the quantized layers are
    kept; None: nowhere, they are made anew each time.

    Raises:
        ConfigError: int8 on a GPU.
        BadCheckpoint: layers are missing, or don't fit the kernels.
    """
    if checkpoint.device != "cpu":
        return Opened(_on_device(checkpoint, precision))
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

    check_shape(checkpoint.layers.shape)
    ends = checkpoint.ends()
    check = None
    if precision != "float32":
        decoder, check = _quantized(checkpoint, ends, threads, folder)
        if check.passed:
            return Opened(decoder, check)
        log.warning("musicgen: int8 is too far from float32 with this checkpoint; float32 is used")
        del decoder  # before there is another
    return Opened(CpuDecoder(Stack.packed(checkpoint.layers, "float32"), ends, threads), check)


def _quantized(
    checkpoint: Checkpoint, ends: Ends, threads: int | None, folder: Path | None
) -> tuple[Decoder, Check]:
    """The int8 decoder, from what was kept or made anew, and how near it is."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

    kept = Kept(folder, checkpoint.weights.revision) if folder is not None else None
    old_stack = kept.stack(checkpoint.layers.shape) if kept is not None else None
    if old_stack is None:
        log.info("musicgen: compiling and quantizing, once for this machine and checkpoint; a minute or two")
    stack = old_stack or Stack.packed(checkpoint.layers, "int8")
    decoder = CpuDecoder(stack, ends, threads)
    old_passage = kept.passage() if kept is not None and old_stack is not None else None
    passage = old_passage or write_passage(checkpoint, decoder, ends, threads)
    check = compare(checkpoint, decoder, passage)
    if kept is not None:
        kept.keep(
            None if old_stack is not None else stack, None if old_passage is not None else passage, check
        )
    log.info("musicgen: %s", check.words)
    return decoder, check


def _on_device(checkpoint: Checkpoint, precision: str) -> Decoder:
    import torch

    from pipeline.engines.musicgen.torch_decoder import TorchDecoder

    if precision == "int8":
        raise ConfigError(
            f"generate.precision: int8 is for the CPU; use auto or float32 on {checkpoint.device}."
        )
    if precision == "auto":
        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if half else "float16"
    return TorchDecoder(checkpoint.layers, checkpoint.ends(), checkpoint.device, precision)


@dataclass(frozen=True, eq=False)
class Passage:
    """A piece of music in tokens, and what float32 thinks of it."""

    tokens: Tokens  # (steps, codebooks): what each step is told
    logits: Samples  # float32 of the float32 layers after each step, (steps, codebooks, vocabulary)


def write_passage(checkpoint: Checkpoint, decoder: Decoder, ends: Ends, threads: int | None) -> Passage:
    """Let a decoder write a passage, then read it with the float32 layers, one layer in memory at a time."""
    shape = decoder.shape
    prefix = _prefix(checkpoint)
    memory = decoder.memory(1, PASSAGE_STEPS, 1, len(prefix))
    memory.prefill(0, prefix)
    sampler = Sampler(SamplingParams(guidance=1.0), PASSAGE_SEED)
    told = np.full((PASSAGE_STEPS, shape.codebooks), shape.vocabulary, np.int64)
    for step in range(PASSAGE_STEPS - 1):
        (logits,) = memory.advance([Feed(0, 0, step, told[step : step + 1])])
        told[step + 1] = sampler.pick(step, logits.astype(np.float64), None)
    return Passage(told, _by_layer(checkpoint, ends, prefix, told, threads))


def compare(checkpoint: Checkpoint, decoder: Decoder, passage: Passage) -> Check:
    """Hold a decoder's distributions after each step of a passage against float32's."""
    prefix = _prefix(checkpoint)
    memory = decoder.memory(1, len(passage.tokens), 1, len(prefix))
    memory.prefill(0, prefix)
    steps = range(len(passage.tokens))
    found = np.concatenate([memory.advance([Feed(0, 0, n, passage.tokens[n : n + 1])]) for n in steps])
    p, q = (_log_softmax(logits) for logits in (passage.logits, found))
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean(axis=0)
    same = (p.argmax(axis=-1) == q.argmax(axis=-1)).mean(axis=0)
    return Check(
        model=checkpoint.weights.model,
        revision=checkpoint.weights.revision,
        kl=tuple(float(value) for value in kl),
        top1=tuple(float(value) for value in same),
        steps=len(passage.tokens),
        passed=bool(np.isfinite(kl).all() and kl.max() <= MAX_KL),
    )


def last_check(folder: Path) -> Check | None:
    """What the last start found out, for `doctor`; None if there was none."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        facts = json.loads((folder / REPORT).read_bytes())
        return Check(**{**facts, "kl": tuple(facts["kl"]), "top1": tuple(facts["top1"])})
    return None


@dataclass(frozen=True, eq=False)
class Kept:
    """The quantized form of one checkpoint on the disk."""

    folder: Path
    revision: str

    def stack(self, shape: Shape) -> Stack | None:
        """The quantized layers; None if they aren't there, or aren't whole."""
        try:
            with self._layers.open("rb", buffering=0) as file:
                if file.read(len(self._header)) != self._header:
                    return None
                stack, digest = Stack.empty(shape, "int8"), hashlib.sha256()
                for name in layout(shape, "int8"):
                    _fill(file, stack.arrays[name])
                    digest.update(_bytes(stack.arrays[name]))
                return stack if file.read() == digest.digest() else None
        except (OSError, EOFError):
            return None

    def passage(self) -> Passage | None:
        try:
            with np.load(io.BytesIO(self._passage.read_bytes()), allow_pickle=False) as saved:
                return Passage(saved["tokens"], saved["logits"])
        except Exception:  # not there, or damaged, of which the libraries raise anything
            return None

    def keep(self, stack: Stack | None, passage: Passage | None, check: Check) -> None:
        """Write what is new, and the report. A full disk is no reason not to go on."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if stack is not None:
                parts = [_bytes(stack.arrays[name]) for name in layout(stack.shape, "int8")]
                digest = hashlib.sha256()
                for part in parts:
                    digest.update(part)
                _write(self._layers, [self._header, *parts, digest.digest()])
            if passage is not None:
                content = io.BytesIO()
                np.savez(content, tokens=passage.tokens, logits=passage.logits)
                _write(self._passage, [content.getbuffer()])
            _write(self.folder / REPORT, [json.dumps(asdict(check)).encode()])
        except OSError as error:
            log.warning(
                "musicgen: the quantized layers can't be kept (%s); they are made again next time", error
            )

    @property
    def _name(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.revision)

    @property
    def _layers(self) -> Path:
        return self.folder / f"{self._name}.int8"

    @property
    def _passage(self) -> Path:
        return self.folder / f"{self._name}.passage.npz"

    @property
    def _header(self) -> bytes:
        return f"int8 layers, layout {LAYOUT}, of {self.revision}\n".encode().ljust(256)


def _fill(file: Any, array: Array) -> None:
    """Read an array's bytes; EOFError if there are too few."""
    room = _bytes(array)
    while room:
        count = file.readinto(room)
        if not count:
            raise EOFError
        room = room[count:]


def _bytes(array: Array) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data)


def _write(path: Path, parts: list[Any]) -> None:
    """A file of these bytes, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with replacing(path, temporary), temporary.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _prefix(checkpoint: Checkpoint) -> Samples:
    """A rising chromatic scale, without a prompt."""
    length, n_chroma = checkpoint.chroma_length, checkpoint.config.num_chroma
    scale = np.eye(n_chroma, dtype=np.float32)[np.arange(length) * n_chroma // length]
    return project_chroma(checkpoint, scale)


def _by_layer(
    checkpoint: Checkpoint, ends: Ends, prefix: Samples, told: Tokens, threads: int | None
) -> Samples:
    """Logits of the float32 layers after each step, with one layer in memory at a time."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

    files = checkpoint.layers
    single = Stack.empty(replace(files.shape, layers=1), "float32")
    decoder = CpuDecoder(single, ends, threads)
    positions = np.arange(len(prefix) + len(told), dtype=np.int64)
    x = np.concatenate([prefix, ends.embedded(told)]) + ends.positions[positions]
    for layer in files.layers():
        single.put(0, layer)
        decoder.memory(1, len(x), 1, 1).run(x)
    return decoder.logits(x[len(prefix) :])


def _log_softmax(logits: Samples) -> Samples:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
