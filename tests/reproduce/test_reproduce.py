"""`reproduce`: the same bytes from what is recorded, and what differs where they are not the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from home_folder import FAR, NEAR, Home, RunResult, contents, run, sha256_of, write_music

from pipeline.engines.remix.generator import RemixGenerator
from pipeline.stages import NORMALIZE_VERSION

Pipeline = Callable[..., RunResult]


@pytest.fixture
def pipeline(
    home: Home,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    isolated: None,
) -> Pipeline:
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(capsys, monkeypatch, home, *words)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one track done."""
    home = Home(tmp_path_factory.mktemp("reproduce") / "home")
    home.configure()
    write_music(home.inbox / "slow song.wav")
    assert home.in_child("once").code == 0
    return home.folder


@pytest.fixture
def processed(home: Home, template: Path) -> Home:
    """The home with that track done; its database has the path where the source was first."""
    shutil.rmtree(home.folder)
    shutil.copytree(template, home.folder)
    return home


def manifest_of(home: Home) -> Path:
    return home.folders[0] / "manifest.json"


def first_file(home: Home) -> Path:
    return home.folders[0] / home.manifest()["variations"][0]["file"]


def everything(home: Home) -> dict[str, str]:
    return {**contents(home.folder), "manifest": sha256_of(manifest_of(home))}


def test_all_takes_of_a_manifest_are_made_again_and_nothing_is_changed(
    processed: Home, pipeline: Pipeline
) -> None:
    before = everything(processed)
    ended = pipeline("reproduce", manifest_of(processed))
    assert ended.code == 0, ended.out
    assert [line.rpartition(": ")[2] for line in ended.out.splitlines()[:-1]] == ["the same", "the same"]
    assert ended.out.splitlines()[-1] == "2 the same, 0 different, 0 can't be tried"
    assert everything(processed) == before


def test_a_file_is_made_again_from_its_tags_and_its_source_alone(
    processed: Home, pipeline: Pipeline, tmp_path: Path
) -> None:
    file, source = shutil.copy(first_file(processed), tmp_path / "x.wav"), write_music(tmp_path / "y.wav")
    shutil.rmtree(processed.folder / "state")
    shutil.rmtree(processed.outbox)
    made = tmp_path / "again.wav"
    ended = pipeline("reproduce", file, "--source", source, "--output", made)
    assert (ended.code, ended.out) == (0, f"{file}: the same\n")
    assert made.read_bytes() == file.read_bytes()


SLOWER = {"name": "slower", "transpose": -2, "speed": 0.9}
KEPT = {"name": "kept", "keep": "best 2 of 3"}
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "opus": (
        [SLOWER, NEAR],
        {"output": {"format": "opus"}, "normalize": {"sample_rate": 16000, "loudness_lufs": -9}},
    ),
    "fade": ([SLOWER], {"output": {"fade_out_s": 0.1}}),
    "album": ([NEAR, {**FAR, "duration_s": 2.5}], {"output": {"album": True, "length": "bars"}}),
    "best of": ([KEPT], {"gates": {"rejected": "keep", "max_shared": None}}),
    "flac": ([NEAR], {"output": {"format": "flac", "bit_depth": 16, "sample_rate": 44100}}),
    "mp3": ([NEAR], {"output": {"format": "mp3"}, "normalize": {"trim_silence": False, "max_size_mb": 9}}),
    "loop": ([NEAR], {"output": {"loop": True}}),
    "source": ([NEAR], {"generate": {"duration_s": "source"}, "output": {"loudness_lufs": "source"}}),
    "limiter": ([NEAR], {"output": {"limiter": True, "bit_depth": "float"}}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "opus" else pytest.mark.long) for case in CASES]
)
def test_what_a_configuration_says_is_recorded_so_that_another_one_makes_the_same(
    home: Home, pipeline: Pipeline, case: str
) -> None:
    variations, sections = CASES[case]
    source = write_music(Path("music/song (live).wav").absolute())
    home.configure(*variations, **sections)
    assert pipeline("once", source.parent).code == 0
    home.configure(normalize={})

    of_manifest = json.loads(pipeline("reproduce", manifest_of(home), "--json").out)
    sounds = [Path(one["file"]) for one in of_manifest["takes"]]
    assert of_manifest["same"] == len(sounds)
    assert {path.parent.name for path in sounds} == {
        "variations",
        *(["rejected"] if case == "best of" else []),
    }
    ended = pipeline("reproduce", sounds[-1])
    assert ended.code == 0, ended.out


def test_a_changed_byte_of_the_sound_is_found_with_how_far_it_is_off(
    processed: Home, pipeline: Pipeline
) -> None:
    file = first_file(processed)
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 0x20  # the highest byte of the last sample
    file.write_bytes(changed)
    ended = pipeline("reproduce", manifest_of(processed), "--file", file.name)
    assert ended.code == 1
    assert (
        "different; its file is not the one that was published: the sound differs by up to -12.0 dBFS"
        in ended.out
    )
    alone = pipeline("reproduce", file, "--json")
    [found] = json.loads(alone.out)["takes"]
    assert (alone.code, found["state"], found["versions"]) == (1, "different", {})
    assert found["peak_difference"] == pytest.approx(0.25)
    assert found["sha256"] == processed.manifest()["variations"][0]["sha256"]


def test_a_changed_tag_is_found_though_the_sound_is_the_same(processed: Home, pipeline: Pipeline) -> None:
    file = first_file(processed)
    file.write_bytes(file.read_bytes().replace(b"the source's own", b"the source's OWN"))
    ended = pipeline("reproduce", file)
    assert ended.code == 1
    assert "the sound is the same, but other bytes of the file differ" in ended.out
    assert "no version that is recorded differs" in ended.out


def test_a_file_that_is_missing_can_be_made_again(
    processed: Home, pipeline: Pipeline, tmp_path: Path
) -> None:
    file = first_file(processed)
    before = file.read_bytes()
    file.unlink()
    made = tmp_path / "again.wav"
    ended = pipeline(
        "reproduce", manifest_of(processed), "--file", f"variations/{file.name}", "--output", made
    )
    assert ended.code == 0
    assert ended.out.endswith(": the same; its file is missing\n")
    assert made.read_bytes() == before


def test_another_version_is_named_where_the_bytes_differ(
    processed: Home, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = processed.manifest()
    for one in manifest["variations"]:
        one["made_with"] |= {"numpy": "1.0", "normalization": "0"}
    manifest_of(processed).write_text(json.dumps(manifest))
    assert pipeline("reproduce", "--all").code == 0  # the bytes are the same, so nothing is said of it

    monkeypatch.setattr(RemixGenerator, "version", "99")
    ended = pipeline("reproduce", "--all")
    assert ended.code == 1
    first, second, total = ended.out.splitlines()
    assert (
        "the sound is the same, but other bytes of the file differ; now with engine remix 99 instead of"
        in first
    )
    assert f"numpy {np.__version__} instead of 1.0" in first and first != second
    assert f"normalization {NORMALIZE_VERSION} instead of 0" in first
    assert total == "0 the same, 2 different, 0 can't be tried"
    from_tags = pipeline("reproduce", first_file(processed)).out
    assert "engine remix 99 instead of" in from_tags and "numpy" not in from_tags


def test_a_newer_program_that_makes_the_same_sound_passes(
    processed: Home, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.reproduce.again.__version__", "99.0")
    monkeypatch.setattr("pipeline.reproduce.again.SOFTWARE", "instrumental-variations 99.0")
    ended = pipeline("reproduce", first_file(processed), "--json")
    [first] = json.loads(ended.out)["takes"]
    assert (ended.code, first["state"]) == (0, "same")
    assert first["versions"]["instrumental-variations"]["now"] == "99.0"


def test_a_record_from_before_settings_were_recorded_is_taken_for_one_with_the_default_ones(
    processed: Home, pipeline: Pipeline
) -> None:
    manifest = processed.manifest()
    for one in manifest["variations"]:
        del one["made_with"], one["settings"]["normalize"]
    manifest_of(processed).write_text(json.dumps(manifest))
    ended = pipeline("reproduce", manifest_of(processed), "--file", "01-near.wav")
    assert ended.code == 1
    assert "(its record is older than the settings in records, so the default ones were taken)" in ended.out


def test_a_source_that_is_not_at_hand_is_asked_for(
    processed: Home, pipeline: Pipeline, tmp_path: Path
) -> None:
    sha256 = processed.manifest()["source"]["sha256"]
    shutil.rmtree(processed.inbox / "done")
    store = processed.folder / "state"
    shutil.rmtree(store)
    ended = pipeline("reproduce", "--all")
    assert (
        ended.code,
        ended.out.count(f"its source (SHA-256 {sha256}) isn't at hand: name the file with --source"),
    ) == (2, 2)
    other = write_music(tmp_path / "other.wav", seed=1)
    ended = pipeline("reproduce", manifest_of(processed), "--source", other)
    assert (ended.code, f"{other} is not its source" in ended.out) == (2, True)
    right = write_music(tmp_path / "right.wav")
    assert pipeline("reproduce", manifest_of(processed), "--source", right).code == 0
    assert not store.exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("engine", "loom", "there is no engine loom"),
        ("params", {"knots": 3}, "engine remix 3 does not take its parameters"),
        ("settings", {"mastering": {}}, "this version of the program does not know its settings"),
    ],
)
def test_what_this_version_does_not_know_is_said_of_that_take_alone(
    processed: Home, pipeline: Pipeline, key: str, value: Any, says: str
) -> None:
    manifest = processed.manifest()
    manifest["variations"][0][key] = value
    manifest_of(processed).write_text(json.dumps(manifest))
    ended = pipeline("reproduce", manifest_of(processed))
    assert (ended.code, says in ended.out) == (2, True), ended.out
    assert ended.out.endswith("1 the same, 0 different, 1 can't be tried\n")


def test_tracks_in_work_are_left_out_and_damaged_manifests_are_named(
    processed: Home, pipeline: Pipeline
) -> None:
    (processed.outbox / "in work--12345678" / "variations").mkdir(parents=True)
    damaged = processed.outbox / "damaged--12345678"
    damaged.mkdir()
    (damaged / "manifest.json").write_text('{"variations": []}')
    ended = pipeline("reproduce", "--all")
    assert ended.code == 2
    assert ended.out.splitlines() == [
        "damaged--12345678: can't be tried; damaged--12345678/manifest.json is not a manifest of this"
        " program, or is damaged",
        "2 the same, 0 different, 1 can't be tried",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "takes a manifest or a variation"),
        (["--all", "x.wav"], "or --all alone"),
        (["no.json"], "no.json can't be read: no such file"),
        (["plain.wav"], "plain.wav has no tags of a variation that this program has made"),
        (["letter.json"], "letter.json is not JSON"),
        (["plain.wav", "--file", "01-near.wav"], "goes with a manifest only"),
        (["MANIFEST", "--file", "09-none.wav"], "lists no 09-none.wav"),
        (["MANIFEST", "--output", "new.wav"], "--output is for one take, not for 2"),
        (["MANIFEST", "--output", "plain.wav"], "plain.wav exists, and is left as it is"),
    ],
)
def test_wrong_use_is_2_with_a_sentence(
    processed: Home, pipeline: Pipeline, words: list[str], says: str
) -> None:
    write_music(Path("plain.wav"))
    Path("letter.json").write_text("Dear all")
    ended = pipeline("reproduce", *(manifest_of(processed) if one == "MANIFEST" else one for one in words))
    assert (ended.code, says in " ".join(ended.err.split())) == (2, True), ended.err
