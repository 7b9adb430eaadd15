"""How well scores agree with ratings, in a line of `doctor` for each engine."""

from __future__ import annotations

from typing import Any

import pytest
from home_folder import run
from rated_home import RatedHome

from pipeline.ratings.agreement import LEAST, agreements


def results(n: int, **record: Any) -> list[dict[str, Any]]:
    """Results whose rank rises while their similarity falls."""
    return [{"scores": {"rank": i / n, "similarity": 1 - i / n}, **record} for i in range(n)]


def test_the_order_by_stars_is_compared_with_that_by_each_score(rated: RatedHome) -> None:
    entries = rated.track("a.wav", *results(LEAST))
    rated.rate([{**one, "stars": 1 + i // 2, "kept": i >= LEAST - 4} for i, one in enumerate(entries)])
    [(engine, text)] = agreements(rated.tracks.store)
    assert engine == "remix"
    # Pearson's coefficient of the ranks 1, 2, 3, ... and 1.5, 1.5, 3.5, ...: 8 / sqrt(8.25 * 8)
    assert f"{LEAST} with stars; their rank correlation with the scores: rank 0.98, similarity -0.98" in text
    assert "kept are 80% of the half that ranks higher, 0% of the others" in text


def test_each_engine_has_its_own_line(rated: RatedHome) -> None:
    entries = rated.track("a.wav", *results(LEAST), *results(LEAST, engine="musicgen"))
    rated.rate([{**one, "stars": 1 + i % LEAST // 2} for i, one in enumerate(entries)])
    assert [(engine, "rank 0.98" in text) for engine, text in agreements(rated.tracks.store)] == [
        ("musicgen", True),
        ("remix", True),
    ]


@pytest.mark.parametrize(
    ("n", "stars", "says"),
    [
        (LEAST - 1, lambda i: 1 + i % 5, f"{LEAST - 1} with stars: {LEAST} are needed to compare them"),
        (LEAST, lambda i: 3, f"{LEAST} with stars: all have the same"),
    ],
)
def test_too_little_is_said_instead_of_a_number(rated: RatedHome, n: int, stars: Any, says: str) -> None:
    rated.rate([{**one, "stars": stars(i)} for i, one in enumerate(rated.track("a.wav", *results(n)))])
    [(_, text)] = agreements(rated.tracks.store)
    assert text.startswith(says) and "kept are" not in text


def test_results_without_scores_and_scores_that_are_all_the_same_give_no_number(rated: RatedHome) -> None:
    same = [{"scores": {"rank": 0.5}}] * LEAST
    entries = rated.track("a.wav", *same, *[{}] * LEAST)
    rated.rate([{**one, "stars": 1 + i % 5} for i, one in enumerate(entries)])
    [(_, text)] = agreements(rated.tracks.store)
    assert text == f"{LEAST} with stars; their rank correlation with the scores: the scores are all the same"


def test_doctor_says_it_and_nothing_where_nothing_is_rated(
    rated: RatedHome, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated: None
) -> None:
    entries = rated.track("a.wav", *results(2))
    assert "ratings of" not in run(capsys, monkeypatch, rated.home, "doctor").out
    rated.rate([{**entries[0], "stars": 4}])
    assert "ok    ratings of remix: 1 with stars: " in run(capsys, monkeypatch, rated.home, "doctor").out
