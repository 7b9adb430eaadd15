"""All scores of a variation against its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.audio.loudness import loudness_lufs, true_peak_dbtp
from pipeline.music.key import key_agreement
from pipeline.music.spectra import Floats
from pipeline.records import Audio
from pipeline.scores.analysis import Source, analyse
from pipeline.scores.context import fit
from pipeline.scores.copies import find_copies
from pipeline.scores.defects import find_defects
from pipeline.scores.seams import Seam, smoothness, worst_seam
from pipeline.scores.similarity import (
    chroma_similarity,
    cosine,
    overall_similarity,
    tempo_agrees,
    warped_similarity,
)

DIGITS = 4  # of a rounded value


@dataclass(frozen=True)
class Scores:
    """The measures of docs/scores.md; None where one does not apply."""

    similarity: float  # 0 to 1: how close to the source, by those of the next three that there are
    chroma: float | None  # 0 to 1: share of the time with the same strongest pitch class
    chroma_warped: float | None  # -1 to 1: likeness of the harmony, wherever in the source it is from
    embedding: float | None  # -1 to 1: cosine of the vectors given; None: none given
    prompt: float | None  # -1 to 1: cosine with the prompt's vector; None: none given
    tempo_bpm: float | None  # None: no clear beat
    tempo_ratio: float | None  # to the source's tempo
    tempo_agrees: bool | None  # the ratio is 1, 2 or a half, within 4 %
    key: str | None  # None: no pitch
    key_agreement: float | None  # 0 to 1, by MIREX's weights
    copy_longest_s: float  # longest passage that is a copy of one in the source
    copy_share: float  # 0 to 1: share that is in such passages
    joins: tuple[Seam, ...]  # at the times given
    worst_seam: Seam  # anywhere
    silent_share: float  # 0 to 1 of the duration, like all shares
    silent_longest_s: float
    clipped_share: float
    dc_offset: float  # 0 to 1 of full scale
    flatness: float | None  # 0 to 1; None: silence
    entropy: float | None  # 0 to 1; None: silence
    noise_share: float
    stuck_share: float
    true_peak_dbtp: float  # -inf: silence
    loudness_lufs: float  # -inf: silence

    def as_json(self) -> dict[str, Any]:
        """The values rounded, as JSON has them: None for -inf."""
        return {name: _json(value) for name, value in asdict(self).items()}


def score(
    source: Source,
    audio: Audio,
    *,
    joins_s: Sequence[float] = (),
    source_vector: Floats | None = None,
    vector: Floats | None = None,
    prompt: float | None = None,
    analysed: tuple[Source, Floats] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Scores:
    """Score a variation of any length, rate and channels.

    Args:
        source: the track it was made from, by `analyse_source`.
        joins_s: times in seconds at which the variation is known to be joined.
        source_vector, vector: embeddings of the source and the variation by one engine, (d,).
        prompt: cosine of the embeddings of the variation and of its prompt, by one model.
        analysed: what `analyse` found in the variation, if that is known already.
        on_step: called at least every few seconds; what it raises ends the work.
    """
    made, mono = analysed or analyse(audio)
    on_step()
    chroma = chroma_similarity(source.chroma, made.chroma)
    warped = warped_similarity(source.chroma, made.chroma)
    embedding = None if vector is None or source_vector is None else cosine(source_vector, vector)
    ratio = made.tempo_bpm / source.tempo_bpm if source.tempo_bpm and made.tempo_bpm else None
    copies = find_copies(source.fingerprint, made.fingerprint, on_step)
    defects = find_defects(audio, mono)
    on_step()
    return Scores(
        similarity=overall_similarity(chroma, warped, embedding),
        chroma=chroma,
        chroma_warped=warped,
        embedding=embedding,
        prompt=prompt,
        tempo_bpm=made.tempo_bpm,
        tempo_ratio=ratio,
        tempo_agrees=None if ratio is None else tempo_agrees(ratio),
        key=str(made.key) if made.key else None,
        key_agreement=key_agreement(source.key, made.key) if source.key and made.key else None,
        copy_longest_s=min(copies.longest_s, audio.duration_s),
        copy_share=copies.share,
        joins=tuple(_join(made, source, at_s) for at_s in joins_s),
        worst_seam=worst_seam(made.seams, source.seams),
        **asdict(defects),
        true_peak_dbtp=true_peak_dbtp(audio),
        loudness_lufs=loudness_lufs(audio),
    )


def _join(made: Source, source: Source, at_s: float) -> Seam:
    """The quality of a join: the lower one of how smooth it is and how well both sides fit together."""
    smooth = smoothness(made.seams, source.seams, at_s)
    return Seam(at_s, min(smooth, fit(made.context, source.context, source.own_distance, at_s)))


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    return value
