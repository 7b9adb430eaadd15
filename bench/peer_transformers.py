"""transformers' own generate() as a peer: a batch of variations, and EnCodec's decoder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from child import peak_bytes
from steps import (
    CODEBOOKS,
    DURATION_S,
    FRAME_RATE,
    OWN_STEPS,
    TIMED_STEPS,
    Measured,
    PeerRun,
    StepTimer,
    n_steps,
)

if TYPE_CHECKING:
    import torch

PROMPT = "warm analog synths"
GUIDANCE, TOP_K = 3.0, 250


@dataclass(frozen=True)
class Decode:
    """EnCodec: tokens to sound, one variation."""

    duration_s: float
    seconds: float
    peak_bytes: int
    others_cores: float = 0.0  # as PeerRun's


def run(
    variations: int, folder: Path, own_steps: Sequence[int] = OWN_STEPS, timed: int = TIMED_STEPS
) -> PeerRun:
    """Time generate() with guidance and top_k for a batch of variations, in this process.

    Prefill is all of generate() before the first scores: text encoder, projections, prefix.
    """
    import torch

    began_s = time.perf_counter()
    model = load(folder)
    load_s = time.perf_counter() - began_s
    batch = inputs(folder, variations)
    cache = _GenerateCache(model.decoder)
    torch.manual_seed(0)
    timer = StepTimer(cache, 2 * variations, own_steps, timed)

    def hook(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        timer.step_done()
        return scores

    with torch.inference_mode(), contextlib.suppress(Measured):
        timer.start()
        model.generate(
            **batch,
            logits_processor=[hook],
            do_sample=True,
            top_k=TOP_K,
            guidance_scale=GUIDANCE,
            max_length=n_steps(DURATION_S) + 1,
        )
    return timer.result("transformers generate(), float32", load_s)


def decode(folder: Path, duration_s: float = DURATION_S) -> Decode:
    """Time EnCodec's decoder on random tokens of one variation, in this process."""
    import torch

    codec = load(folder).audio_encoder
    codes = torch.randint(0, 2048, (1, 1, CODEBOOKS, round(FRAME_RATE * duration_s)))
    with torch.inference_mode():
        codec.decode(codes[..., :FRAME_RATE], [None])  # the first call is slower
        began_s = time.perf_counter()
        codec.decode(codes, [None])
        return Decode(duration_s, time.perf_counter() - began_s, peak_bytes())


def load(folder: Path) -> Any:
    """transformers.MusicgenMelodyForConditionalGeneration in float32, silent.

    The library maps the weights from their files; they are read once here, so that nothing that is
    timed waits for the disk.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.MusicgenMelodyForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        for weight in model.parameters():
            weight.sum()
    return model.eval()


def inputs(folder: Path, variations: int) -> dict[str, Any]:
    """The same melody (random notes, a second each) and prompt for all variations."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    rate = processor.feature_extractor.sampling_rate
    notes = np.random.default_rng(0).integers(48, 72, round(DURATION_S))
    hz = np.repeat(440 * 2 ** ((notes - 69) / 12), rate)
    melody = np.sin(2 * np.pi * np.cumsum(hz) / rate).astype(np.float32)
    texts = [PROMPT] * variations
    return dict(processor(audio=[melody] * variations, sampling_rate=rate, text=texts, return_tensors="pt"))


def prefixes(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The prefixes with and without condition of the first of `inputs`, (2, positions, hidden).

    Without condition are a steady C and no text, as generate() has it.
    """
    import torch

    encoded = model.text_encoder(batch["input_ids"][:1], batch["attention_mask"][:1])
    text = model.enc_to_dec_proj(encoded.last_hidden_state)
    chroma = batch["input_features"][:1]
    silence = torch.zeros_like(chroma)
    silence[..., 0] = 1
    melodies = model.audio_enc_to_dec_proj(torch.cat([chroma, silence]))
    return torch.cat([melodies, torch.cat([text, torch.zeros_like(text)])], dim=1)


class _GenerateCache:
    """The cache that generate() hands to the decoder, an EncoderDecoderCache of DynamicCaches."""

    def __init__(self, decoder: Any) -> None:
        self._layers: Any = None
        self._watch = decoder.register_forward_pre_hook(self._seen, with_kwargs=True)

    def get(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[layer].keys, self._layers[layer].values

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._layers[layer].keys, self._layers[layer].values = keys, values

    def _seen(self, _decoder: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self._layers = kwargs["past_key_values"].self_attention_cache.layers
        self._watch.remove()
