"""Expands an entry of `generate.variations`, whose parameters may each have several values.

A parameter has one value, a list of values, or a range: `{low, high, steps}` is `steps` evenly spaced values,
`{low, high}` is for random draws. `expand` says how the values are combined: every combination (`grid`), the
first values together, then the second (`zip`), or `{random: n, seed: s}`, which draws n combinations.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.engines.base import EngineCard, Params

Duration = Annotated[float, Field(ge=0.1, le=3600)] | Literal["source"]

MOST = 1000  # combinations of one entry
DIGITS = 6  # after the point, of values in a range


class SharedParams(Params):
    """What an entry may say whatever the engine, and may sweep."""

    similarity: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="how close it stays to its source, 1 being closest; sets the engine's own parameters"
        " (see docs/engines.md), where the entry doesn't",
    )
    duration_s: Duration | None = Field(
        default=None, description="seconds, or `source`; null: as `generate.duration_s` says"
    )
    transpose: int = Field(
        default=0, ge=-12, le=12, description="semitones by which the source is moved before anything is made"
    )
    speed: float = Field(
        default=1.0, ge=0.5, le=2.0, description="factor of the source's tempo; the key stays"
    )


class Random(BaseModel):
    """Combinations drawn at random: from lists with equal chances, from ranges evenly."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    random: Annotated[int, Field(ge=1, le=1000)]  # how many
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Range(BaseModel):
    """The values between two, both of which belong to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    low: int | float
    high: int | float
    steps: Annotated[int, Field(ge=2, le=1000)] | None = None

    def at(self, share: float, *, is_whole: bool) -> int | float:
        value = self.low + share * (self.high - self.low)
        return round(value) if is_whole else round(value, DIGITS)

    def spaced(self, *, is_whole: bool) -> list[int | float]:
        """The evenly spaced values, without repeats.

        Raises:
            ValueError: the number of steps is missing.
        """
        if self.steps is None:
            raise ValueError("a range needs steps, unless its values are drawn: expand: {random: n}")
        shares = (step / (self.steps - 1) for step in range(self.steps))
        return list(dict.fromkeys(self.at(share, is_whole=is_whole) for share in shares))


Expand = Literal["grid", "zip"] | Random


@dataclass(frozen=True)
class Combination:
    """One value for every parameter."""

    given: Mapping[str, Any]  # the engine's parameters that the entry says itself
    similarity: float | None
    duration_s: float | Literal["source"] | None
    change: Mapping[str, Any]  # of the source: its `transpose` and `speed`, if they are not the defaults


def choices(value: Any) -> list[Any] | Range:
    """The values that a parameter of an entry may take.

    Raises:
        ValidationError: it is a mapping, but not a range.
    """
    if isinstance(value, dict):
        return Range.model_validate(value)
    return value if isinstance(value, list) else [value]


def expand(entry: Mapping[str, Any], how: Expand, card: EngineCard) -> list[Combination]:
    """The combinations of an entry's parameters for one engine.

    What stands in the engine's section replaces what stands beside it. Parameters of other engines are left
    out: they must not change what this one makes.

    Raises:
        ValueError: the values can't be combined as `how` says.
    """
    known = {**SharedParams.model_fields, **card.params.model_fields}
    own = {name: value for name, value in entry.items() if name in known} | entry.get(card.name, {})
    axes = {name: choices(value) for name, value in own.items()}
    whole = {name for name, field in known.items() if field.annotation is int}
    return [_combination(given, card) for given in _combine(axes, how, whole)]


def _combine(axes: Mapping[str, list[Any] | Range], how: Expand, whole: set[str]) -> Iterator[dict[str, Any]]:
    """The values of each combination; `whole`: the parameters that are whole numbers."""
    if isinstance(how, Random):
        rng = random.Random(how.seed)  # only its method `random` gives the same numbers in every version
        for _ in range(how.random):
            yield {name: _draw(axis, rng.random(), is_whole=name in whole) for name, axis in axes.items()}
        return
    values = {
        name: axis.spaced(is_whole=name in whole) if isinstance(axis, Range) else axis
        for name, axis in axes.items()
    }
    if how == "grid" and (n := math.prod(map(len, values.values()))) > MOST:
        raise ValueError(f"these are {n} combinations; {MOST} are the most")
    rows = itertools.product(*values.values()) if how == "grid" else _rows(values)
    yield from (dict(zip(values, row, strict=True)) for row in rows)


def _draw(axis: list[Any] | Range, share: float, *, is_whole: bool) -> Any:
    return axis.at(share, is_whole=is_whole) if isinstance(axis, Range) else axis[int(share * len(axis))]


def _rows(values: Mapping[str, list[Any]]) -> Iterator[tuple[Any, ...]]:
    """One value of each at a time; a single value is repeated."""
    lengths = {len(several) for several in values.values()} - {1}
    if len(lengths) > 1:
        listed = " and ".join(str(length) for length in sorted(lengths))
        raise ValueError(f"zip needs lists of one length, not of {listed} values")
    n_rows = max(lengths, default=1)
    return zip(*(several * (n_rows // len(several)) for several in values.values()), strict=True)


def _combination(given: Mapping[str, Any], card: EngineCard) -> Combination:
    shared = SharedParams.model_validate({k: v for k, v in given.items() if k in SharedParams.model_fields})
    own = {name: value for name, value in given.items() if name in card.params.model_fields}
    change = shared.model_dump(include={"transpose", "speed"}, exclude_defaults=True)
    return Combination(own, shared.similarity, shared.duration_s, change)


def complete_params(card: EngineCard, given: Mapping[str, Any], similarity: float | None) -> dict[str, Any]:
    """An engine's parameters: those given, those that give a result this similarity, and defaults."""
    by_similarity = {}
    if similarity is not None and card.params_of_similarity is not None:
        by_similarity = card.params_of_similarity(similarity)
    return card.params.model_validate({**by_similarity, **given}).model_dump(mode="json")
