"""From tokens to sound, by the checkpoint's EnCodec decoder (Défossez et al. 2022).

Up to a minute is decoded at once. Memory grows with the length (5 GB for ten minutes), so longer
music is decoded in pieces with two seconds of context on either side, more than the convolutions
reach. The pieces are crossfaded where they meet, because the recurrent layer, whose state starts at
the beginning of the piece, differs a little.
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
    """Memory that `decode` needs while it runs, nearly all of it in the widest layers."""
    seconds = min(n_frames / checkpoint.frames_per_s, WHOLE_S)
    filters: int = checkpoint.config.audio_encoder.num_filters
    return round(seconds * checkpoint.sample_rate * filters * DECODING_BYTES)


def pieces(checkpoint: Checkpoint, n_frames: int) -> list[tuple[int, int]]:
    """First frame and end of each piece that is decoded at once."""
    rate = checkpoint.frames_per_s
    if n_frames <= WHOLE_S * rate:
        return [(0, n_frames)]
    piece = round(PIECE_S * rate)
    starts = range(0, n_frames - piece + 1, piece)  # the last piece includes the rest
    return list(zip(starts, [*starts[1:], n_frames], strict=True))


def decode(
    checkpoint: Checkpoint, model: Any, codes: Tokens, on_piece: Callable[[int], None] | None = None
) -> Samples:
    """Codes (codebooks, frames) to float32, (channels, frames * hop), by a model of `Checkpoint.codec`.

    `on_piece` is called after each of `pieces` with the number of pieces decoded so far.
    """
    context = round(CONTEXT_S * checkpoint.frames_per_s)
    hop, fade = checkpoint.hop_samples, round(FADE_S * checkpoint.sample_rate)
    rising = np.linspace(0, 1, 2 * fade, dtype=np.float32)
    n_frames = codes.shape[1]
    out = np.zeros((checkpoint.channels, n_frames * hop), np.float32)
    for made, (start, end) in enumerate(pieces(checkpoint, n_frames), 1):
        first, last = max(0, start - context), min(n_frames, end + context)
        sound = _decode(checkpoint, model, codes[:, first:last])
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


def _decode(checkpoint: Checkpoint, model: Any, codes: Tokens) -> Samples:
    """In stereo, the codebooks of left and right alternate; each channel is decoded by itself."""
    import torch

    channels = []
    with torch.inference_mode():
        for channel in range(checkpoint.channels):
            tokens = torch.from_numpy(codes[channel :: checkpoint.channels].copy()).to(checkpoint.device)
            sound = model.decode(tokens[None, None], audio_scales=[None]).audio_values
            channels.append(sound[0, 0].to("cpu", torch.float32).numpy())
    return np.stack(channels)
