"""How a model's ratings count among the scores."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from home_folder import SAMPLE_RATE, write_music
from runner_setup import StubEngines, StubGenerator, StubRater

from pipeline.audio import DecodeLimits, decode
from pipeline.config import Gates
from pipeline.executors.judge import Reference, ScoringJudge, Verdict
from pipeline.records import Audio
from pipeline.stages import Finished

GOOD = {"CE": 9.0, "CU": 5.0, "PC": 5.0, "PQ": 8.0}


@dataclass(frozen=True)
class Source:
    """A piece of music, and what a judge compares with its variations."""

    music: Audio
    reference: Reference


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = write_music(tmp_path_factory.mktemp("music") / "a.wav", seconds=4.0)
    music = decode(path, sample_rate=SAMPLE_RATE, limits=DecodeLimits())[0]
    return Source(music, judge_with(None).analyse(music))


def judge_with(rating: dict[str, float] | None) -> ScoringJudge:
    """`rating`: what its rater says of every sound; None: it has no rater."""
    rater = None if rating is None else StubRater(lambda audio: rating)
    return ScoringJudge(StubEngines(StubGenerator(), stub_rater=rater), lambda: False)


def verdict(source: Source, rating: dict[str, float] | None) -> Verdict:
    """On the source as a variation of itself."""
    made = Finished(source.music, -14.0, {}, None, None)
    return judge_with(rating).judge(source.reference, made, Gates(max_copied=0.5), "")


def all_axes(value: float) -> dict[str, float]:
    return dict.fromkeys(GOOD, value)


def test_of_two_equal_takes_the_one_with_the_better_ratings_ranks_higher(source: Source) -> None:
    good = verdict(source, GOOD)
    assert good.rank > verdict(source, {**GOOD, "CE": 7.0}).rank
    assert good.rank > verdict(source, {**GOOD, "PQ": 6.0}).rank
    assert good.scores["rating"] == GOOD


def test_complexity_and_usefulness_are_told_but_not_counted(source: Source) -> None:
    other = verdict(source, {**GOOD, "CU": 9.0, "PC": 1.0})
    assert other.rank == verdict(source, GOOD).rank
    assert (other.scores["rating"]["CU"], other.scores["rating"]["PC"]) == (9.0, 1.0)


def test_a_rating_is_one_merit_among_others_and_decides_no_gate(source: Source) -> None:
    without, worst, best = (verdict(source, one) for one in (None, all_axes(1.0), all_axes(10.0)))
    weight = best.rank - worst.rank
    assert 1 / weight == pytest.approx(round(1 / weight))  # the number of merits
    assert weight < 0.25
    assert worst.rank == pytest.approx(without.rank * (1 - weight))
    assert worst.failed == best.failed == without.failed == ("100% of it is a copy of the source",)
    assert "rating" not in without.scores


def test_a_models_output_beyond_the_scale_counts_as_its_end(source: Source) -> None:
    assert verdict(source, all_axes(10.7)).rank == verdict(source, all_axes(10.0)).rank
    assert verdict(source, all_axes(0.3)).rank == verdict(source, all_axes(1.0)).rank
