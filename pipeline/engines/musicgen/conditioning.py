"""What the model is told: the melody as chroma, the prompt as tokens.

The model was trained on 30 s pieces, each with the chroma of those same 30 s. So the melody is
always a whole window of that length, the source's first, repeated if the source is shorter; what
is asked for is made from its beginning. audiocraft cuts its windows like this (`_generate_tokens`
of its MusicGen). Melodies are prepared one by one: in a batch of several lengths the library pads
with silence, which one-hot chroma turns into a steady C.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.audio import resample
from pipeline.records import Audio, Samples

if TYPE_CHECKING:
    import torch


def melody(audio: Audio, sample_rate: int, n_samples: int) -> Samples:
    """The first `n_samples` of the source in mono at `sample_rate`, repeated if it is shorter.

    Returns float32, (n_samples,).
    """
    tail = audio.sample_rate  # a second more, so that the resampler's filter doesn't end within
    needed = math.ceil(n_samples * audio.sample_rate / sample_rate) + tail
    start = Audio(audio.samples[:, :needed], audio.sample_rate)
    mono = Audio(start.mono()[None], audio.sample_rate)
    return np.resize(resample(mono, sample_rate).samples[0], n_samples)


def chroma(feature_extractor: Any, samples: Samples) -> torch.Tensor:
    """One-hot chroma of mono samples at the extractor's rate: float32, (1, frames, 12)."""
    features = feature_extractor(samples, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    result: torch.Tensor = features["input_features"]
    return result


def text(tokenizer: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """T5 tokens of a prompt and their mask, int64, (1, tokens) each.

    No prompt is the model's own null condition: the end token alone, masked, which makes a zero
    vector of it (`get_unconditional_inputs` of the library's processor; audiocraft's T5
    conditioner does the same with an empty string).
    """
    prompt = prompt.strip()
    encoded = tokenizer([prompt], return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    return ids, mask if prompt else mask * 0
