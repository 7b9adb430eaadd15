"""Sample rate conversion by libsoxr at its highest quality (28 bits, linear phase)."""

from __future__ import annotations

import numpy as np

from pipeline.records import Audio

QUALITY = "VHQ"


def resample(audio: Audio, sample_rate: int) -> Audio:
    """Convert to `sample_rate` Hz; returns `audio` itself if it already has that rate."""
    if sample_rate == audio.sample_rate:
        return audio
    import soxr

    channels = [
        soxr.resample(np.ascontiguousarray(channel), audio.sample_rate, sample_rate, QUALITY)
        for channel in audio.samples
    ]
    return Audio(np.stack(channels), sample_rate)
