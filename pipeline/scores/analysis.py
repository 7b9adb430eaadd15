"""What is measured of a track once, so that any number of variations can be compared with it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.music import analysis
from pipeline.music.beats import Beats
from pipeline.music.key import Key, find_key
from pipeline.music.spectra import Floats
from pipeline.records import Audio
from pipeline.scores.chroma import RATE_HZ as CHROMA_RATE_HZ
from pipeline.scores.chroma import compute_chroma
from pipeline.scores.context import context_frames, own_distance
from pipeline.scores.copies import Bits, fingerprint
from pipeline.scores.seams import SeamCurves, seam_curves
from pipeline.scores.similarity import has_pitch


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


def analyse(audio: Audio, known: Beats | None = None) -> tuple[Source, Floats]:
    """The analysis of a track or a variation, and its mono signal at `pipeline.music.spectra.RATE_HZ`.

    `known`: beats that have its tempo; only that is used of them.
    """
    piece, mono = analysis.analyse(audio, known), audio.mono()
    found, chroma = piece.spectra, compute_chroma(analysis.at_rate(audio, CHROMA_RATE_HZ))
    context = context_frames(found.pitches)
    source = Source(
        chroma=chroma,
        fingerprint=fingerprint(found.pitches),
        tempo_bpm=piece.beats.tempo_bpm,
        key=find_key(found.pitches) if has_pitch(chroma) else None,
        seams=seam_curves(mono, audio.sample_rate, found.onsets),
        context=context,
        own_distance=own_distance(context),
    )
    return source, piece.mono
