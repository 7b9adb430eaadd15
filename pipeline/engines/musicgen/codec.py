"""From tokens to sound, by the checkpoint's EnCodec decoder (Défossez et al. 2022).

Up to a minute is decoded in one go. Beyond that memory would grow with the length (5 GB for ten
minutes), so longer music is decoded in pieces that overlap by two seconds on either side, more than
the convolutions reach, and are faded into one another where they meet: the recurrent layer, which
remembers from the piece's beginning, differs by a little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.engines.musicgen.checkpoint import Checkpoint
from pipeline.engines.musicgen.decoder import Tokens
from pipeline.records import Samples

WHOLE_S = 60.0
PIECE_S = 30.0
CONTEXT_S = 2.0
FADE_S = 0.05
DECODING_BYTES = 20  # per sample and filter: 1.2 GB measured for 30 s of the published checkpoint


def decoding_bytes(checkpoint: Checkpoint, n_frames: int) -> int:
    """Memory that `decode` takes for a while, nearly all of it for the widest layers' inputs and outputs."""
    seconds = min(n_frames * checkpoint.hop_samples / checkpoint.sample_rate, WHOLE_S)
    filters: int = checkpoint.config.audio_encoder.num_filters
    return round(seconds * checkpoint.sample_rate * filters * DECODING_BYTES)


def pieces(checkpoint: Checkpoint, n_frames: int) -> list[tuple[int, int]]:
    """First and last frame, without it, of each piece that is decoded in one go."""
    rate = checkpoint.sample_rate / checkpoint.hop_samples
    if n_frames <= WHOLE_S * rate:
        return [(0, n_frames)]
    piece = round(PIECE_S * rate)
    starts = range(0, n_frames - piece + 1, piece)  # the last takes the rest along
    return list(zip(starts, [*starts[1:], n_frames], strict=True))


def decode(
    checkpoint: Checkpoint, codec: Any, codes: Tokens, on_piece: Callable[[int], None] | None = None
) -> Samples:
    """Codes (codebooks, frames) to float32, (channels, frames * hop), by `Checkpoint.codec`.

    `on_piece` is told after each of `pieces` how many are made.
    """
    rate = checkpoint.sample_rate / checkpoint.hop_samples
    context = round(CONTEXT_S * rate)
    hop, fade = checkpoint.hop_samples, round(FADE_S * checkpoint.sample_rate)
    rising = np.linspace(0, 1, 2 * fade, dtype=np.float32)
    n_frames = codes.shape[1]
    out = np.zeros((checkpoint.channels, n_frames * hop), np.float32)
    for made, (start, end) in enumerate(pieces(checkpoint, n_frames), 1):
        first, last = max(0, start - context), min(n_frames, end + context)
        sound = _decode(checkpoint, codec, codes[:, first:last])
        begin, finish = start * hop, end * hop
        if start > 0:
            begin -= fade
            sound[:, begin - first * hop : begin - first * hop + 2 * fade] *= rising
        if end < n_frames:
            finish += fade
            sound[:, finish - first * hop - 2 * fade : finish - first * hop] *= rising[::-1]
        out[:, begin:finish] += sound[:, begin - first * hop : finish - first * hop]
        if on_piece is not None:
            on_piece(made)
    return out


def _decode(checkpoint: Checkpoint, codec: Any, codes: Tokens) -> Samples:
    """Left and right are codebooks of one another's kind, taking turns; each is decoded by itself."""
    import torch

    sides = []
    with torch.inference_mode():
        for side in range(checkpoint.channels):
            its = torch.from_numpy(codes[side :: checkpoint.channels].copy()).to(checkpoint.device)
            sound = codec.decode(its[None, None], audio_scales=[None]).audio_values
            sides.append(sound[0, 0].to("cpu", torch.float32).numpy())
    return np.stack(sides)
