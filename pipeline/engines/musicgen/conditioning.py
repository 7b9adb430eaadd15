"""What conditions the model: the melody as chroma and the prompt as tokens, and the null condition.

The chroma of a window is computed of the track from the window's own time on, as much as in training, so
that a window in the second minute follows the second minute. Where the track ends, it is repeated from its
beginning. Both as in audiocraft (`_generate_tokens` of its MusicGen), frame for frame. Each melody is
prepared by itself: in a batch of several lengths the library pads with silence, which one-hot chroma turns
into a steady C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from pipeline.audio import resample
from pipeline.engines.base import StopFn
from pipeline.engines.musicgen.checkpoint import Checkpoint, LazyModel
from pipeline.engines.musicgen.melody import (
    TAIL_S,
    WINDOW_S,
    Melody,
    Source,
    melody_source,
    needed_samples,
)
from pipeline.records import Audio, Samples, VariationRequest


@dataclass(frozen=True, eq=False)
class Conditions:
    """The prefixes of one request."""

    chroma: Mapping[int, Samples]  # see `track_chroma`
    text: Samples  # the prompt's embedding, (tokens, hidden)
    checkpoint: Checkpoint

    def conditional(self, start: int) -> Samples:
        """The prefix of the window that starts there: float32, (chroma length + tokens, hidden)."""
        return np.concatenate([project_chroma(self.checkpoint, self.chroma[start]), self.text])

    def unconditional(self) -> Samples:
        """The prefix of the unconditional row, as long as `conditional`: the library's null condition.

        It is a steady C and zeros.
        """
        silence = np.zeros((self.checkpoint.chroma_length, self.checkpoint.config.num_chroma), np.float32)
        silence[:, 0] = 1
        return np.concatenate([project_chroma(self.checkpoint, silence), np.zeros_like(self.text)])


class ConditionBuilder:
    """Builds the conditions of a call's requests, each track's chroma and each prompt once.

    Requests of one track share their audio object. Close it when all requests are prepared: it may
    hold the text encoder.
    """

    def __init__(self, checkpoint: Checkpoint, should_stop: StopFn) -> None:
        self.checkpoint, device = checkpoint, checkpoint.device
        self._text_encoder = LazyModel(checkpoint.text_encoder, device)
        self._melody = cache(partial(melody_source, should_stop=should_stop, device=device))
        self._chroma = cache(partial(track_chroma, checkpoint))
        self._prompt = cache(partial(encode_prompt, checkpoint, open_encoder=self._text_encoder.open))

    def melody(self, request: VariationRequest, wanted: Melody) -> tuple[Audio, Source]:
        """See `melody_source`."""
        window_s = self.checkpoint.window_s
        if request.prepared is not None and window_s <= WINDOW_S:
            source, name = request.prepared
            return source or request.audio, name
        n_samples = needed_samples(request.audio, request.duration_s, window_s)
        return self._melody(request.audio, wanted, n_samples=n_samples)

    def conditions(self, source: Audio, prompt: str, starts: tuple[int, ...]) -> Conditions:
        """Of a melody's source; `starts`: of the windows, in frames of tokens."""
        return Conditions(self._chroma(source, starts), self._prompt(prompt), self.checkpoint)

    def close(self) -> None:
        """Release everything that was built, and the text encoder."""
        for built in (self._melody, self._chroma, self._prompt):
            built.cache_clear()
        self._text_encoder.close()


def track_chroma(checkpoint: Checkpoint, audio: Audio, starts: Sequence[int]) -> dict[int, Samples]:
    """One-hot chroma of a track, repeated if it is shorter, in windows that start at these frames of tokens.

    Returns float32 (chroma length, 12) by start.
    """
    extractor = checkpoint.feature_extractor
    rate_hz = extractor.sampling_rate
    firsts = [round(start / checkpoint.frames_per_s * rate_hz) for start in starts]
    samples = repeated_mono(audio, rate_hz, max(firsts) + extractor.n_samples)
    return {
        start: extractor(
            samples[first : first + extractor.n_samples], sampling_rate=rate_hz, return_tensors="np"
        )["input_features"][0]
        for start, first in zip(starts, firsts, strict=True)
    }


def repeated_mono(audio: Audio, sample_rate: int, n_samples: int) -> Samples:
    """The first `n_samples` of a track in mono at `sample_rate`, repeated if it is shorter.

    Returns float32, (n_samples,).
    """
    tail = round(TAIL_S * audio.sample_rate)
    needed = math.ceil(n_samples * audio.sample_rate / sample_rate) + tail
    start = Audio(audio.samples[:, :needed], audio.sample_rate)
    mono = Audio(start.mono()[None], audio.sample_rate)
    return np.resize(resample(mono, sample_rate).samples[0], n_samples)


def project_chroma(checkpoint: Checkpoint, chroma: Samples) -> Samples:
    """Chroma (frames, 12) as inputs of the decoder, (frames, hidden)."""
    import torch

    with torch.inference_mode():
        inputs = torch.from_numpy(np.ascontiguousarray(chroma)).to(checkpoint.device)
        projected: Samples = checkpoint.chroma_projection(inputs).cpu().numpy()
    return projected


def encode_prompt(checkpoint: Checkpoint, prompt: str, open_encoder: Callable[[], Any]) -> Samples:
    """A prompt as inputs of the decoder, (tokens, hidden), by T5 and the checkpoint's projection.

    An empty prompt is the model's own null condition: the end token alone, masked, which makes it a
    zero vector (`get_unconditional_inputs` of the library's processor; audiocraft's T5 conditioner
    does the same with an empty string). `open_encoder` is called only for a prompt that is not empty.
    """
    prompt = prompt.strip()
    if not prompt:
        return np.zeros((1, checkpoint.layers.shape.hidden), np.float32)
    import torch

    encoded = checkpoint.tokenizer([prompt], return_tensors="pt").to(checkpoint.device)
    with torch.inference_mode():
        hidden = open_encoder()(**encoded).last_hidden_state
        embedding: Samples = checkpoint.text_projection(hidden)[0].cpu().numpy()
    return embedding
