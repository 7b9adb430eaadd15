"""What a page draws of a sound: its peaks and its chromagram, 8 bits each."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from pipeline import audio
from pipeline.audio import DecodeLimits
from pipeline.music import analysis
from pipeline.music.spectra import Floats
from pipeline.records import Audio
from pipeline.scores.chroma import RATE_HZ, compute_chroma

PEAK_COLUMNS = 1000
CHROMA_COLUMNS = 240  # at most
LIMITS = DecodeLimits(min_duration_s=0.0, max_duration_s=math.inf, accept_truncated=True)

Picture = Mapping[str, str]  # `peaks` and `chroma`, see `picture`


def draw(sounds: Iterable[Path | bytes]) -> list[Picture]:
    """The pictures of files, or of their bytes.

    Raises:
        BadAudio: one can't be decoded.
    """
    return [picture(_decoded(sound)) for sound in sounds]


def _decoded(sound: Path | bytes) -> Audio:
    if isinstance(sound, Path):
        return audio.decode(sound, sample_rate=RATE_HZ, limits=LIMITS)[0]
    return audio.decode_file(io.BytesIO(sound), len(sound), sample_rate=RATE_HZ, limits=LIMITS)[0]


def picture(sound: Audio) -> Picture:
    """Peaks and chromagram of a sound as base64 of unsigned bytes.

    Returns:
        `peaks`: PEAK_COLUMNS values, of which 255 is full scale or more. `chroma`: 12 values for each column,
        C first, of which 255 is the strongest pitch class of the column, for at most CHROMA_COLUMNS columns
        of equal length.
    """
    return {
        "peaks": _packed(np.minimum(peaks(sound), 1.0)),
        "chroma": _packed(chroma_columns(compute_chroma(analysis.at_rate(sound, RATE_HZ)))),
    }


def peaks(sound: Audio) -> Floats:
    """The largest magnitude in each of PEAK_COLUMNS parts of equal length, over all channels."""
    found = np.zeros(PEAK_COLUMNS, np.float32)
    for column, part in enumerate(np.array_split(sound.samples, PEAK_COLUMNS, axis=1)):
        if part.size:
            found[column] = max(part.max(), -part.min())
    return found


def chroma_columns(chroma: Floats) -> Floats:
    """Means of (frames, 12) over at most CHROMA_COLUMNS parts, each with its largest value at 1."""
    parts = np.array_split(chroma, min(len(chroma), CHROMA_COLUMNS))
    means = np.stack([part.mean(axis=0) for part in parts])
    return np.asarray(means / np.maximum(means.max(axis=1, keepdims=True), 1e-9), np.float32)


def _packed(values: Floats) -> str:
    return base64.b64encode(np.round(255 * values).astype(np.uint8).tobytes()).decode()
