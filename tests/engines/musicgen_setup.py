"""Helpers for the tests of both MusicGen engines: generators with every kind of decoder, run in all ways."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tones import tones

from pipeline.engines.base import EngineSettings
from pipeline.records import Audio, Failure, Variation, VariationRequest

# int8 and float32 by the CPU's kernels, and torch's float32, on a GPU where there is one
DECODERS = ("int8", "float32", "torch")

Codes = np.ndarray  # int64, (codebooks, frames)


def never() -> bool:
    return False


def no_progress(request_id: str, done: int, total: int) -> None:
    pass


def load_musicgen(folder: Path, **settings: Any) -> Any:
    """The engine, loaded by its card. A tiny model is quickest with one thread."""
    from pipeline.engines.musicgen import ENGINE

    return ENGINE.load(EngineSettings(model=str(folder), threads=1, **settings))


def decoder_of(checkpoint: Any, kind: str) -> Any:
    """int8 or float32 by the CPU's kernels, or torch's float32."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder
    from pipeline.engines.musicgen.layers import Stack
    from pipeline.engines.musicgen.torch_decoder import TorchDecoder

    class OneStepDecoder(TorchDecoder):
        """It returns after each step, as those of the CPU do."""

        steps_at_once = 1

    ends = checkpoint.embedding_and_head()
    if kind in {"int8", "float32"}:
        return CpuDecoder(Stack.packed(checkpoint.layers, kind), ends, threads=1)
    precision = "float32" if kind == "torch" else kind
    return OneStepDecoder(checkpoint.layers, ends, torch_device(), precision, most_rows=16)


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def generator_with(checkpoint: Any, decoder: Any, **options: Any) -> Any:
    """A generator over a decoder, or one of `DECODERS`."""
    from pipeline.engines.musicgen.engine import MusicgenGenerator

    if isinstance(decoder, str):
        decoder = decoder_of(checkpoint, decoder)
    return MusicgenGenerator(checkpoint, decoder, **options)


def codes_of(engine: Any, *requests: VariationRequest) -> dict[str, Codes]:
    """The tokens of each request; any error is raised."""
    codes = {}
    for state in engine.run(requests, no_progress, never):
        if state.error is not None:
            raise state.error
        codes[state.request_id] = state.codes
    return codes


def codes(engine: Any, request: VariationRequest) -> Codes:
    return codes_of(engine, request)[request.request_id]


def results_of(engine: Any, *requests: VariationRequest) -> dict[str, Variation | Failure]:
    results = engine.generate(requests, progress=no_progress, should_stop=never)
    return {result.request_id: result for result in results}


def request_state(checkpoint: Any, name: str = "a", *, audio: Audio | None = None, **choices: Any) -> Any:
    """The state of a request of 25 frames before its first step.

    `choices`: `frames`, `seed`, `prompt`, `sampler`, `window_frames`, `stride_frames`, and sampling
    parameters.
    """
    from pipeline.engines.musicgen import SamplingParams, conditioning
    from pipeline.engines.musicgen.sampling import Sampler
    from pipeline.engines.musicgen.scheduler import RequestState
    from pipeline.engines.musicgen.windows import UNKNOWN, windows

    n_frames, seed = choices.pop("frames", 25), choices.pop("seed", 7)
    prompt, sampler = choices.pop("prompt", ""), choices.pop("sampler", None)
    all_windows = windows(n_frames, choices.pop("window_frames", 1500), choices.pop("stride_frames", 900))
    audio = tones(440.0, 554.37) if audio is None else audio
    starts = [window.start for window in all_windows]
    return RequestState(
        request_id=name,
        conditions=conditioning.Conditions(
            chroma=conditioning.track_chroma(checkpoint, audio, starts),
            text=conditioning.encode_prompt(checkpoint, prompt, checkpoint.text_encoder),
            checkpoint=checkpoint,
        ),
        sampler=sampler or Sampler(SamplingParams(**choices), seed),
        windows=all_windows,
        codes=np.full((checkpoint.layers.shape.codebooks, n_frames), UNKNOWN, np.int64),
    )


def run_requests(checkpoint: Any, decoder: Any, states: Sequence[Any], rows: int) -> Iterator[Any]:
    """Run requests in so many rows; yields them as they finish."""
    from pipeline.engines.musicgen.scheduler import Scheduler, distinct_prefixes

    delays = np.arange(checkpoint.layers.shape.codebooks, dtype=np.int64) // checkpoint.channels
    return Scheduler(
        decoder=decoder,
        rows=rows,
        n_prefixes=min(rows, distinct_prefixes(states)),
        steps=max(window.frames for state in states for window in state.windows) + int(delays.max()),
        prefix_steps=checkpoint.chroma_length + max(len(state.conditions.text) for state in states),
        delays=delays,
        on_step=lambda state: None,
        check_stop=lambda: None,
    ).run(states)


@dataclass(eq=False)
class CountingDecoder:
    """A decoder that counts its prefills and the rows of its steps, and can give NaN for one prefix."""

    decoder: Any
    prefills: int = 0
    rows: list[int] = field(default_factory=list)  # of each pass
    cache: Any = None  # a weak reference to the last one
    broken: np.ndarray | None = None  # inputs of a prefix whose rows get NaN
    _broken_slots: set[int] = field(default_factory=set)  # of the prefix cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def new_cache(self, *sizes: int) -> Any:
        cache = self.decoder.new_cache(*sizes)
        self.cache = weakref.ref(cache)
        return cache

    def prefill(self, cache: Any, prefixes: dict[int, np.ndarray]) -> None:
        self.prefills += len(prefixes)
        for slot, inputs in prefixes.items():
            self._broken_slots.discard(slot)
            if self.broken is not None and np.array_equal(inputs, self.broken):
                self._broken_slots.add(slot)
                prefixes[slot] = inputs * np.nan
        self.decoder.prefill(cache, prefixes)

    def generate(self, cache: Any, continuations: Sequence[Any]) -> Any:
        self.rows.append(sum(len(one.slots) for one in continuations))
        with pytest.MonkeyPatch.context() as patch:
            if self.decoder.precision == "int8":  # it rounds NaN to a number
                patch.setattr(self.decoder, "advance", self._advance)
            return self.decoder.generate(cache, continuations)

    def _advance(self, cache: Any, step_inputs: Sequence[Any]) -> np.ndarray:
        logits: np.ndarray = type(self.decoder).advance(self.decoder, cache, step_inputs)
        logits[[one.prefix in self._broken_slots for one in step_inputs]] = np.nan
        return logits
