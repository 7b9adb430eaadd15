"""`rate`: the ratings of a page are stored by the hashes of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from home_folder import RunResult, run
from rated_home import RatedHome, write_ratings

Pipeline = Callable[..., RunResult]


@pytest.fixture
def pipeline(
    rated: RatedHome, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated: None
) -> Pipeline:
    return lambda *words: run(capsys, monkeypatch, rated.home, *words)


def test_a_byte_order_mark_is_no_obstacle(rated: RatedHome, pipeline: Pipeline, tmp_path: Path) -> None:
    [entry] = rated.track("song.wav", {})
    path = write_ratings(tmp_path / "a.json", [{**entry, "stars": 2}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert pipeline("rate", path).out == "1 ratings stored\n"


def test_ratings_are_stored_and_later_ones_win(rated: RatedHome, pipeline: Pipeline, tmp_path: Path) -> None:
    first, second = rated.track("song.wav", {}, {})
    given = [{**first, "stars": 2}, {**second, "kept": False, "note": "the end"}, {**first, "stars": 4}]
    ended = pipeline("rate", write_ratings(tmp_path / "a.json", given, made_by="a newer page"))
    assert (ended.code, ended.out) == (0, "3 ratings stored\n")
    stored = {one.sha256: (one.stars, one.kept, one.note) for one in rated.tracks.store.ratings()}
    assert stored == {first["sha256"]: (4, None, ""), second["sha256"]: (None, False, "the end")}

    pipeline("rate", write_ratings(tmp_path / "b.json", [{**first, "stars": 5, "kept": True}, second]))
    [only] = rated.tracks.store.ratings()  # the other one was taken back
    assert (only.sha256, only.stars, only.kept) == (first["sha256"], 5, True)


def test_files_that_were_made_anew_or_elsewhere_are_counted_and_left_out(
    rated: RatedHome, pipeline: Pipeline, tmp_path: Path
) -> None:
    [one] = rated.track("song.wav", {})
    given = [
        {**one, "sha256": "a" * 64, "stars": 1},
        {**one, "track": "b" * 64, "stars": 1},
        {**one, "stars": 3},
    ]
    ended = pipeline("rate", write_ratings(tmp_path / "a.json", given))
    assert ended.code == 0
    first, second = ended.out.splitlines()
    assert (first, second.startswith("2 left out: ")) == ("1 ratings stored", True)
    assert [rating.stars for rating in rated.tracks.store.ratings()] == [3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stars": 6}, "ratings[0].stars: must be less than or equal to 5, not 6"),
        ({"stars": True}, "ratings[0].stars: must be a valid integer, not true"),
        ({"kept": "yes"}, "ratings[0].kept: must be a valid boolean, not"),
        ({"sha256": "abc"}, "ratings[0].sha256: must be a SHA-256 of 64 hexadecimal digits, not"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_is_stored(
    rated: RatedHome, pipeline: Pipeline, change: dict[str, Any], says: str
) -> None:
    path = rated.home.folder / "ratings.json"
    [one] = rated.track("song.wav", {})
    ended = pipeline("rate", write_ratings(path, [{**one, **change}, {**one, "stars": 4}]))
    assert (ended.code, f"{path}: {says}" in ended.err) == (2, True), ended.err
    assert rated.tracks.store.ratings() == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stars: 5", "is not JSON"),
        ('{"ratings": []}', "schema: is required"),
        ('{"schema": 2, "ratings": []}', "schema: must be 1, not 2"),
        ("[]", "the top level: must be"),
    ],
)
def test_another_file_is_refused_with_a_sentence(
    pipeline: Pipeline, tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    for name, wanted in (("a.json", says), ("none.json", "can't be read: no such file")):
        ended = pipeline("rate", tmp_path / name)
        assert (ended.code, wanted in ended.err) == (2, True), ended.err
