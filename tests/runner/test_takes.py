"""Which takes are asked for, and which are kept, without any sound."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Config
from pipeline.engines import cards
from pipeline.engines.selection import Choice as Engine
from pipeline.errors import EngineFailure
from pipeline.plan import Recipe, Take
from pipeline.runner.takes import JudgedTake, TakeChoice, choices


def made(gates: dict[str, Any] | None = None, shared: Any = None, **entry: Any) -> list[TakeChoice]:
    """The choices of one entry's variations; `shared` compares the sounds, which are the takes' ranks."""
    config = Config.model_validate(
        {"generate": {"variations": [{"name": "a", **entry}]}, "gates": gates or {}}
    )
    remix = Engine(cards()["remix"], None, None, "test")
    units = (
        Recipe(config, Engine(cards()["descriptors"], None, None, "test"), remix).plan("a" * 64).variations
    )
    return choices(units, remix.card, lambda a, b: shared(a.sound, b.sound) if shared else 0.0)


def judge(choice: TakeChoice, rank: float, *failed: str, similarity: float | None = None) -> Take:
    """Answer the first take that is missing."""
    take = choice.missing[0]
    choice.judged[take.key] = JudgedTake(take, failed, rank, similarity, sound=rank)
    choice.decide()
    return take


def kept_ranks(choice: TakeChoice) -> list[float]:
    return [one.rank for one in choice.kept_takes]


def test_without_keep_the_only_take_is_kept_if_it_passes() -> None:
    [choice] = made()
    judge(choice, 1.0)
    assert (kept_ranks(choice), choice.missing) == ([1.0], [])


def test_the_best_of_several_takes_are_kept_best_first() -> None:
    [choice] = made(keep="best 2 of 4")
    for rank in (0.1, 0.4, 0.2, 0.3):
        assert choice.kept is None
        judge(choice, rank)
    assert kept_ranks(choice) == [0.4, 0.3]


def test_a_take_that_fails_a_gate_is_not_kept_while_another_passes() -> None:
    [choice] = made(keep="best 1 of 3")
    judge(choice, 0.9, "is silent")
    judge(choice, 0.1)
    judge(choice, 0.2)
    assert kept_ranks(choice) == [0.2]


def test_other_seeds_are_tried_up_to_the_limit_and_then_the_least_bad_take_is_kept() -> None:
    [choice] = made(gates={"retries": 2})
    seeds = {judge(choice, rank, *failed).seed for rank, failed in
             [(0.1, ["a", "b"]), (0.2, ["a"]), (0.3, ["a", "b", "c"])]}  # fmt: skip
    assert len(seeds) == 3
    assert kept_ranks(choice) == [0.2]
    assert choice.faults[choice.kept_takes[0].take.key] == ("a",)


def test_another_take_is_of_the_same_changed_source() -> None:
    [choice] = made(gates={"retries": 1}, transpose=2)
    first = judge(choice, 0.1, "a")
    [second] = choice.missing
    assert second.change == first.change == {"transpose": 2}


def test_the_first_good_take_ends_the_retries() -> None:
    [choice] = made(gates={"retries": 5})
    judge(choice, 0.1, "a")
    judge(choice, 0.0)
    assert (kept_ranks(choice), len(choice.judged)) == ([0.0], 2)


def test_the_same_configuration_asks_for_the_same_takes() -> None:
    runs = []
    for _ in range(2):
        [choice] = made(gates={"retries": 3}, similarity=0.5)
        runs.append([judge(choice, 0.0, "a") for _ in range(4)])
    assert runs[0] == runs[1]


def test_a_take_that_shares_too_much_with_an_earlier_variation_of_its_entry_is_made_again() -> None:
    first, second = made(count=2, shared=lambda one, other: 1.0 if one == other else 0.0)
    judge(second, 0.5)
    assert second.kept is None  # the first one may yet turn out to be the same
    judge(first, 0.5)
    second.decide()
    assert second.kept is None
    assert second.faults[next(iter(second.judged))] == (
        f"shares 100% of its sound with the take of seed {first.asked[0].seed}",
    )
    judge(second, 0.7)
    assert kept_ranks(second) == [0.7]


def test_results_of_two_entries_must_differ_too() -> None:
    near, far = made(similarity=[0.6, 0.3], shared=lambda one, other: 1.0 if one == other else 0.0)
    judge(near, 0.5)
    judge(far, 0.5)
    assert (len(far.missing), far.kept) == (1, None)
    judge(far, 0.6)
    assert (kept_ranks(near), kept_ranks(far)) == ([0.5], [0.6])


def test_of_two_takes_that_share_too_much_the_better_one_is_kept() -> None:
    [choice] = made(keep="best 2 of 3", shared=lambda one, other: 0.8 if one + other > 1.5 else 0.0)
    for rank in (0.7, 0.9, 0.1):
        judge(choice, rank)
    assert kept_ranks(choice) == [0.9, 0.1]


def test_without_the_gate_takes_may_share_everything() -> None:
    [choice] = made(gates={"max_shared": None}, keep="best 2 of 2", shared=lambda one, other: 1.0)
    judge(choice, 0.7)
    judge(choice, 0.9)
    assert kept_ranks(choice) == [0.9, 0.7]


def test_a_take_outside_the_band_moves_the_dial_of_the_next_one_towards_its_middle() -> None:
    [choice] = made(similarity=0.5, gates={"similarity": [0.4, 0.6]}, remix={"crossfade_ms": 90.0})
    judge(choice, 0.0, "too far", similarity=0.2)
    [second] = choice.missing
    assert second.similarity == 0.8
    assert second.params["temperature"] < choice.asked[0].params["temperature"]
    assert second.params["crossfade_ms"] == 90.0
    judge(choice, 0.0, "too far", similarity=0.0)
    assert choice.missing[0].similarity == 1.0  # the end of the dial


def test_without_the_dial_a_retry_has_the_same_parameters() -> None:
    [choice] = made(temperature=0.5, gates={"similarity": [0.4, 0.6]})
    judge(choice, 0.0, "too far", similarity=0.2)
    assert choice.missing[0].params == choice.asked[0].params
    assert choice.missing[0].seed != choice.asked[0].seed


def test_silent_takes_are_never_kept() -> None:
    [choice] = made(gates={"retries": 0})
    take = choice.missing[0]
    choice.judged[take.key] = JudgedTake(take, ("the engine made silence",), 0.0, None)
    with pytest.raises(EngineFailure, match="the engine made silence"):
        choice.decide()


def test_an_entrys_own_gates_win_over_those_of_all() -> None:
    config = Config.model_validate(
        {
            "generate": {"variations": [{"name": "a", "gates": {"similarity": [0.4, 0.6]}}, {"name": "b"}]},
            "gates": {"retries": 1, "similarity": [0.1, 0.2], "max_silence": 0.2},
        }
    )
    own, others = (config.gates.of(spec.gates) for spec in config.generate.variations)
    assert (own.similarity, own.max_silence, own.retries) == ((0.4, 0.6), 0.2, 1)
    assert others == config.gates
