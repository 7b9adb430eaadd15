"""What there is to do for a track: its units of work, each under a key of all that goes into it.

A unit's key is the SHA-256 of the canonical JSON of its inputs, with the key of the stage before
among them. So a changed parameter changes just the keys downstream of it, and finding a key in
the store means that the work is done.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pipeline.config import Config, Generate, VariationSpec
from pipeline.engines.base import EngineCard
from pipeline.engines.selection import Choice
from pipeline.stages import NORMALIZE_VERSION, OUTPUT_VERSION

BYTES_PER_SAMPLE = {16: 2, 24: 3, "float": 4}
UNKNOWN_DURATION_S = 300.0  # what a result "as long as the source" is taken for before that is known


@dataclass(frozen=True)
class PlannedVariation:
    """One variation of the expanded configuration, the same for every track."""

    index: int  # 1-based: the number in the file's name
    name: str
    duration_s: float | Literal["source"]
    seed: int | None  # None: derived from the track's content
    occurrence: int  # how many earlier ones have the same name and parameters
    params: Mapping[str, Any]  # the engine's, complete with defaults

    @property
    def file(self) -> str:
        return f"variations/{self.index:02d}-{self.name}.wav"


@dataclass(frozen=True)
class VariationUnit:
    """One variation of one track."""

    key: str
    file: str  # below the track's folder in the outbox
    name: str
    seed: int
    duration_s: float | Literal["source"]
    params: Mapping[str, Any]


@dataclass(frozen=True)
class TrackPlan:
    """All units of one track."""

    sha256: str
    normalize_key: str
    embed_key: str
    variations: tuple[VariationUnit, ...]

    @property
    def key(self) -> str:
        """Equal for two plans if and only if the outbox would look the same."""
        return digest([self.embed_key, *([unit.key, unit.file] for unit in self.variations)])


@dataclass(frozen=True)
class Recipe:
    """A configuration with its engines chosen: from a track's hash to the track's plan."""

    config: Config
    embedder: Choice
    generator: Choice

    @cached_property
    def result_bytes(self) -> float:
        """What one track's results take on the disk, about: stereo, at the rate of the normalized audio."""
        per_second = self.config.normalize.sample_rate * 2 * BYTES_PER_SAMPLE[self.config.output.bit_depth]
        planned = plan_variations(self.config.generate, self.generator.card)
        durations = [UNKNOWN_DURATION_S if one.duration_s == "source" else one.duration_s for one in planned]
        return per_second * sum(durations)

    def plan(self, sha256: str) -> TrackPlan:
        normalize = digest(
            ["normalize", NORMALIZE_VERSION, sha256, self.config.normalize.model_dump(mode="json")]
        )
        embed = digest(["embed", normalize, _engine_identity(self.embedder)])
        made_by = [
            _engine_identity(self.generator),
            OUTPUT_VERSION,
            self.config.output.model_dump(mode="json"),
        ]
        units = []
        for planned in plan_variations(self.config.generate, self.generator.card):
            seed = derived_seed(sha256, planned) if planned.seed is None else planned.seed
            inputs = ["generate", normalize, made_by, planned.name, planned.params, planned.duration_s, seed]
            key = digest(inputs)
            units.append(
                VariationUnit(key, planned.file, planned.name, seed, planned.duration_s, planned.params)
            )
        return TrackPlan(sha256, normalize, embed, tuple(units))


def plan_variations(generate: Generate, card: EngineCard) -> list[PlannedVariation]:
    """Expand sweeps (a list as a parameter: the product of all lists) and counts.

    A given seed counts up over the repeats of its entry; they would all be the same sound
    otherwise. Parameters that the engine doesn't have are left out: they belong to another engine
    of the same configuration and must not make this one's work look different.
    """
    planned: list[PlannedVariation] = []
    seen: Counter[str] = Counter()
    for spec in generate.variations:
        repeats = ((params, spec.count) for params in _sweep(spec, card))
        for n, params in enumerate(p for p, count in repeats for _ in range(count)):
            identity = digest([spec.name, params])
            planned.append(
                PlannedVariation(
                    index=len(planned) + 1,
                    name=spec.name,
                    duration_s=generate.duration_s if spec.duration_s is None else spec.duration_s,
                    seed=None if spec.seed is None else (spec.seed + n) % 2**63,
                    occurrence=seen[identity],
                    params=params,
                )
            )
            seen[identity] += 1
    return planned


def derived_seed(sha256: str, planned: PlannedVariation) -> int:
    """A seed of the track's content and the variation's own entry.

    Its place in the list doesn't count, so that an entry put before it leaves its sound alone.
    """
    return int(digest(["seed", sha256, planned.name, planned.params, planned.occurrence])[:16], 16) >> 1


def digest(value: Any) -> str:
    """SHA-256 of a JSON value's canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sweep(spec: VariationSpec, card: EngineCard) -> Iterator[dict[str, Any]]:
    extra = spec.model_extra or {}
    mine = {key: value for key, value in extra.items() if key in card.params.model_fields}
    choices = [value if isinstance(value, list) else [value] for value in mine.values()]
    for combination in itertools.product(*choices):
        given = dict(zip(mine, combination, strict=True))
        yield card.params.model_validate(given).model_dump(mode="json")


def _engine_identity(choice: Choice) -> list[str | None]:
    """Where the weights lie doesn't matter when their revision is a fingerprint of them."""
    by_content = (choice.revision or "").startswith("sha256:")
    return [choice.card.name, choice.card.version, None if by_content else choice.model, choice.revision]
