"""What is measured of a track once, so that any number of variations can be compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.music import beats, spectra
from pipeline.music.key import Key, find_key
from pipeline.music.spectra import Floats
from pipeline.records import Audio
from pipeline.scores.chroma import RATE_HZ as CHROMA_RATE_HZ
from pipeline.scores.chroma import compute_chroma
from pipeline.scores.context import context_frames, own_distance
from pipeline.scores.copies import Bits, fingerprint
from pipeline.scores.seams import SeamCurves, seam_curves


@dataclass(frozen=True, eq=False)
class Source:
    """A track as variations are compared with it."""

    chroma: Floats  # (frames, 12): see `compute_chroma`
    fingerprint: Bits  # (frames, bits): see `fingerprint`
    tempo_bpm: float | None  # None: no clear beat
    key: Key | None  # None: no pitch
    seams: SeamCurves
    context: Floats  # (frames, semitones): see `context_frames`
    own_distance: float  # of its passages from each other: see `own_distance`


def analyse_source(audio: Audio) -> Source:
    """Analyse a track of any length, rate and channels."""
    return analyse(audio)[0]


def analyse(audio: Audio) -> tuple[Source, Floats]:
    """The analysis of a track or a variation, and its mono signal at `pipeline.music.spectra.RATE_HZ`."""
    mono = audio.mono()
    slow = _resampled(mono, audio.sample_rate, spectra.RATE_HZ)
    found = spectra.compute_spectra(slow)
    chroma = compute_chroma(_resampled(mono, audio.sample_rate, CHROMA_RATE_HZ))
    context = context_frames(found.pitches)
    source = Source(
        chroma=chroma,
        fingerprint=fingerprint(found.pitches),
        tempo_bpm=beats.track_beats(found, slow).tempo_bpm,
        key=find_key(found.pitches) if chroma.any() else None,
        seams=seam_curves(mono, audio.sample_rate, found.onsets),
        context=context,
        own_distance=own_distance(context),
    )
    return source, slow


def _resampled(mono: Floats, from_hz: int, to_hz: int) -> Floats:
    import soxr

    return mono if from_hz == to_hz else np.asarray(soxr.resample(mono, from_hz, to_hz), np.float32)
