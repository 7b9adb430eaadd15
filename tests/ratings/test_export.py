"""`export --kept`: copies with names that tell what they are, and nothing overwritten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from home_folder import RunResult, run
from rated_home import RatedHome

AM = {"name": "bold", "tempo_bpm": 126.4, "key": "A minor"}
Pipeline = Callable[..., RunResult]


@pytest.fixture
def export(
    rated: RatedHome,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    isolated: None,
) -> Pipeline:
    return lambda: run(capsys, monkeypatch, rated.home, "export", "--kept", tmp_path / "daw")


def names(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_what_was_kept_is_copied_under_names_that_say_what_is_known(
    rated: RatedHome, export: Pipeline, tmp_path: Path
) -> None:
    entries = rated.track("al/Slow Song.wav", AM, {"name": "dull"}, {"key": "F# major"}, {"tempo_bpm": None})
    rated.rate([{**one, "kept": kept} for one, kept in zip(entries, (True, False, True, True), strict=True)])
    ended = export()
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "3 copied")
    assert names(tmp_path / "daw") == {
        "Slow Song - 01 bold 126bpm Am.wav": "al/Slow Song.wav 1",
        "Slow Song - 03 near F#.wav": "al/Slow Song.wav 3",
        "Slow Song - 04 near.wav": "al/Slow Song.wav 4",
    }


def test_equal_names_are_told_apart_and_what_is_there_already_stays(
    rated: RatedHome, export: Pipeline, tmp_path: Path
) -> None:
    entries = rated.track("a/Song.wav", {}) + rated.track("b/SONG.wav", {})
    rated.rate([{**one, "kept": True} for one in entries])
    assert export().code == 0
    before = names(tmp_path / "daw")
    assert len({name.casefold() for name in before}) == 2
    hashes = {one["sha256"][:8] for one in entries}
    assert sum(any(f" - 01 near [{sha256}].wav" in name for sha256 in hashes) for name in before) == 1
    assert export().out.endswith("2 there already\n")
    assert names(tmp_path / "daw") == before


def test_a_file_of_another_content_is_never_overwritten(
    rated: RatedHome, export: Pipeline, tmp_path: Path
) -> None:
    [one] = rated.track("Song.wav", {})
    rated.rate([{**one, "kept": True}])
    own = tmp_path / "daw" / "Song - 01 near.wav"
    own.parent.mkdir()
    own.write_text("my own")
    assert export().code == 0
    second = f"Song - 01 near [{one['sha256'][:8]}].wav"
    assert names(tmp_path / "daw") == {own.name: "my own", second: "Song.wav 1"}
    own.with_name(second).write_text("also mine")
    ended = export()
    assert (ended.code, "other files have its names" in ended.out) == (1, True)
    assert names(tmp_path / "daw") == {own.name: "my own", second: "also mine"}


def test_what_is_gone_or_changed_is_said(rated: RatedHome, export: Pipeline, tmp_path: Path) -> None:
    gone, changed, there = rated.track("Song.wav", {}, {}, {})
    rated.rate([{**one, "kept": True} for one in (gone, changed, there)])
    [folder] = rated.home.folders
    (folder / gone["file"]).unlink()
    (folder / changed["file"]).write_text("altered")
    ended = export()
    assert (ended.code, ended.out.splitlines()[-1]) == (1, "2 missing, 1 copied")
    assert list(names(tmp_path / "daw")) == ["Song - 03 near.wav"]


def test_the_names_are_valid_on_any_system(rated: RatedHome, export: Pipeline, tmp_path: Path) -> None:
    entries = rated.track('Wer? "Ich": <x>|*.wav', {"name": "a:b. "}) + rated.track(f"{'ü' * 110}.wav", {})
    rated.rate([{**one, "kept": True} for one in entries])
    assert export().code == 0
    for name in names(tmp_path / "daw"):
        assert not set('<>:"/\\|?*') & set(name)
        assert len(name.encode()) <= 255 and not name.endswith((".", " "))


def test_without_ratings_nothing_is_copied_and_folders_of_the_home_are_refused(
    rated: RatedHome, export: Pipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export().out == "nothing is rated as kept\n"
    ended = run(capsys, monkeypatch, rated.home, "export", "--kept", rated.home.inbox / "x")
    assert (ended.code, "lies in" in ended.err) == (2, True)
