"""A claimed track on its way through the stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import EngineFailure
from pipeline.plan import TrackPlan, VariationUnit
from pipeline.records import Audio, VariationRequest
from pipeline.store.schema import Track
from pipeline.workspace import Scratch

RESULT_CHECK = "outbox"  # recorded as the stage of a failure while existing results are checked


@dataclass
class Job:
    """One track, its plan, and what is finished of it."""

    track: Track
    plan: TrackPlan
    scratch: Scratch
    normalized: dict[str, Any] = field(default_factory=dict)  # the record of the finished unit, or empty
    embedding: dict[str, Any] = field(default_factory=dict)  # likewise
    variations: dict[str, dict[str, Any]] = field(default_factory=dict)  # finished units' records, by key
    attempt: int | None = None  # id of the open attempt
    stage: str = RESULT_CHECK  # the stage that runs now
    over: bool = False  # done, failed or queued again

    @property
    def missing(self) -> list[VariationUnit]:
        return [unit for unit in self.plan.variations if unit.key not in self.variations]

    def audio(self) -> Audio:
        """The normalized audio, mapped from the state folder."""
        loaded = self.scratch.load_normalized(self.plan.normalize_key, self.normalized["sample_rate"])
        if loaded is None:
            raise EngineFailure("the normalized audio has disappeared from the state folder")
        return loaded

    def request(self, unit: VariationUnit, source: Audio) -> VariationRequest:
        return VariationRequest(
            request_id=unit.key,
            track_id=self.track.sha256,
            audio=source,
            duration_s=source.duration_s if unit.duration_s == "source" else unit.duration_s,
            seed=unit.seed,
            params=unit.params,
        )
