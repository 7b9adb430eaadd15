"""The plan of a track: its units of work, each with a key made of everything that the result depends on.

A unit's key is the SHA-256 of the canonical JSON of its inputs, one of which is the key of the
stage before. So a changed parameter changes only the keys of later stages, and a key that is
found in the store means that the work is done.

One thing is not in a variation's key: the other variations of the track, which its sound must differ from
(`gates.max_shared`). A seed that gives way to another because of them is not made anew when they change.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from pipeline.config import Config, Gates
from pipeline.config.sweeps import complete_params, expand
from pipeline.engines.base import EngineCard
from pipeline.engines.selection import Choice
from pipeline.fs.names import file_safe
from pipeline.music import PROMPT_VERSION
from pipeline.records import Audio
from pipeline.stages import CHANGE_VERSION, NORMALIZE_VERSION, OUTPUT_VERSIONS

BYTES_PER_SAMPLE = {16: 2, 24: 3, "float": 4}
AUTO_PROMPT = "auto"  # a prompt made of words from the track's analysis
UNKNOWN_DURATION_S = 300.0  # assumed for results as long as the source until that is decoded


@dataclass(frozen=True, kw_only=True)
class PlannedVariation:
    """One variation of the expanded configuration, the same for every track."""

    file: str  # below the track's folder in the outbox
    name: str
    duration_s: float | Literal["source"]
    seed: int | None  # of its first take; None: derived from the track's content
    occurrence: int  # how many earlier takes have the same name and parameters
    given: Mapping[str, Any] = field(compare=False)  # the engine's parameters that the entry says itself
    params: Mapping[str, Any]  # the engine's parameters, complete
    similarity: float | None  # to the source, as asked; `params` says how
    change: Mapping[str, Any]  # of the source before: its `transpose` and `speed`, if there are any
    gates: Gates
    kept: int  # it is one of so many results
    tried: int  # chosen among so many takes, of which `seed` and `occurrence` are the first's
    place: int  # 0: the best of those that are kept

    @property
    def made_s(self) -> float:
        """An estimate of the seconds of sound that are made for it: its share of all takes."""
        length_s = UNKNOWN_DURATION_S if self.duration_s == "source" else self.duration_s
        return length_s * self.tried / self.kept


@dataclass(frozen=True)
class Take:
    """One attempt at the sound of a variation."""

    key: str  # of the unit of work: made of everything that the sound depends on
    seed: int
    params: Mapping[str, Any]
    similarity: float | None  # the dial, by which `params` were made
    change: Mapping[str, Any]  # of the source: see `PlannedVariation`

    def facts(self) -> dict[str, Any]:
        """What a request's result depends on beside the track, for the manifest."""
        dial = {} if self.similarity is None else {"similarity": self.similarity}
        return {"seed": self.seed, **dial, **self.change, "params": dict(self.params)}


@dataclass(frozen=True, kw_only=True)
class VariationUnit(PlannedVariation):
    """One variation of one track."""

    key: str
    seed: int
    source: str  # key of the audio that it is made from: the normalized audio, or that with its change
    sound: str  # digest of what all its takes have in common
    takes: tuple[Take, ...]  # the first ones; more are made in place of those that fail the gates

    @property
    def group(self) -> tuple[str, ...]:
        """Equal for the variations that are chosen among the same takes."""
        return tuple(take.key for take in self.takes)

    def length_s(self, source: Audio) -> float:
        """Its length; `source`: the audio that it is made from."""
        return source.duration_s if self.duration_s == "source" else self.duration_s


@dataclass(frozen=True)
class TrackPlan:
    """All units of one track."""

    sha256: str
    normalize_key: str
    embed_key: str
    variations: tuple[VariationUnit, ...]
    vectors_key: str  # of the variations' embedding; empty: they are not embedded

    @property
    def keys(self) -> list[str]:
        """The keys of all results that are published."""
        return [self.embed_key, *(unit.key for unit in self.variations), *self._vectors]

    @property
    def key(self) -> str:
        """Equal for two plans if and only if they give the same files in the outbox."""
        files = ([unit.key, unit.file] for unit in self.variations)
        return digest([self.embed_key, *files, *self._vectors])

    @property
    def _vectors(self) -> list[str]:
        return [self.vectors_key] if self.vectors_key else []


@dataclass(frozen=True)
class Recipe:
    """A configuration with its engines chosen; makes the plan of a track from its hash."""

    config: Config
    embedder: Choice
    generator: Choice
    rater: Choice | None = None  # of takes; None: scores alone rank them

    @property
    def engines(self) -> dict[str, Choice]:
        """The engines that there are, by stage."""
        found = {"embed": self.embedder, "generate": self.generator}
        return found | ({"judge": self.rater} if self.rater else {})

    @cached_property
    def result_bytes(self) -> float:
        """An estimate of the size of one track's results and takes: stereo WAV files."""
        output = self.config.output
        rate = output.sample_rate or self.config.normalize.sample_rate
        per_second = rate * 2 * BYTES_PER_SAMPLE[output.bit_depth]
        return per_second * sum(one.made_s for one in self.planned)

    @cached_property
    def planned(self) -> list[PlannedVariation]:
        """The variations of each track."""
        return plan_variations(self.config, self.generator.card)

    @cached_property
    def key(self) -> str:
        """Equal for two recipes if and only if they give the same plans."""
        return self.plan("").key

    def plan(self, sha256: str) -> TrackPlan:
        normalize = digest(
            ["normalize", NORMALIZE_VERSION, sha256, self.config.normalize.model_dump(mode="json")]
        )
        embed = digest(["embed", normalize, identity_of(self.embedder)])
        made_by = [
            identity_of(self.generator),
            OUTPUT_VERSIONS[self.config.output.format],
            self.config.output.model_dump(mode="json"),
        ]
        rated_by = [identity_of(self.rater)] if self.rater else []
        units: list[VariationUnit] = []
        for planned in self.planned:
            words = [PROMPT_VERSION, embed] if planned.params.get("prompt") == AUTO_PROMPT else []
            change = planned.change
            source = digest(["change", CHANGE_VERSION, normalize, change]) if change else normalize
            sound = digest(["take", source, made_by, planned.name, planned.duration_s, words])
            takes = tuple(
                make_take(sound, _seed(sha256, planned, n), planned.params, planned.similarity, change)
                for n in range(planned.tried)
            )
            known = {**vars(planned), "seed": takes[0].seed}
            unit = VariationUnit(**known, key="", source=source, sound=sound, takes=takes)
            gates = planned.gates.model_dump(mode="json", exclude={"rejected"})
            key = digest(["generate", unit.group, unit.kept, unit.place, gates, *rated_by])
            units.append(replace(unit, key=key))
        if self.config.output.album:  # then the loudness of each depends on all
            units = [replace(unit, key=digest([unit.key, *(other.key for other in units)])) for unit in units]
        vectors = ["embed variations", identity_of(self.embedder), [unit.key for unit in units]]
        vectors_key = digest(vectors) if self.config.embed.variations else ""
        return TrackPlan(sha256, normalize, embed, tuple(units), vectors_key)


def plan_variations(config: Config, card: EngineCard) -> list[PlannedVariation]:
    """Expand the entries, see `pipeline.config.sweeps`, and their counts.

    A given seed counts up over the takes of its entry, which would all sound the same otherwise. A
    variation that equals an earlier one in everything, a given seed included, is left out.
    """
    planned: list[PlannedVariation] = []
    ending = config.output.format
    seen: Counter[str] = Counter()
    given_seeds: set[tuple[str, int, float | str]] = set()
    for spec in config.generate.variations:
        kept, tried = spec.best_of
        combinations = expand(spec.model_extra or {}, spec.expand, card)
        for n, made in enumerate(made for made in combinations for _ in range(spec.count)):
            params = complete_params(card, made.given, made.similarity)
            identity = digest([spec.name, {**params, **made.change}])
            duration_s = config.generate.duration_s if made.duration_s is None else made.duration_s
            seed = None if spec.seed is None else (spec.seed + n * tried) % 2**63
            if seed is not None:
                if (identity, seed, duration_s) in given_seeds:
                    continue
                given_seeds.add((identity, seed, duration_s))
            for place in range(kept):
                planned.append(
                    PlannedVariation(
                        file=f"variations/{len(planned) + 1:02d}-{file_safe(spec.name)}.{ending}",
                        name=spec.name,
                        duration_s=duration_s,
                        seed=seed,
                        occurrence=seen[identity],
                        given=made.given,
                        params=params,
                        similarity=made.similarity,
                        change=made.change,
                        gates=config.gates.of(spec.gates),
                        kept=kept,
                        tried=tried,
                        place=place,
                    )
                )
            seen[identity] += tried
    return planned


def make_take(
    sound: str, seed: int, params: Mapping[str, Any], similarity: float | None, change: Mapping[str, Any]
) -> Take:
    """A take with the sound of these parameters and this seed; `sound`: see `VariationUnit`."""
    return Take(digest([sound, params, seed]), seed, params, similarity, change)


def _seed(sha256: str, planned: PlannedVariation, n: int) -> int:
    """The seed of the n-th take: counted up, or derived from the track's content and the variation's entry.

    A derived one does not depend on the place in the list, so that a new entry leaves the sound of the others
    alone.
    """
    if planned.seed is not None:
        return (planned.seed + n) % 2**63
    params = {**planned.params, **planned.change}
    return seed_from(["seed", sha256, planned.name, params, planned.occurrence + n])


def seed_from(value: Any) -> int:
    """A seed that depends on a JSON value: 0 <= seed < 2**63."""
    return int(digest(value)[:16], 16) >> 1


def digest(value: Any) -> str:
    """SHA-256 of a JSON value's canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def engine_identity(name: str, version: str, model: str | None, revision: str | None) -> list[str | None]:
    """What stands for an engine in keys: equal for engines whose results can be compared.

    The location of the weights does not count if their revision is a fingerprint of their content.
    """
    by_content = (revision or "").startswith("sha256:")
    return [name, version, None if by_content else model, revision]


def identity_of(choice: Choice) -> list[str | None]:
    """See `engine_identity`."""
    return engine_identity(choice.card.name, choice.card.version, choice.model, choice.revision)
