"""What the model is told: the melody as chroma, the prompt as tokens; and, for guidance, nothing.

The chroma is taken of the whole track once and sliced at each window's own time, so a window in
the second minute follows the second minute. It is told in pieces of a window's length, as in
training; past its end the track begins again, as in audiocraft (`_generate_tokens` of its
MusicGen). Melodies are prepared one by one: in a batch of several lengths the library pads with
silence, which one-hot chroma turns into a steady C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.audio import resample
from pipeline.engines.musicgen.checkpoint import Checkpoint
from pipeline.records import Audio, Samples


@dataclass(frozen=True, eq=False)
class Conditions:
    """The prefixes of one request: what the rows of its windows are told first."""

    chroma: Samples  # one-hot, (frames, 12), for all windows
    frames_per_s: float  # of the chroma
    text: Samples  # the prompt, projected: (tokens, hidden)
    checkpoint: Checkpoint

    def window(self, start_s: float) -> Samples:
        """The chroma of the window that starts there, (chroma length, 12)."""
        length = self.checkpoint.chroma_length
        first = round(start_s * self.frames_per_s)
        return np.resize(self.chroma[first : first + length], (length, self.chroma.shape[1]))

    def told(self, window: Samples) -> Samples:
        """The prefix of a window with that chroma: float32, (chroma length + tokens, hidden)."""
        return np.concatenate([project_chroma(self.checkpoint, window), self.text])

    def nothing(self) -> Samples:
        """The prefix that guidance leads away from: a steady C and zeros, as long as `told`."""
        return null_prefix(self.checkpoint, len(self.text))


def listen(checkpoint: Checkpoint, audio: Audio, end_s: float) -> Samples:
    """One-hot chroma of a track from its beginning to `end_s`, repeated if it is shorter.

    Returns float32, (frames, 12); `chroma_rate` frames a second.
    """
    extractor = checkpoint.feature_extractor
    n_samples = max(math.ceil(end_s * extractor.sampling_rate), extractor.n_samples)
    samples = melody(audio, extractor.sampling_rate, n_samples)
    features = extractor(
        samples, sampling_rate=extractor.sampling_rate, truncation=False, return_tensors="pt"
    )
    result: Samples = features["input_features"][0].numpy()
    return result


def chroma_rate(checkpoint: Checkpoint) -> float:
    """Frames of chroma per second."""
    extractor = checkpoint.feature_extractor
    return float(extractor.sampling_rate / extractor.hop_length)


def melody(audio: Audio, sample_rate: int, n_samples: int) -> Samples:
    """The first `n_samples` of the source in mono at `sample_rate`, repeated if it is shorter.

    Returns float32, (n_samples,).
    """
    tail = audio.sample_rate  # a second more, so that the resampler's filter doesn't end within
    needed = math.ceil(n_samples * audio.sample_rate / sample_rate) + tail
    start = Audio(audio.samples[:, :needed], audio.sample_rate)
    mono = Audio(start.mono()[None], audio.sample_rate)
    return np.resize(resample(mono, sample_rate).samples[0], n_samples)


def project_chroma(checkpoint: Checkpoint, chroma: Samples) -> Samples:
    """Chroma (frames, 12) as inputs of the decoder, (frames, hidden)."""
    import torch

    with torch.inference_mode():
        told = torch.from_numpy(np.ascontiguousarray(chroma)).to(checkpoint.device)
        projected: Samples = checkpoint.chroma_projection(told).cpu().numpy()
    return projected


def null_prefix(checkpoint: Checkpoint, n_tokens: int) -> Samples:
    """See `Conditions.nothing`; the library's null condition, `n_tokens` after the chroma."""
    silence = np.zeros((checkpoint.chroma_length, checkpoint.config.num_chroma), np.float32)
    silence[:, 0] = 1
    told = project_chroma(checkpoint, silence)
    return np.concatenate([told, np.zeros((n_tokens, told.shape[1]), np.float32)])


def text(checkpoint: Checkpoint, prompt: str, open_encoder: Callable[[], Any] | None = None) -> Samples:
    """A prompt as inputs of the decoder, (tokens, hidden), by T5 and the checkpoint's projection.

    No prompt is the model's own null condition: the end token alone, masked, which makes a zero
    vector of it (`get_unconditional_inputs` of the library's processor; audiocraft's T5
    conditioner does the same with an empty string). For a prompt, `open_encoder` is called (None:
    the checkpoint's).
    """
    prompt = prompt.strip()
    if not prompt:
        return np.zeros((1, checkpoint.layers.shape.hidden), np.float32)
    import torch

    encoder = (open_encoder or checkpoint.text_encoder)()
    encoded = checkpoint.tokenizer([prompt], return_tensors="pt").to(checkpoint.device)
    with torch.inference_mode():
        hidden = encoder(**encoded).last_hidden_state
        if checkpoint.text_projection is not None:
            hidden = checkpoint.text_projection(hidden)
    told: Samples = hidden[0].cpu().numpy()
    return told
