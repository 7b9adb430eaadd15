"""The plan of a track: its units of work, each with a key made of everything that the result depends on.

A unit's key is the SHA-256 of the canonical JSON of its inputs, one of which is the key of the
stage before. So a changed parameter changes only the keys of later stages, and a key that is
found in the store means that the work is done.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pipeline.config import Config, Generate
from pipeline.config.sweeps import expand
from pipeline.engines.base import EngineCard
from pipeline.engines.selection import Choice
from pipeline.fs.names import file_safe
from pipeline.records import Audio
from pipeline.stages import NORMALIZE_VERSION, OUTPUT_VERSION

BYTES_PER_SAMPLE = {16: 2, 24: 3, "float": 4}
UNKNOWN_DURATION_S = 300.0  # assumed for results as long as the source until that is decoded


@dataclass(frozen=True)
class PlannedVariation:
    """One variation of the expanded configuration, the same for every track."""

    file: str  # below the track's folder in the outbox
    name: str
    duration_s: float | Literal["source"]
    seed: int | None  # None: derived from the track's content
    occurrence: int  # how many earlier variations have the same name and parameters
    params: Mapping[str, Any]  # the engine's parameters, complete with defaults
    similarity: float | None  # to the source, as asked; `params` says how


@dataclass(frozen=True)
class VariationUnit(PlannedVariation):
    """One variation of one track."""

    key: str
    seed: int

    def length_s(self, source: Audio) -> float:
        """Its length for the normalized source."""
        return source.duration_s if self.duration_s == "source" else self.duration_s


@dataclass(frozen=True)
class TrackPlan:
    """All units of one track."""

    sha256: str
    normalize_key: str
    embed_key: str
    variations: tuple[VariationUnit, ...]

    @property
    def keys(self) -> list[str]:
        """The keys of all results that are published."""
        return [self.embed_key, *(unit.key for unit in self.variations)]

    @property
    def key(self) -> str:
        """Equal for two plans if and only if they give the same files in the outbox."""
        return digest([self.embed_key, *([unit.key, unit.file] for unit in self.variations)])


@dataclass(frozen=True)
class Recipe:
    """A configuration with its engines chosen; makes the plan of a track from its hash."""

    config: Config
    embedder: Choice
    generator: Choice

    @cached_property
    def result_bytes(self) -> float:
        """An estimate of the size of one track's results, no less than that: stereo WAV files."""
        output = self.config.output
        rate = output.sample_rate or self.config.normalize.sample_rate
        per_second = rate * 2 * BYTES_PER_SAMPLE[output.bit_depth]
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
        for planned in plan_variations(self.config.generate, self.generator.card, self.config.output.format):
            seed = derived_seed(sha256, planned) if planned.seed is None else planned.seed
            inputs = ["generate", normalize, made_by, planned.name, planned.params, planned.duration_s, seed]
            units.append(VariationUnit(**{**vars(planned), "seed": seed}, key=digest(inputs)))
        return TrackPlan(sha256, normalize, embed, tuple(units))


def plan_variations(generate: Generate, card: EngineCard, ending: str = "wav") -> list[PlannedVariation]:
    """Expand the entries, see `pipeline.config.sweeps`, and their counts.

    A given seed counts up over the repeats of its entry, which would all sound the same otherwise. A
    variation that equals an earlier one in everything, a given seed included, is left out.
    """
    planned: list[PlannedVariation] = []
    seen: Counter[str] = Counter()
    given: set[tuple[str, int, float | str]] = set()
    for spec in generate.variations:
        combinations = expand(spec.model_extra or {}, spec.expand, card)
        for n, made in enumerate(made for made in combinations for _ in range(spec.count)):
            identity = digest([spec.name, made.params])
            duration_s = generate.duration_s if made.duration_s is None else made.duration_s
            seed = None if spec.seed is None else (spec.seed + n) % 2**63
            if seed is not None:
                if (identity, seed, duration_s) in given:
                    continue
                given.add((identity, seed, duration_s))
            file = f"variations/{len(planned) + 1:02d}-{file_safe(spec.name)}.{ending}"
            planned.append(
                PlannedVariation(
                    file, spec.name, duration_s, seed, seen[identity], made.params, made.similarity
                )
            )
            seen[identity] += 1
    return planned


def derived_seed(sha256: str, planned: PlannedVariation) -> int:
    """A seed derived from the track's content and the variation's entry.

    It does not depend on the place in the list, so that a new entry leaves the sound of the others alone.
    """
    return int(digest(["seed", sha256, planned.name, planned.params, planned.occurrence])[:16], 16) >> 1


def digest(value: Any) -> str:
    """SHA-256 of a JSON value's canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _engine_identity(choice: Choice) -> list[str | None]:
    """The location of the weights does not count if their revision is a fingerprint of their content."""
    by_content = (choice.revision or "").startswith("sha256:")
    return [choice.card.name, choice.card.version, None if by_content else choice.model, choice.revision]
