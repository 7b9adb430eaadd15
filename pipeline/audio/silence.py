"""Trimming of silence at both ends."""

from __future__ import annotations

import numpy as np

from pipeline.errors import BadAudio
from pipeline.records import Audio

FRAME_S = 0.01
FRAMES_AT_ONCE = 1000  # bounds the float64 squares to 10 s of one channel


def trim_silence(audio: Audio, *, threshold_dbfs: float = -60.0, keep_s: float = 0.05) -> Audio:
    """Remove leading and trailing silence except for up to `keep_s` seconds of it.

    The audible part begins with the first and ends with the last frame of 10 ms in which the RMS of any
    channel is above `threshold_dbfs`. The RMS is used instead of the peak so that a single click or dither
    noise counts as silence. The result is a view of the same samples.

    Raises:
        BadAudio: no frame is above the threshold.
    """
    frame = max(1, round(FRAME_S * audio.sample_rate))
    starts = np.arange(0, audio.n_samples, frame)
    audible = np.zeros(len(starts), dtype=bool)
    for channel in audio.samples:
        for at in range(0, len(starts), FRAMES_AT_ONCE):
            part = slice(at, at + FRAMES_AT_ONCE)
            piece = channel[at * frame : (at + FRAMES_AT_ONCE) * frame]
            energy = np.add.reduceat(np.square(piece, dtype=np.float64), starts[part] - at * frame)
            audible[part] |= energy > frame * 10.0 ** (threshold_dbfs / 10)
    frames = np.flatnonzero(audible)
    if not len(frames):
        raise BadAudio(f"is silent: nothing in it is above {threshold_dbfs:g} dBFS")
    keep = round(keep_s * audio.sample_rate)
    first = max(0, int(starts[frames[0]]) - keep)
    last = min(audio.n_samples, int(starts[frames[-1]]) + frame + keep)
    return Audio(audio.samples[:, first:last], audio.sample_rate)
