"""Which takes of a variation are made, and which of them are kept.

`keep: best n of m` makes m takes with different seeds. Of those that pass the gates, the n with the highest
rank are kept; without `keep` there is one take, n = m = 1. Two results of a track that share too much of
their sound at the same time are not both kept: the later one in the plan gives way. If too few are left,
others are made with further seeds, up to the limit of retries. If there are still too few then, those that
fail the fewest gates are kept, and the manifest says so.

A take that misses the band of similarity moves the dial of the next one by as much as it missed the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.sweeps import complete_params
from pipeline.engines.base import EngineCard
from pipeline.errors import NoResult
from pipeline.plan import Take, VariationUnit, make_take, seed_from

Shared = Callable[["JudgedTake", "JudgedTake"], float]  # share of the sound of two takes at the same time


@dataclass(frozen=True, eq=False)
class JudgedTake:
    """A take that was made, and what was found about it."""

    take: Take
    failed: tuple[str, ...]  # the gates that it fails, each in a few words
    rank: float  # the higher, the better
    similarity: float | None  # to the source, as measured
    sound: Any = None  # what `Shared` compares; None: it has no sound
    record: Mapping[str, Any] = field(default_factory=dict)  # for the manifest
    is_with_worker: bool = False  # its sound; otherwise it is held in the state folder, or published already
    began: float | None = None  # when its making began; None: its seconds are recorded already


@dataclass(eq=False)
class TakeChoice:
    """The choice of the variations of one group among their takes."""

    units: tuple[VariationUnit, ...]  # best first
    earlier: tuple[TakeChoice, ...]  # those of the track from whose variations these must differ
    card: EngineCard
    shared: Shared
    asked: list[Take] = field(default_factory=list)  # in the order in which they count
    judged: dict[str, JudgedTake] = field(default_factory=dict)  # by their keys
    kept: tuple[str, ...] | None = None  # the key of each unit's take; None: not decided yet
    faults: dict[str, tuple[str, ...]] = field(default_factory=dict)  # why each judged take isn't a good one

    def __post_init__(self) -> None:
        self.asked = list(self.units[0].takes)

    @property
    def missing(self) -> list[Take]:
        """The takes that were asked for and aren't judged yet; none once it is decided."""
        return [take for take in self.asked if take.key not in self.judged] if self.kept is None else []

    @property
    def kept_takes(self) -> list[JudgedTake]:
        """The take of each unit; none as long as it isn't decided."""
        return [self.judged[key] for key in self.kept or ()]

    def decide(self) -> None:
        """Keep takes, or ask for more, once all are judged and all earlier choices are made.

        Raises:
            NoResult: not enough takes have a sound.
        """
        if self.kept is not None or self.missing or any(other.kept is None for other in self.earlier):
            return
        first, good = self.units[0], self._good()
        retries = first.gates.retries - (len(self.asked) - len(first.takes))
        if n_more := min(len(self.units) - len(good), retries):
            self.asked += [self._another(len(self.asked) + n) for n in range(n_more)]
            return
        rest = [one for one in self.judged.values() if one not in good and one.sound is not None]
        rest.sort(key=lambda one: (len(self.faults[one.take.key]), self._outside_band(one), -one.rank))
        found = [*good, *rest][: len(self.units)]
        if len(found) < len(self.units):
            raise NoResult(next(fault for one in self.judged.values() for fault in one.failed))
        self.kept = tuple(one.take.key for one in found)

    def _good(self) -> list[JudgedTake]:
        """The best takes that pass the gates and differ from each other, one a unit; notes all faults."""
        order = [self.judged[take.key] for take in self.asked]
        if len(self.units[0].takes) > 1:
            order.sort(key=lambda one: -one.rank)
        good: list[JudgedTake] = []
        for one in order:
            is_needed = not one.failed and len(good) < len(self.units)
            self.faults[one.take.key] = one.failed or (self._too_alike(one, good) if is_needed else ())
            if is_needed and not self.faults[one.take.key]:
                good.append(one)
        return good

    def _outside_band(self, judged: JudgedTake) -> float:
        """How far a take's similarity is from the band that it should be in."""
        band, similarity = self.units[0].gates.similarity, judged.similarity
        if band is None or similarity is None:
            return 0.0
        return max(band[0] - similarity, similarity - band[1], 0.0)

    def _too_alike(self, judged: JudgedTake, better: Sequence[JudgedTake]) -> tuple[str, ...]:
        limit = self.units[0].gates.max_shared
        if limit is None:
            return ()
        for other in [*(one for choice in self.earlier for one in choice.kept_takes), *better]:
            share = self.shared(judged, other) if other.sound is not None else 0.0
            if share > limit:
                return (f"shares {share:.0%} of its sound with the take of seed {other.take.seed}",)
        return ()

    def _another(self, n: int) -> Take:
        """The take to make in the place of one that isn't good; `n`: how many were asked for before it."""
        first, last = self.units[0], self.judged[self.asked[-1].key]
        seed, similarity = seed_from(["retry", first.takes[0].seed, n]), last.take.similarity
        band, params = first.gates.similarity, last.take.params
        if band and similarity is not None and last.similarity is not None and self._outside_band(last):
            middle = (band[0] + band[1]) / 2
            similarity = round(min(max(similarity + middle - last.similarity, 0.0), 1.0), 3)
            params = complete_params(self.card, first.given, similarity)
        return make_take(first.sound, seed, params, similarity, first.change)


def choices(units: Sequence[VariationUnit], card: EngineCard, shared: Shared) -> list[TakeChoice]:
    """The choices of a track's variations, in the order of its plan."""
    found: list[TakeChoice] = []
    groups: dict[tuple[str, ...], list[VariationUnit]] = {}
    for unit in units:
        groups.setdefault(unit.group, []).append(unit)
    for group in groups.values():
        found.append(TakeChoice(tuple(group), tuple(found), card, shared))
    return found
