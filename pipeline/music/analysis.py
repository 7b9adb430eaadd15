"""What is heard in a whole piece, analysed once: its spectra and its beats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.music import beats, spectra
from pipeline.music.spectra import Floats
from pipeline.records import Audio


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece as it is analysed."""

    mono: Floats  # (samples,), at spectra.RATE_HZ
    spectra: spectra.Spectra
    beats: beats.Beats


def analyse(audio: Audio, known: beats.Beats | None = None) -> Piece:
    """Analyse a piece of any length and rate, whose beats may be known."""
    mono = at_rate(audio, spectra.RATE_HZ)
    found = spectra.compute_spectra(mono)
    return Piece(mono, found, beats.track_beats(found, mono) if known is None else known)


def at_rate(audio: Audio, rate_hz: int) -> Floats:
    """The mono sound at another sample rate, (samples,)."""
    import soxr

    mono = np.ascontiguousarray(audio.mono(), dtype=np.float32)
    if audio.sample_rate == rate_hz:
        return mono
    return np.asarray(soxr.resample(mono, audio.sample_rate, rate_hz), dtype=np.float32)
