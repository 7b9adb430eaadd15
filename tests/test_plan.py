"""The plan of a track: which keys each change of the configuration changes, and which stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.engines import cards
from pipeline.engines.selection import Choice
from pipeline.plan import Recipe, TrackPlan, VariationUnit, digest, plan_variations
from pipeline.stages import OUTPUT_VERSIONS

SHA256, OTHER_SHA256 = "a" * 64, "b" * 64
FAITHFUL = {"name": "faithful", "temperature": 0.6}
BOLD = {"name": "bold", "temperature": 1.2}
REMIX = Choice(cards()["remix"], None, None, "test")
MUSICGEN = Choice(cards()["musicgen"], "facebook/musicgen-melody", "0" * 40, "test")
DESCRIPTORS = Choice(cards()["descriptors"], None, None, "test")
CLAP = Choice(cards()["clap"], "laion/clap-htsat-unfused", "1" * 40, "test")
AUDIOBOX = Choice(cards()["audiobox"], "facebook/audiobox-aesthetics", "2" * 40, "test")


def config(*variations: dict[str, Any], generate: dict[str, Any] | None = None, **sections: Any) -> Config:
    entries = list(variations or (FAITHFUL, BOLD))
    return Config.model_validate({"generate": {**(generate or {}), "variations": entries}, **sections})


def plan(
    made: Config | None = None,
    *,
    embedder: Choice = DESCRIPTORS,
    generator: Choice = REMIX,
    rater: Choice | None = None,
    sha256: str = SHA256,
) -> TrackPlan:
    return Recipe(made or config(), embedder, generator, rater).plan(sha256)


def keys(made: TrackPlan) -> list[str]:
    return [unit.key for unit in made.variations]


def by_name(made: TrackPlan) -> dict[str, VariationUnit]:
    return {unit.name: unit for unit in made.variations}


def test_the_same_configuration_and_bytes_give_the_same_plan() -> None:
    assert plan() == plan(config())
    assert plan().key == plan(config()).key


def test_every_unit_of_a_plan_has_its_own_key() -> None:
    made = plan(config({**FAITHFUL, "count": 3}, {**BOLD, "temperature": [1.0, 1.2]}))
    assert len({made.normalize_key, made.embed_key, *keys(made)}) == 2 + 5


def test_another_track_shares_no_key_and_no_seed() -> None:
    one, other = plan(), plan(sha256=OTHER_SHA256)

    assert one.normalize_key != other.normalize_key
    assert one.embed_key != other.embed_key
    assert not set(keys(one)) & set(keys(other))
    assert not {unit.seed for unit in one.variations} & {unit.seed for unit in other.variations}


@pytest.mark.parametrize(
    "change",
    [{"temperature": 1.3}, {"crossfade_ms": 60}, {"seed": 7}, {"duration_s": 12.0}, {"name": "wild"}],
)
def test_a_changed_entry_changes_its_key_and_no_other(change: dict[str, Any]) -> None:
    before, after = plan(), plan(config(FAITHFUL, {**BOLD, **change}))

    assert (after.normalize_key, after.embed_key) == (before.normalize_key, before.embed_key)
    assert keys(after)[0] == keys(before)[0]
    assert keys(after)[1] != keys(before)[1]


@pytest.mark.parametrize("change", [{"transpose": -2}, {"speed": 1.1}])
def test_a_changed_source_changes_keys_and_seeds_of_its_entry_alone(change: dict[str, Any]) -> None:
    before, after = plan(), plan(config(FAITHFUL, {**BOLD, **change}))

    assert (after.normalize_key, after.embed_key) == (before.normalize_key, before.embed_key)
    assert after.variations[0] == before.variations[0]
    assert after.variations[0].source == after.normalize_key != after.variations[1].source
    assert keys(after)[1] != keys(before)[1]
    assert after.variations[1].seed != before.variations[1].seed
    assert after.variations[1].takes[0].facts().items() >= change.items()


def test_a_source_that_is_not_changed_is_in_no_key() -> None:
    """So that results that were made before there were changes count as done."""
    assert plan(config({**FAITHFUL, "transpose": 0, "speed": 1}, BOLD)) == plan()
    [unit, _] = plan().variations
    engine = ["remix", REMIX.card.version, None, None]
    made_by = [engine, OUTPUT_VERSIONS["wav"], config().output.model_dump()]
    assert unit.sound == digest(["take", plan().normalize_key, made_by, "faithful", 30.0, []])
    assert set(unit.takes[0].facts()) == {"seed", "params"}


def test_one_source_serves_all_variations_with_the_same_change() -> None:
    entry = {"name": "a", "seed": 5, "transpose": [-2, 0, 2], "temperature": [0.5, 0.8]}
    made = plan(config(entry, {**BOLD, "transpose": 2}))
    sources = [unit.source for unit in made.variations]
    assert sources == [sources[0]] * 2 + [made.normalize_key] * 2 + [sources[4]] * 3
    assert len(set(sources)) == 3


def test_a_changed_normalization_changes_every_key() -> None:
    before, after = plan(), plan(config(normalize={"loudness_lufs": -20.0}))

    assert after.normalize_key != before.normalize_key
    assert after.embed_key != before.embed_key
    assert not set(keys(after)) & set(keys(before))


def test_a_changed_output_changes_the_variations_alone() -> None:
    before, after = plan(), plan(config(output={"bit_depth": 16}))

    assert (after.normalize_key, after.embed_key) == (before.normalize_key, before.embed_key)
    assert not set(keys(after)) & set(keys(before))
    assert [unit.seed for unit in after.variations] == [unit.seed for unit in before.variations]


@pytest.mark.parametrize(
    "section",
    [{"device": "cuda"}, {"threads": 1}, {"retry": {"max_attempts": 9}}, {"intake": {"after": "keep"}},
     {"generate": {"batch_tracks": 1, "musicgen": {"max_memory_gb": 4.0}}}],
)  # fmt: skip
def test_settings_that_do_not_affect_the_results_change_nothing(section: dict[str, Any]) -> None:
    assert plan(config(**section)) == plan()


def test_another_embedder_changes_the_embedding_alone() -> None:
    before, after = plan(), plan(embedder=CLAP)

    assert after.embed_key != before.embed_key
    assert after.variations == before.variations


def test_the_variations_are_embedded_again_with_another_embedder_or_other_variations_alone() -> None:
    before = plan()
    assert before.vectors_key in before.keys
    assert plan(embedder=CLAP).vectors_key != before.vectors_key
    assert plan(config(FAITHFUL)).vectors_key != before.vectors_key
    renamed = plan(config(FAITHFUL, BOLD, retry={"max_attempts": 9}))
    assert renamed.vectors_key == before.vectors_key


def test_without_vectors_of_variations_nothing_of_them_is_in_a_key() -> None:
    """So that results that were made before there were any count as done."""
    made = plan(config(embed={"variations": False}))
    assert made.vectors_key == ""
    assert made.keys == [made.embed_key, *keys(made)]
    assert made.key == digest([made.embed_key, *([unit.key, unit.file] for unit in made.variations)])
    assert plan().key != made.key


def test_a_rater_changes_which_takes_are_chosen_and_no_take() -> None:
    before, after = plan(), plan(rater=AUDIOBOX)

    assert after.embed_key == before.embed_key
    assert not set(keys(after)) & set(keys(before))
    assert [unit.takes for unit in after.variations] == [unit.takes for unit in before.variations]
    assert keys(plan(rater=replace(AUDIOBOX, revision="3" * 40))) != keys(after)


def test_without_a_rater_nothing_of_it_is_in_a_key() -> None:
    """So that results that were made before there were raters count as done."""
    for unit in plan().variations:
        gates = unit.gates.model_dump(mode="json", exclude={"rejected"})
        assert unit.key == digest(["generate", unit.group, unit.kept, unit.place, gates])


@pytest.mark.parametrize("change", [{"revision": "2" * 40}, {"model": "facebook/musicgen-stereo-melody"}])
def test_other_weights_change_the_variations_alone(change: dict[str, str]) -> None:
    before, after = plan(generator=MUSICGEN), plan(generator=replace(MUSICGEN, **change))

    assert after.embed_key == before.embed_key
    assert not set(keys(after)) & set(keys(before))


def test_a_raised_engine_version_changes_its_variations() -> None:
    newer = replace(REMIX, card=replace(REMIX.card, version=REMIX.card.version + "+"))
    assert not set(keys(plan(generator=newer))) & set(keys(plan()))


def test_weights_known_by_their_content_may_lie_anywhere() -> None:
    here = replace(MUSICGEN, model="models/here", revision="sha256:" + "3" * 64)
    assert plan(generator=replace(here, model="models/there")) == plan(generator=here)


def test_an_entry_inserted_before_others_changes_neither_their_keys_nor_their_seeds() -> None:
    before, after = plan(), plan(config({"name": "new", "temperature": 0.1}, FAITHFUL, BOLD))

    assert keys(after)[1:] == keys(before)
    assert [unit.seed for unit in after.variations][1:] == [unit.seed for unit in before.variations]
    assert by_name(after)["faithful"].file == "variations/02-faithful.wav"
    assert after.key != before.key  # the files are renumbered


def test_a_raised_count_does_not_change_the_first_variations() -> None:
    assert keys(plan(config({**FAITHFUL, "count": 3})))[:2] == keys(plan(config({**FAITHFUL, "count": 2})))


def test_a_parameter_of_another_engine_changes_nothing() -> None:
    elsewhere = config({**FAITHFUL, "top_k": 50, "prompt": "warm"}, {**BOLD, "guidance": [2.0, 4.0]})

    assert plan(elsewhere) == plan()
    assert plan(elsewhere, generator=MUSICGEN) != plan(generator=MUSICGEN)


def test_a_default_that_is_written_out_changes_nothing() -> None:
    default_ms = REMIX.card.params().model_dump()["crossfade_ms"]
    assert plan(config({**FAITHFUL, "crossfade_ms": int(default_ms)}, BOLD)) == plan()


def test_two_equal_entries_differ_in_sound() -> None:
    first, second = plan(config(FAITHFUL, FAITHFUL)).variations
    assert first.seed != second.seed
    assert first.key != second.key


def test_seeds_fit_63_bits() -> None:
    made = plan(config({**FAITHFUL, "count": 50}))
    assert all(0 <= unit.seed < 2**63 for unit in made.variations)
    assert len({unit.seed for unit in made.variations}) == 50


def test_a_list_sweeps_over_the_product_of_all_lists_and_count_repeats_each() -> None:
    entry = {"name": "a", "temperature": [0.5, 1.0], "min_segment_beats": [4, 8], "count": 2}
    planned = plan_variations(config(entry), REMIX.card)

    pairs = [(p.params["temperature"], p.params["min_segment_beats"]) for p in planned]
    assert pairs == [pair for pair in ((0.5, 4), (0.5, 8), (1.0, 4), (1.0, 8)) for _ in range(2)]
    assert [p.file for p in planned] == [f"variations/{n:02d}-a.wav" for n in range(1, 9)]


def test_parameters_are_complete_with_the_engines_defaults() -> None:
    planned = plan_variations(config({"name": "a"}), REMIX.card)
    assert planned[0].params == REMIX.card.params().model_dump()


def test_a_given_seed_counts_up_over_the_repeats_of_its_entry() -> None:
    made = plan(config({**FAITHFUL, "temperature": [0.5, 0.6], "count": 2, "seed": 40}, {**BOLD, "seed": 40}))
    assert [unit.seed for unit in made.variations] == [40, 41, 42, 43, 40]


def test_zero_is_a_seed_and_the_last_one_wraps_around() -> None:
    made = plan(config({**FAITHFUL, "seed": 0}, {**BOLD, "seed": 2**63 - 1, "count": 2}))
    assert [unit.seed for unit in made.variations] == [0, 2**63 - 1, 0]


def test_a_given_seed_is_the_same_for_every_track() -> None:
    made = config({**FAITHFUL, "seed": 5})
    assert plan(made).variations[0].seed == plan(made, sha256=OTHER_SHA256).variations[0].seed == 5


def test_an_entrys_own_duration_wins_over_the_common_one() -> None:
    made = plan(config(FAITHFUL, {**BOLD, "duration_s": "source"}, generate={"duration_s": 7.5}))
    assert [unit.duration_s for unit in made.variations] == [7.5, "source"]


def test_a_variation_that_equals_an_earlier_one_is_left_out_and_leaves_no_gap_in_the_numbers() -> None:
    seeded = {**FAITHFUL, "seed": 5}
    made = plan(config({**seeded, "count": 2}, seeded, {**seeded, "duration_s": 7.0}, BOLD))

    assert [(unit.seed, unit.duration_s) for unit in made.variations][:3] == [(5, 30.0), (6, 30.0), (5, 7.0)]
    assert [unit.file for unit in made.variations] == [
        "variations/01-faithful.wav",
        "variations/02-faithful.wav",
        "variations/03-faithful.wav",
        "variations/04-bold.wav",
    ]
    assert len(set(made.keys)) == len(made.keys)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ('mix: "A"?', "01-mix_ _A_.wav"),
        ("loud...", "01-loud.wav"),
        ("CON", "01-CON.wav"),  # reserved by Windows only without the number
        ("-0.5 dB, größer", "01--0.5 dB, größer.wav"),
    ],
)
def test_a_variations_name_is_made_safe_for_file_systems_in_its_file_only(name: str, file: str) -> None:
    [unit] = plan(config({**FAITHFUL, "name": name})).variations
    assert (unit.name, unit.file) == (name, f"variations/{file}")
