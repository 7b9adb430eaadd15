"""What the tests of the musicgen engine have in common: engines of every kind, and ways to run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tones import tones

from pipeline.engines.base import EngineSettings
from pipeline.records import Audio, Failure, Variation, VariationRequest

# kind: class and precision; on a GPU "torch" is what `DEVICE=cuda` uses
DECODERS = ("int8", "float32", "torch")

Codes = np.ndarray  # int64, (codebooks, frames)


def never() -> bool:
    return False


def silent(request_id: str, done: int, total: int) -> None:
    pass


def load_musicgen(folder: Path, **settings: Any) -> Any:
    """The engine, by its card. For a tiny model one thread is quickest."""
    from pipeline.engines.musicgen import ENGINE

    return ENGINE.load(EngineSettings(model=str(folder), threads=1, **settings))


def decoder_of(checkpoint: Any, kind: str) -> Any:
    """int8 or float32 by the CPU's kernels, or torch's float32."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder
    from pipeline.engines.musicgen.layers import Stack
    from pipeline.engines.musicgen.torch_decoder import TorchDecoder

    if kind in {"int8", "float32"}:
        return CpuDecoder(Stack.packed(checkpoint.layers, kind), checkpoint.ends(), threads=1)
    precision = "float32" if kind == "torch" else kind
    return TorchDecoder(checkpoint.layers, checkpoint.ends(), "cpu", precision)


def generator_with(checkpoint: Any, decoder: Any, **options: Any) -> Any:
    """A generator over a decoder, or one of `DECODERS`."""
    from pipeline.engines.musicgen.engine import MusicgenGenerator
    from pipeline.engines.musicgen.precision import Opened

    if isinstance(decoder, str):
        decoder = decoder_of(checkpoint, decoder)
    return MusicgenGenerator(checkpoint, Opened(decoder), **options)


def codes_of(engine: Any, *requests: VariationRequest) -> dict[str, Codes]:
    """The tokens of each request that got all of them; any error is raised."""
    codes = {}
    for ended in engine.run(requests, silent, never):
        if ended.error is not None:
            raise ended.error
        codes[ended.voice.request_id] = ended.voice.codes
    return codes


def codes(engine: Any, request: VariationRequest) -> Codes:
    return codes_of(engine, request)[request.request_id]


def made(engine: Any, *requests: VariationRequest) -> dict[str, Variation | Failure]:
    results = engine.generate(requests, progress=silent, should_stop=never)
    return {result.request_id: result for result in results}


def voice(checkpoint: Any, name: str = "a", *, audio: Audio | None = None, **choices: Any) -> Any:
    """A voice of 25 frames as the engine would begin it.

    `choices`: `frames`, `seed`, `prompt`, `sampler`, `window_frames` and `stride_frames`, and the
    sampling's.
    """
    from pipeline.engines.musicgen import conditioning
    from pipeline.engines.musicgen.sampling import Sampler, SamplingParams
    from pipeline.engines.musicgen.scheduler import Voice
    from pipeline.engines.musicgen.windows import UNKNOWN, windows

    n_frames, seed = choices.pop("frames", 25), choices.pop("seed", 7)
    prompt, sampler = choices.pop("prompt", ""), choices.pop("sampler", None)
    its_windows = windows(n_frames, choices.pop("window_frames", 1500), choices.pop("stride_frames", 900))
    audio = tones(440.0, 554.37) if audio is None else audio
    return Voice(
        request_id=name,
        conditions=conditioning.Conditions(
            chroma=conditioning.listen(checkpoint, audio, its_windows[-1].start / 50 + checkpoint.window_s),
            frames_per_s=conditioning.chroma_rate(checkpoint),
            text=conditioning.text(checkpoint, prompt),
            checkpoint=checkpoint,
        ),
        sampler=sampler or Sampler(SamplingParams(**choices), seed),
        windows=its_windows,
        codes=np.full((checkpoint.codebooks, n_frames), UNKNOWN, np.int64),
    )


def run_batch(checkpoint: Any, decoder: Any, voices: Sequence[Any], rows: int) -> Iterator[Any]:
    """Voices through a batch of so many rows; yields as they end."""
    from pipeline.engines.musicgen.scheduler import Batch, distinct_prefixes

    lags = np.arange(checkpoint.codebooks, dtype=np.int64) // checkpoint.channels
    return Batch(
        decoder=decoder,
        rows=rows,
        n_prefixes=min(rows, distinct_prefixes(voices, 50.0)),
        steps=max(window.frames for its in voices for window in its.windows) + int(lags.max()),
        prefix_steps=checkpoint.chroma_length + max(len(its.conditions.text) for its in voices),
        lags=lags,
        frames_per_s=50.0,
        on_step=lambda its, new: None,
        check_stop=lambda: None,
    ).run(voices)


@dataclass(eq=False)
class Watched:
    """A decoder that counts what is asked of it, and can be made to give NaN."""

    decoder: Any
    prefills: int = 0
    steps: int = 0
    rows: list[int] = field(default_factory=list)  # of each step
    released: list[int] = field(default_factory=list)
    broken: np.ndarray | None = None  # rows with a prefix whose inputs are these get NaN

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def memory(self, *sizes: Any) -> Any:
        return _WatchedMemory(self, self.decoder.memory(*sizes))


@dataclass(eq=False)
class _WatchedMemory:
    watched: Watched
    memory: Any
    broken: set[int] = field(default_factory=set)  # places of prefixes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def prefill(self, prefix: int, inputs: np.ndarray, key: bytes) -> None:
        self.watched.prefills += 1
        self.broken.discard(prefix)
        if self.watched.broken is not None and np.array_equal(inputs, self.watched.broken):
            self.broken.add(prefix)
        self.memory.prefill(prefix, inputs, key)

    def release(self, slot: int) -> None:
        self.watched.released.append(slot)
        self.memory.release(slot)

    def advance(self, feeds: Sequence[Any]) -> np.ndarray:
        self.watched.steps += max(len(feed.tokens) for feed in feeds)
        self.watched.rows.append(len(feeds))
        logits: np.ndarray = self.memory.advance(feeds)
        logits[[feed.prefix in self.broken for feed in feeds]] = np.nan
        return logits
