"""Downmix of up to eight channels to at most two, by the coefficients of ITU-R BS.775-3, Annex 4.

The centre and the surround channels are mixed in at -3 dB and a single back channel at -6 dB on each
side; the low-frequency channel is left out. The sums are not scaled down, because samples are float
here and the loudness is set later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.records import Samples

MAX_CHANNELS = 8
_DOWN = 0.5**0.5

# How much of a channel, by FFmpeg's name of it, goes to the left and to the right.
_TO_STEREO = {
    "FL": (1.0, 0.0), "FR": (0.0, 1.0), "FC": (_DOWN, _DOWN), "LFE": (0.0, 0.0),
    "BL": (_DOWN, 0.0), "BR": (0.0, _DOWN), "BC": (0.5, 0.5),
    "SL": (_DOWN, 0.0), "SR": (0.0, _DOWN),
    "FLC": (1.0, 0.0), "FRC": (0.0, 1.0), "DL": (1.0, 0.0), "DR": (0.0, 1.0),
}  # fmt: skip

# The order of the channels in WAVE and FLAC files (RFC 9639, 9.1.3) by their count.
WAVE_ORDER = {
    1: ("FC",),
    2: ("FL", "FR"),
    3: ("FL", "FR", "FC"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    7: ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}


def downmix_matrix(channels: int, names: Sequence[str] | None = None) -> Samples | None:
    """Float32 (channels, 2) for blocks of (samples, channels); None where nothing is to be mixed.

    `names` are the channels' places; without them, or with one unknown, the order is WAVE's.
    """
    if channels <= 2:
        return None
    if names is None or len(names) != channels or any(name not in _TO_STEREO for name in names):
        names = WAVE_ORDER[channels]
    return np.array([_TO_STEREO[name] for name in names], dtype=np.float32)


def mix_down(block: Samples, matrix: Samples) -> Samples:
    """Float32 (samples, 2) of a block (samples, channels); not finite where any channel isn't.

    A plain sum in the channels' order, so that no BLAS decides about the last bit.
    """
    mixed = np.zeros((len(block), 2), dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for channel, gains in enumerate(matrix):
            mixed += block[:, channel, np.newaxis] * gains
    return mixed
