"""What a page draws of a sound: its peaks and its chromagram, 8 bits each."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.fft

from pipeline import audio
from pipeline.audio import DecodeLimits
from pipeline.audio.sndfile import read_whole
from pipeline.errors import BadAudio
from pipeline.music.spectra import Floats, chroma_bank
from pipeline.records import Audio, cut
from pipeline.scores.chroma import N_FFT, OCTAVES_WIDE

RATE_HZ = 44100
PEAK_COLUMNS = 1000
CHROMA_COLUMNS = 200  # at most
LIMITS = DecodeLimits(min_duration_s=0.0, max_duration_s=math.inf, accept_truncated=True)

Picture = Mapping[str, str]  # `peaks` and `chroma`, see `picture`


def draw(source: Path | None, results: Sequence[Path | bytes]) -> list[Picture]:
    """The pictures of a source, if there is one, and of results: of their files, or of their bytes.

    Raises:
        BadAudio: one can't be decoded.
    """
    drawn = [] if source is None else [audio.decode(source, sample_rate=RATE_HZ, limits=LIMITS)[0]]
    return [picture(sound) for sound in (*drawn, *map(_result, results))]


def _result(file: Path | bytes) -> Audio:
    """A result of this program, by libsndfile at its own rate, which is quickest."""
    import soundfile

    try:
        return read_whole(file)
    except soundfile.LibsndfileError as e:
        raise BadAudio(str(e)) from e


def picture(sound: Audio) -> Picture:
    """Peaks and chromagram of a sound as base64 of unsigned bytes.

    Returns:
        `peaks`: PEAK_COLUMNS values, of which 255 is full scale or more. `chroma`: 12 values for each column,
        C first, of which 255 is the strongest pitch class of the column, for at most CHROMA_COLUMNS columns
        of equal length.
    """
    return {"peaks": _packed(np.minimum(peaks(sound), 1.0)), "chroma": _packed(chroma(sound))}


def peaks(sound: Audio) -> Floats:
    """The largest magnitude in each of PEAK_COLUMNS parts of equal length, over all channels."""
    magnitudes = np.abs(sound.samples).max(axis=0)
    if magnitudes.size < PEAK_COLUMNS:
        magnitudes = np.repeat(magnitudes, -(-PEAK_COLUMNS // magnitudes.size))
    return np.maximum.reduceat(magnitudes, np.linspace(0, magnitudes.size, PEAK_COLUMNS, False).astype(int))


def chroma(sound: Audio) -> Floats:
    """Chroma, (columns, 12), by one spectrum in the middle of each column, whose largest value is 1.

    There are as many columns as spectra fit into the sound, but at least one and at most CHROMA_COLUMNS. The
    powers of all channels are added. See `pipeline.scores.chroma`; for a picture, parts of the sound will do.
    """
    columns = min(max(sound.n_samples // N_FFT, 1), CHROMA_COLUMNS)
    starts = ((np.arange(columns) + 0.5) * sound.n_samples / columns - N_FFT / 2).astype(int)
    frames = np.stack([cut(sound.samples, start, start + N_FFT) for start in starts])
    spectra = scipy.fft.rfft(frames * np.hanning(N_FFT).astype(np.float32), axis=2)
    powers = (spectra.real**2 + spectra.imag**2).sum(axis=1)
    found = powers @ chroma_bank(sound.sample_rate, N_FFT, OCTAVES_WIDE).T
    return np.asarray(found / np.maximum(found.max(axis=1, keepdims=True), 1e-9), np.float32)


def _packed(values: Floats) -> str:
    return base64.b64encode(np.round(255 * values).astype(np.uint8).tobytes()).decode()
