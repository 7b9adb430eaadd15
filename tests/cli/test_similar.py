"""`similar` and `embeddings export` on a small library, through the command line."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from home_folder import Home, RunResult, run, sha256_of, write_music

from pipeline.engines import cards
from pipeline.records import Samples

Similar = Callable[..., RunResult]
NAMES = ("one.wav", "two.wav", "three.wav")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with three tracks done, two variations each, whose sources stayed in the inbox."""
    home = Home(tmp_path_factory.mktemp("library") / "home")
    home.configure(intake={"settle_s": 0, "after": "keep"})
    for n, name in enumerate(NAMES):
        write_music(home.inbox / name, seed=5 * n)
    ended = home.in_child("once")
    assert ended.code == 0, ended.err
    return home


@pytest.fixture
def similar(
    library: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated: None
) -> Similar:
    return lambda *words: run(capsys, monkeypatch, library, "similar", *words)


def found(ended: RunResult) -> list[dict[str, Any]]:
    assert ended.code == 0, ended.err
    loaded: list[dict[str, Any]] = json.loads(ended.out)
    return loaded


def files(ended: RunResult) -> list[str]:
    return [one["file"] for one in found(ended)]


def variations(home: Home, name: str) -> list[Path]:
    [folder] = home.outbox.glob(f"{Path(name).stem}--*")
    return sorted((folder / "variations").iterdir())


def test_everything_but_the_track_itself_is_found_and_its_own_variations_come_first(
    library: Home, similar: Similar
) -> None:
    hits = found(similar("one", "--json"))
    assert {one["file"] for one in hits} == {
        *(str(library.inbox / name) for name in NAMES[1:]),
        *(str(path) for name in NAMES for path in variations(library, name)),
    }
    assert {hit["file"] for hit in hits[:2]} == {str(path) for path in variations(library, "one.wav")}
    assert [hit["similarity"] for hit in hits] == sorted((hit["similarity"] for hit in hits), reverse=True)
    assert {(hit["name"], hit["variation"], hit["track"]) for hit in hits[:2]} == {
        (f"one.wav ({name})", name, sha256_of(library.inbox / "one.wav")) for name in ("near", "far")
    }
    source = next(hit for hit in hits if hit["file"] == str(library.inbox / "two.wav"))
    assert (source["name"], source["variation"]) == ("two.wav", None)


def test_the_text_has_a_line_for_each(similar: Similar) -> None:
    hits, ended = found(similar("one", "--top", "3", "--json")), similar("one", "--top", "3")
    assert [line.split()[-1] for line in ended.out.splitlines()] == [hit["file"] for hit in hits]
    assert len(hits) == 3


def test_a_file_of_the_library_stands_for_its_track_whatever_its_name(
    library: Home, similar: Similar, tmp_path: Path
) -> None:
    copy = shutil.copy(library.inbox / "one.wav", tmp_path / "renamed.wav")
    assert found(similar(copy, "--json")) == found(similar("one", "--json"))


def test_a_variation_is_asked_for_by_its_file_and_not_found_itself(library: Home, similar: Similar) -> None:
    first, second = variations(library, "two.wav")
    hits = files(similar(first, "--json"))
    assert str(first) not in hits
    assert {str(second), str(library.inbox / "two.wav")} == set(hits[:2])


def test_a_file_that_is_not_in_the_library_is_embedded_as_a_source_is(
    library: Home, similar: Similar, tmp_path: Path
) -> None:
    samples, rate = soundfile.read(library.inbox / "three.wav")
    padded = np.concatenate([np.zeros((rate, 2)), 0.2 * samples])  # quieter, after a second of silence
    soundfile.write(tmp_path / "new.flac", padded, rate)
    [best] = found(similar(tmp_path / "new.flac", "--top", "1", "--json"))
    assert best["file"] == str(library.inbox / "three.wav")
    assert best["similarity"] > 0.99


def test_several_are_added_and_others_subtracted(library: Home, similar: Similar) -> None:
    both = files(similar("one", "two", "--json"))
    assert {str(library.inbox / name) for name in NAMES[:2]}.isdisjoint(both)
    less = files(similar("one", "two", "--not", "three", "--json"))
    assert str(library.inbox / "three.wav") not in less
    last = {str(path) for path in variations(library, "three.wav")}
    assert set(less[-2:]) == last
    only = files(similar("--not", "three", "--json"))
    assert set(only[-2:]) == last


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name a file, a track or a --text"),
        (["one", "--duplicates"], "or ask for --duplicates"),
        (["nothing"], "nothing is no file, and there is no track 'nothing'"),
        (["one", "--not", "one"], "leaves nothing"),
        (["one", "--top", "0"], "--top"),
        (["--text", "slow piano"], "set embed.engine: clap"),
        (["one", "--not-text", "drums"], "set embed.engine: clap"),
    ],
)
def test_what_can_not_be_asked_is_2_and_says_why(similar: Similar, words: list[str], says: str) -> None:
    ended = similar(*words)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err


def test_a_file_that_can_not_be_used_is_2_with_its_name(similar: Similar, tmp_path: Path) -> None:
    (tmp_path / "letter.mp3").write_text("Dear all, this is not music.\n" * 20)
    soundfile.write(tmp_path / "silent.wav", np.zeros(30000), 8000)
    for name in ("letter.mp3", "silent.wav"):
        ended = similar(tmp_path / name)
        assert (ended.code, ended.out) == (2, "")
        assert name in ended.err


@pytest.mark.usefixtures("isolated")
def test_without_any_finished_track_it_says_what_to_do(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run(capsys, monkeypatch, home, "similar", "one")
    assert (ended.code, ended.err) == (2, "nothing has been processed yet\n")


# -- texts -----------------------------------------------------------------------------------------


@pytest.fixture
def words_engine(library: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The descriptors as an engine that knows one text: what the second track sounds like."""
    plain = cards()["descriptors"]
    [folder] = library.outbox.glob("two--*")
    with np.load(folder / "embedding.npz") as loaded:
        vector = loaded["track"]

    def load(settings: Any) -> Any:
        engine: Any = plain.load(settings)

        def embed_texts(texts: Sequence[str]) -> Samples:
            assert texts == ["like two"]
            return np.asarray(vector[None])

        engine.embed_texts = embed_texts
        return engine

    monkeypatch.setitem(cards(), "descriptors", replace(plain, load=load))
    yield


@pytest.mark.usefixtures("words_engine")
def test_a_text_is_compared_with_sounds(library: Home, similar: Similar) -> None:
    two = str(library.inbox / "two.wav")
    assert files(similar("--text", "like two", "--json")) == [two, *files(similar("two", "--json"))]
    mixed = files(similar("one", "--not-text", "like two", "--json"))
    assert [file for file in mixed if file != two] == files(similar("one", "--not", "two", "--json"))


@pytest.mark.usefixtures("words_engine")
def test_vectors_of_another_version_are_not_compared(
    similar: Similar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cards(), "descriptors", replace(cards()["descriptors"], version="other"))
    ended = similar("one")
    assert (ended.code, ended.out) == (2, "")
    assert "no finished track has vectors by descriptors" in ended.err


# -- near duplicates -------------------------------------------------------------------------------


def test_near_duplicates_are_pairs_of_sources(library: Home, similar: Similar) -> None:
    assert "no two sources" in similar("--duplicates", "--above", "0.9999").out
    pairs = found(similar("--duplicates", "--above", "-1", "--json"))
    assert {frozenset((pair["file"], pair["other"]["file"])) for pair in pairs} == {
        frozenset((str(library.inbox / one), str(library.inbox / other)))
        for one, other in (NAMES[:2], NAMES[1:], NAMES[::2])
    }
    assert [pair["similarity"] for pair in pairs] == sorted(
        (pair["similarity"] for pair in pairs), reverse=True
    )
    text = similar("--duplicates", "--above", "-1").out.splitlines()
    assert [line.split()[1::2] for line in text] == [[one["file"], one["other"]["file"]] for one in pairs]


# -- export ----------------------------------------------------------------------------------------


@pytest.fixture
def export(
    library: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated: None
) -> Similar:
    return lambda *words: run(capsys, monkeypatch, library, "embeddings", "export", *words)


def vector_of(library: Home, row: dict[str, Any]) -> Samples:
    """The vector of a source or of a variation, as its track's folder has it."""
    if not row["variation"]:
        [folder] = library.outbox.glob(f"{Path(row['name']).stem}--*")
        with np.load(folder / "embedding.npz") as loaded:
            return np.asarray(loaded["track"])
    path = Path(row["file"])
    with np.load(path.parent.parent / "variations.npz") as loaded:
        return np.asarray(loaded["variations"][int(path.name[:2]) - 1])


def check_exported(library: Home, rows: Sequence[dict[str, Any]], vectors: Samples) -> None:
    assert len(rows) == len(vectors) == 9
    assert len({row["file"] for row in rows}) == 9
    assert vectors.dtype == np.float32
    for row, vector in zip(rows, vectors, strict=True):
        assert Path(row["file"]).is_file()
        assert row["track"] == sha256_of(library.inbox / row["name"].split(" ")[0])
        np.testing.assert_array_equal(vector, vector_of(library, row))


def test_a_numpy_array_has_its_names_beside_it(library: Home, export: Similar, tmp_path: Path) -> None:
    ended = export(tmp_path / "all.npy")
    assert ended.out.split() == [str(tmp_path / "all.npy"), str(tmp_path / "all.csv")]
    with (tmp_path / "all.csv").open(newline="") as file:
        check_exported(library, list(csv.DictReader(file)), np.load(tmp_path / "all.npy"))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_parquet_file_has_names_and_vectors(library: Home, export: Similar, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not in the core install")
    assert export(tmp_path / "all.parquet").out.split() == [str(tmp_path / "all.parquet")]
    table = parquet.read_table(tmp_path / "all.parquet")
    rows = table.to_pylist()
    check_exported(library, rows, np.array([row["vector"] for row in rows], np.float32))
    assert table.schema.field("vector").type.list_size == 100
    assert str(table.schema.field("vector").type.value_type) == "float"
    assert table.schema.metadata[b"engine"] == b"descriptors"


def test_an_ending_that_can_not_be_written_is_2_and_says_what_can(
    export: Similar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = export(tmp_path / "all.txt")
    assert (ended.code, ended.err) == (2, "all.txt must end in .parquet or .npy\n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    ended = export(tmp_path / "all.parquet")
    assert (ended.code, "pip install -r requirements-search.txt" in ended.err) == (2, True)
    assert list(tmp_path.iterdir()) == []
