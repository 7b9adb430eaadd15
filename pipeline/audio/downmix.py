"""Downmix of up to eight channels to at most two, by the coefficients of ITU-R BS.775-3, Annex 4.

The centre and the surround channels are mixed in at -3 dB and a single back channel at -6 dB on each
side; the low-frequency channels are left out. The sums are not scaled down, because samples are float
here and the loudness is set later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.records import Samples

_DOWN = 0.5**0.5
_LEFT, _RIGHT, _BOTH = (1.0, 0.0), (0.0, 1.0), (_DOWN, _DOWN)
_LEFT_DOWN, _RIGHT_DOWN, _BACK = (_DOWN, 0.0), (0.0, _DOWN), (0.5, 0.5)

# How much of a channel, by FFmpeg's name of it, goes to the left and to the right. The standard has no
# height channels: they are mixed in as the channels below them.
_TO_STEREO = {
    "FL": _LEFT, "FR": _RIGHT, "FC": _BOTH, "LFE": (0.0, 0.0), "LFE2": (0.0, 0.0),
    "BL": _LEFT_DOWN, "BR": _RIGHT_DOWN, "BC": _BACK, "SL": _LEFT_DOWN, "SR": _RIGHT_DOWN,
    "FLC": _LEFT, "FRC": _RIGHT, "DL": _LEFT, "DR": _RIGHT, "WL": _LEFT, "WR": _RIGHT,
    "TFL": _LEFT_DOWN, "TFR": _RIGHT_DOWN, "TFC": _BACK, "TC": _BACK,
    "TBL": _LEFT_DOWN, "TBR": _RIGHT_DOWN, "TBC": _BACK,
}  # fmt: skip

# The order of the channels in WAVE and FLAC files (RFC 9639, 9.1.3) by their count.
_WAVE_ORDER = {
    1: ("FC",),
    2: ("FL", "FR"),
    3: ("FL", "FR", "FC"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    7: ("FL", "FR", "FC", "LFE", "BC", "SL", "SR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}
_STEREO_PAIRS = {("FL", "FR"), ("DL", "DR"), ("BL", "BR"), ("SL", "SR"), ("FLC", "FRC")}


def downmix_matrix(names: Sequence[str]) -> Samples | None:
    """Float32 (channels, 2) for blocks of (samples, channels); None where nothing is to be mixed.

    `names` are the places of the channels; if one is unknown, all are taken in the order of WAVE.
    """
    if any(name not in _TO_STEREO for name in names):
        names = _WAVE_ORDER[len(names)]
    if len(names) == 1 or tuple(names) in _STEREO_PAIRS:
        return None
    return np.array([_TO_STEREO[name] for name in names], dtype=np.float32)


def mix_down(block: Samples, matrix: Samples) -> Samples:
    """Float32 (samples, 2) of a block (samples, channels); not finite where any channel isn't.

    A plain sum in the order of the channels, so that no BLAS decides about the last bit.
    """
    mixed = np.zeros((len(block), 2), dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for channel, gains in enumerate(matrix):
            mixed += block[:, channel, np.newaxis] * gains
    return mixed
