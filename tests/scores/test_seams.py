"""Seams: clicks, steps of level and cuts are found; music without them has none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tunes import RATE, changed, joined, part, play

from pipeline.records import Audio
from pipeline.scores import Scores, Source, analyse_source, score


@pytest.fixture(scope="module")
def source() -> Source:
    return analyse_source(play(drums=False, instrument="organ"))


def scored(source: Source, audio: Audio, *joins_s: float) -> Scores:
    return score(source, audio, joins_s=joins_s)


def test_a_piece_has_no_seam_against_itself(source: Source) -> None:
    result = scored(source, play(drums=False, instrument="organ"), 3.0, 5.13, 9.7)
    assert result.worst_seam.quality == 1.0
    assert min(join.quality for join in result.joins) > 0.8


def test_a_click_is_found_where_it_is(source: Source) -> None:
    samples = play(drums=False, instrument="organ").samples.copy()
    samples[:, round(7.4 * RATE)] += 0.4
    result = scored(source, Audio(samples, RATE), 7.4, 3.0)
    assert result.worst_seam.quality < 0.7
    assert result.worst_seam.at_s == pytest.approx(7.4, abs=0.03)
    assert result.joins[0].quality < 0.3 < result.joins[1].quality


def test_a_fall_of_the_level_is_a_poor_join(source: Source) -> None:
    music = play(drums=False, instrument="organ")
    fallen = joined(part(music, 0.0, 7.2), changed(part(music, 7.2, 16.0), gain=0.1))
    assert scored(source, fallen, 7.2).joins[0].quality < 0.3


def test_joins_of_whole_bars_are_better_than_cuts_anywhere() -> None:
    music, others = play(), (3.13, 0.77, 9.41, 5.29)
    source = analyse_source(music)
    on_bars = joined(*(part(music, 2.0 * bar, 2.0 * bar + 2.0) for bar in (0, 5, 2, 7, 4)))
    cut = joined(*(part(music, start_s, start_s + 1.87) for start_s in (1.37, *others)))
    good = scored(source, on_bars, 2.0, 4.0, 6.0, 8.0).joins
    poor = scored(source, cut, 1.87, 3.74, 5.61, 7.48).joins
    assert np.mean([join.quality for join in good]) > np.mean([join.quality for join in poor]) + 0.2


def test_a_join_beyond_the_end_is_none(source: Source) -> None:
    assert scored(source, play(drums=False, instrument="organ"), 17.0).joins[0].quality == 1.0


def test_the_same_sounds_give_the_same_scores_whatever_was_scored_before(source: Source) -> None:
    first = scored(source, play(), 4.0)
    scored(source, play(tune=3), 2.0)
    assert scored(analyse_source(play(drums=False, instrument="organ")), play(), 4.0) == first


def test_scores_are_written_as_json(source: Source) -> None:
    facts = scored(source, play(), 4.0).as_json()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["joins"] == [{"at_s": 4.0, "quality": facts["joins"][0]["quality"]}]
    assert np.isclose(facts["similarity"], round(facts["similarity"], 4))
