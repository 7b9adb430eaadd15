"""Judges results by the scores of docs/scores.md: which gates one fails, and how it ranks among others.

The rank is the mean of what a listener wants, each 0 to 1: similarity to the source, but within a band; its
key and tempo; joins that are not heard, and such a seam of a loop; no defects; the prompt where there is one;
and a model's ratings if the configuration has one. A copy of the source is not what a variation is for, so
without a band of the configuration's own the usual one counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from pipeline.config import Gates
from pipeline.engines import cards
from pipeline.engines.base import Embedder, EngineSettings, StopFn, TextEmbedder, check_stop
from pipeline.engines.loading import Engines
from pipeline.music.words import describe
from pipeline.records import Audio, Samples
from pipeline.scores.analysis import Source, analyse
from pipeline.scores.copies import Bits, shared_share
from pipeline.scores.defects import find_defects
from pipeline.scores.scores import DIGITS, Scores, score
from pipeline.scores.similarity import cosine
from pipeline.stages import Finished

USUAL_BAND = (0.3, 0.9)  # of the similarity, for the rank
BAND_EDGE = 0.3  # so far outside of the band, a similarity counts 0
COLLAPSED_SHARE = 0.5  # of the seconds as noise or as a stuck tone, beyond those of the source
# The axes of a rating that a listener gains from: content enjoyment and production quality. Of the others,
# usefulness is the sound's worth as material for other works, and complexity is neither good nor bad.
RATED_AXES = ("CE", "PQ")
WORST_RATING, BEST_RATING = 1.0, 10.0
NOT_RATED: Mapping[str, float] = MappingProxyType({})
FOREIGN_KEY = 0.2  # key agreement of parallel keys; with less, two keys are foreign to each other


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a judge finds about one result."""

    failed: tuple[str, ...]  # the gates that it does not pass, each in a few words
    rank: float  # the higher, the better
    similarity: float | None  # to the source, as measured
    scores: dict[str, Any]  # for the manifest
    sound: Any  # what `shared` compares


class Judge(Protocol):
    """Measures results. Tests pass their own in the place of `ScoringJudge`."""

    def analyse(self, source: Audio) -> Any:
        """What of a track is compared with its variations."""
        ...

    def describe(self, source: Any) -> str:
        """A prompt for a track."""
        ...

    def judge(self, source: Any, made: Finished, gates: Gates, prompt: str) -> Verdict:
        """The verdict on a variation, for which `prompt` was given; empty: none."""
        ...

    def sound(self, made: Audio) -> Any:
        """What `shared` compares."""
        ...

    def shared(self, one: Any, other: Any) -> float:
        """Share of the sound that two results have in common at the same time, 0 to 1."""
        ...


@dataclass(frozen=True, eq=False)
class Reference:
    """A source as its variations are compared with it."""

    source: Source
    audio: Audio
    vector: Samples  # of the descriptors engine
    collapsed_share: float  # seconds that are noise or a stuck tone in the source itself


@dataclass
class ScoringJudge:
    """Judges by scores.

    The similarity counts the weight-free descriptors whichever engine embeds, so that it does not depend on
    what else is installed. Only prompts need an embedder that knows texts. All methods that take sound raise
    Stopped, soon after `should_stop` returned true.
    """

    engines: Engines
    should_stop: StopFn

    @cached_property
    def _text_embedder(self) -> TextEmbedder | None:
        embedder = self.engines.embedder()
        return embedder if isinstance(embedder, TextEmbedder) else None

    @cached_property
    def _descriptors(self) -> Embedder:
        return cards()["descriptors"].load(EngineSettings())  # type: ignore[return-value]

    def _check_stop(self) -> None:
        check_stop(self.should_stop)

    def _embed(self, embedder: Embedder, audio: Audio) -> Samples:
        return embedder.embed(audio, should_stop=self.should_stop).track

    def analyse(self, source: Audio) -> Reference:
        self._check_stop()
        analysed, mono = analyse(source)
        self._check_stop()
        defects = find_defects(source, mono)
        vector = self._embed(self._descriptors, source)
        return Reference(analysed, source, vector, max(defects.noise_share, defects.stuck_share))

    def describe(self, reference: Reference) -> str:
        source, by_text = reference.source, self._text_embedder
        vector = self._embed(by_text, reference.audio) if by_text else None
        return describe(source.tempo_bpm, source.key, vector, by_text.embed_texts if by_text else None)

    def judge(self, reference: Reference, made: Finished, gates: Gates, prompt: str) -> Verdict:
        joins_s = [join["out_s"] for join in made.details.get("joins", ())]
        self._check_stop()
        analysed, mono = analyse(made.audio, made.own_beats)
        if made.own_beats is not None:
            analysed = replace(analysed, key=reference.source.key)
        scores = score(
            reference.source,
            made.audio,
            analysed=(analysed, mono),
            joins_s=joins_s,
            source_vector=reference.vector,
            vector=self._embed(self._descriptors, made.audio),
            prompt=self._adherence(made.audio, prompt),
            on_step=self._check_stop,
        )
        rating = self._rating(made.audio)
        ranked = rank(scores, gates, rating, made.loop)
        own = {"rank": round(ranked, DIGITS), **({"rating": rating} if rating else {})}
        return Verdict(
            failed=tuple(failed_gates(scores, gates, reference.collapsed_share)),
            rank=ranked,
            similarity=scores.similarity,
            scores=scores.as_json() | own,
            sound=analysed.fingerprint,
        )

    def _adherence(self, made: Audio, prompt: str) -> float | None:
        """Cosine of the vectors of a sound and its prompt; None if there is no prompt, or no model for it."""
        if not prompt or (by_text := self._text_embedder) is None:
            return None
        return cosine(self._embed(by_text, made), by_text.embed_texts([prompt])[0])

    def _rating(self, made: Audio) -> dict[str, float]:
        """A model's ratings by axis, rounded; empty if the configuration has no such model."""
        if (rater := self.engines.rater()) is None:
            return {}
        rated = rater.rate(made, should_stop=self.should_stop)
        return {axis: round(value, DIGITS) for axis, value in rated.items()}

    def sound(self, made: Audio) -> Bits:
        self._check_stop()
        return analyse(made)[0].fingerprint

    def shared(self, one: Bits, other: Bits) -> float:
        return shared_share(one, other)


def failed_gates(scores: Scores, gates: Gates, collapsed_share: float) -> Iterator[str]:
    """The gates that a result does not pass, each in a few words.

    Args:
        collapsed_share: of the source's seconds, that are noise or a stuck tone: its variations may be, too.
    """
    if gates.max_silence is not None and scores.silent_share > gates.max_silence:
        yield f"{scores.silent_share:.0%} of it is silence"
    for share, what in ((scores.noise_share, "noise"), (scores.stuck_share, "a tone that does not change")):
        if share > COLLAPSED_SHARE + collapsed_share:
            yield f"{share:.0%} of it is {what}"
    if gates.same_tempo and scores.tempo_agrees is False:
        yield f"its tempo is {scores.tempo_ratio:.2f} times that of the source"
    if gates.same_key and scores.key_agreement is not None and scores.key_agreement < FOREIGN_KEY:
        yield f"its key is {scores.key}"
    if gates.max_copied is not None and scores.copy_share > gates.max_copied:
        yield f"{scores.copy_share:.0%} of it is a copy of the source"
    if gates.similarity is not None and not gates.similarity[0] <= scores.similarity <= gates.similarity[1]:
        yield f"its similarity to the source is {scores.similarity:.2f}"


def rank(
    scores: Scores,
    gates: Gates,
    rating: Mapping[str, float] = NOT_RATED,
    loop: Mapping[str, Any] | None = None,
) -> float:
    """The mean of all merits, 0 to 1; `loop`: of a loop, the facts on its seam."""
    return float(np.mean(list(_merits(scores, gates, rating, loop))))


def _merits(
    scores: Scores, gates: Gates, rating: Mapping[str, float], loop: Mapping[str, Any] | None
) -> Iterator[float]:
    """What the rank is the mean of, 0 to 1 each; what can't be measured is left out."""
    low, high = gates.similarity or USUAL_BAND
    outside = max(low - scores.similarity, scores.similarity - high, 0.0)
    yield scores.similarity
    yield max(0.0, 1.0 - outside / BAND_EDGE)
    if scores.key_agreement is not None:
        yield scores.key_agreement
    if scores.tempo_agrees is not None:
        yield float(scores.tempo_agrees)
    yield scores.worst_seam.quality
    yield float(np.mean([seam.quality for seam in scores.joins])) if scores.joins else 1.0
    if loop is not None:
        yield min(max(loop["similarity"], 0.0), 1.0)
    yield 1.0 - max(scores.silent_share, scores.noise_share, scores.stuck_share, scores.clipped_share)
    if scores.prompt is not None:
        yield max(0.0, scores.prompt)
    if rating:
        mean = float(np.mean([rating[axis] for axis in RATED_AXES]))
        yield min(max((mean - WORST_RATING) / (BEST_RATING - WORST_RATING), 0.0), 1.0)
