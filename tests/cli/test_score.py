"""`score`: a table or JSON for any two files, and one sentence for files that can't be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from home_folder import Home, RunResult, run, write_music

Score = Callable[..., RunResult]


@pytest.fixture
def score(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated: None
) -> Score:
    return lambda *words: run(capsys, monkeypatch, home, "score", *words)


def test_a_table_shows_how_close_two_files_are(score: Score, tmp_path: Path) -> None:
    song = write_music(tmp_path / "song.wav", seconds=10.0)
    shown = score(song, "--against", song)
    assert shown.code == 0, shown.err
    rows = {line.split()[0]: line.split()[1] for line in shown.out.splitlines()}
    assert (rows["similarity"], rows["embedding"], rows["tempo_agrees"]) == ("1", "1", "yes")
    assert float(rows["loudness_lufs"]) < 0


def test_json_has_every_measure(score: Score, tmp_path: Path) -> None:
    song, other = write_music(tmp_path / "song.wav"), write_music(tmp_path / "other.wav", seed=6)
    facts = json.loads(score(other, "--against", song, "--json").out)
    same = json.loads(score(song, "--against", song, "--json").out)
    assert facts["similarity"] < same["similarity"] == 1.0
    assert facts["prompt"] is None
    assert set(facts["worst_seam"]) == {"at_s", "quality"}


def test_it_makes_no_folders_and_no_database(score: Score, home: Home, tmp_path: Path) -> None:
    before = sorted(home.folder.rglob("*"))
    song = write_music(tmp_path / "song.wav")
    assert score(song, "--against", song).code == 0
    assert sorted(home.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "says"), [("missing.wav", "can't be read: no such file"), ("notes.wav", "is not audio")]
)
def test_a_file_that_cannot_be_read_is_named(score: Score, tmp_path: Path, name: str, says: str) -> None:
    song = write_music(tmp_path / "song.wav")
    (tmp_path / "notes.wav").write_text("Dear all, this is not music.\n" * 20)
    for words in ((tmp_path / name, "--against", song), (song, "--against", tmp_path / name)):
        ended = score(*words)
        assert ended.code == 2
        assert name in ended.err and says in ended.err
