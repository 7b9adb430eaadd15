"""What an entry of the configuration expands to, for each engine."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Config
from pipeline.config.sweeps import Combination, complete_params, expand
from pipeline.engines import cards

REMIX, MUSICGEN, AUDIOCRAFT = cards()["remix"], cards()["musicgen"], cards()["audiocraft"]


def expanded(entry: dict[str, Any], card: Any = MUSICGEN) -> list[Combination]:
    """By the way of the configuration, as a user's file comes."""
    [spec] = Config.model_validate({"generate": {"variations": [{"name": "a", **entry}]}}).generate.variations
    return expand(spec.model_extra or {}, spec.expand, card)


def params(entry: dict[str, Any], card: Any = MUSICGEN) -> list[dict[str, Any]]:
    return [complete_params(card, made.given, made.similarity) for made in expanded(entry, card)]


def values(entry: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(made[name] for name in names) for made in params(entry)]


def test_a_grid_has_every_combination_in_the_order_of_the_file() -> None:
    entry = {"temperature": [0.8, 1.0], "top_k": [50, 100], "guidance": 4.0}
    assert values(entry, "temperature", "top_k", "guidance") == [
        (0.8, 50, 4.0), (0.8, 100, 4.0), (1.0, 50, 4.0), (1.0, 100, 4.0),
    ]  # fmt: skip


def test_zip_takes_the_lists_together_and_repeats_single_values() -> None:
    entry = {"expand": "zip", "temperature": [0.8, 1.0], "top_k": [50, 100], "guidance": 4.0}
    assert values(entry, "temperature", "top_k", "guidance") == [(0.8, 50, 4.0), (1.0, 100, 4.0)]


def test_a_range_has_evenly_spaced_values_and_whole_ones_without_repeats() -> None:
    assert values({"temperature": {"low": 0.7, "high": 1.0, "steps": 4}}, "temperature") == [
        (0.7,), (0.8,), (0.9,), (1.0,),
    ]  # fmt: skip
    assert values({"temperature": {"low": 0, "high": 1, "steps": 3}}, "temperature") == [
        (0.0,),
        (0.5,),
        (1.0,),
    ]
    assert values({"top_k": {"low": 1, "high": 3, "steps": 9}}, "top_k") == [(1,), (2,), (3,)]


def test_random_draws_from_lists_and_ranges_depend_on_their_seed_alone() -> None:
    entry = {
        "temperature": {"low": 0.5, "high": 1.5},
        "top_k": [50, 100],
        "expand": {"random": 40, "seed": 7},
    }

    made = values(entry, "temperature", "top_k")

    assert made == values(entry, "temperature", "top_k")
    assert made != values({**entry, "expand": {"random": 40, "seed": 8}}, "temperature", "top_k")
    assert len({temperature for temperature, _ in made}) > 30
    assert all(0.5 <= temperature <= 1.5 for temperature, _ in made)
    assert {top_k for _, top_k in made} == {50, 100}


def test_an_engines_section_wins_over_what_stands_flat_and_is_for_that_engine_alone() -> None:
    entry = {"temperature": 0.9, "musicgen": {"temperature": [1.1, 1.3], "top_k": 100}, "crossfade_ms": 60.0}

    assert values(entry, "temperature", "top_k") == [(1.1, 100), (1.3, 100)]
    [of_remix] = params(entry, REMIX)
    assert (of_remix["temperature"], of_remix["crossfade_ms"]) == (0.9, 60.0)


@pytest.mark.parametrize("card", [REMIX, MUSICGEN, AUDIOCRAFT])
def test_similarity_sets_an_engines_own_parameters_unless_the_entry_does(card: Any) -> None:
    near, far = params({"similarity": [0.9, 0.1]}, card)
    assert near["temperature"] < far["temperature"]

    [own] = params({"similarity": 0.9, "temperature": 1.7}, card)
    assert own == {**near, "temperature": 1.7}


def test_every_similarity_gives_valid_parameters_of_every_generator_that_has_the_dial() -> None:
    dials = [card for card in cards().values() if card.params_of_similarity]
    assert {card.name for card in dials} == {"remix", "musicgen", "audiocraft"}
    for card in dials:
        for step in range(101):
            card.params.model_validate(card.params_of_similarity(step / 100), strict=True)


def test_durations_may_be_swept_too() -> None:
    assert [made.duration_s for made in expanded({"duration_s": [10.0, "source"]})] == [10.0, "source"]


def test_key_and_tempo_of_the_source_may_be_swept_too_and_defaults_are_no_change() -> None:
    made = expanded({"transpose": [-2, 0], "speed": [1, 1.1]})
    assert [one.change for one in made] == [
        {"transpose": -2}, {"transpose": -2, "speed": 1.1}, {}, {"speed": 1.1},
    ]  # fmt: skip
    made = expanded({"transpose": {"low": -1, "high": 1, "steps": 5}})
    assert [one.change.get("transpose", 0) for one in made] == [-1, 0, 1]  # whole semitones
