"""From files in a folder to results in the outbox, through the command line, with the weight-free engines."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from home_folder import FAR, NEAR, Home, RunResult, contents, run, sha256_of, write_music

Once = Callable[..., RunResult]


@pytest.fixture
def once(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated: None
) -> Iterator[Once]:
    def run_once(*folder: Path, of: Home = home, verb: str = "once") -> RunResult:
        return run(capsys, monkeypatch, of, verb, *folder)

    return run_once


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Path]:
    """A home after `once DIR`, started as people start it, and the track in that folder."""
    folder = tmp_path_factory.mktemp("batch")
    home = Home(folder / "home")
    home.configure()
    source = write_music(folder / "music" / "Slow Song.wav")
    ended = home.in_child("once", source.parent)
    assert (ended.code, ended.err.count("Traceback")) == (0, 0), ended.err
    return home, source


def test_once_on_a_folder_writes_the_outbox_and_leaves_the_folder_alone(batch: tuple[Home, Path]) -> None:
    home, source = batch
    assert [path.name for path in source.parent.iterdir()] == ["Slow Song.wav"]
    [folder] = home.folders
    assert folder.name == f"Slow Song--{sha256_of(source)[:8]}"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "embedding.npz",
        "manifest.json",
        "variations.npz",
        "variations/01-near.wav",
        "variations/02-far.wav",
    ]


def test_the_manifest_says_what_lies_in_the_folder(batch: tuple[Home, Path]) -> None:
    home, source = batch
    made, [folder] = home.manifest(), home.folders
    assert made["source"].items() >= {
        "name": "Slow Song.wav", "sha256": sha256_of(source), "duration_s": 3.0,
        "sample_rate": 22050, "channels": 2,
    }.items()  # fmt: skip
    assert {"config_sha256", "created_at"} <= made.keys()
    assert made["embedding"]["engine"] == "descriptors"
    assert {"model", "revision", "version", "dim"} <= made["embedding"].keys()
    assert [one["name"] for one in made["variations"]] == ["near", "far"]
    for one in made["variations"]:
        assert (one["engine"], one["model"], one["revision"]) == ("remix", None, None)
        assert {"seed", "params", "version", "license", "peak_dbfs", "loudness_lufs"} <= one.keys()
        info = soundfile.info(folder / one["file"])
        assert info.frames == (2 * 22050)  # the asked length, to the sample
        assert (info.samplerate, info.duration) == (one["sample_rate"], one["duration_s"])
    for one in [made["embedding"], *made["variations"]]:
        assert sha256_of(folder / one["file"]) == one["sha256"]


def test_the_embedding_file_has_unit_vectors_and_their_times(batch: tuple[Home, Path]) -> None:
    home, _ = batch
    dim, [folder] = home.manifest()["embedding"]["dim"], home.folders
    with np.load(folder / "embedding.npz", allow_pickle=False) as loaded:
        track, windows, times_s = loaded["track"], loaded["windows"], loaded["times_s"]
    assert {array.dtype for array in (track, windows, times_s)} == {np.dtype(np.float32)}
    assert track.shape == (dim,)
    assert windows.shape == (len(times_s), dim)
    assert times_s.shape == (len(times_s), 2)
    np.testing.assert_allclose(np.linalg.norm([track, *windows], axis=1), 1.0, atol=1e-5)


def test_the_inbox_is_emptied_into_done(home: Home, once: Once) -> None:
    write_music(home.inbox / "album" / "a.wav")

    assert once().code == 0

    assert [str(p.relative_to(home.inbox)) for p in home.inbox.rglob("*.wav")] == ["done/album/a.wav"]
    assert home.manifest()["source"]["names"] == ["album/a.wav"]


def test_a_file_that_is_no_audio_is_moved_to_failed_with_the_reason_and_others_are_done(
    home: Home, once: Once
) -> None:
    (home.inbox / "letter.mp3").write_text("Dear all, this is not music.\n" * 20)
    write_music(home.inbox / "a.wav")

    ended = once()

    assert ended.code == 1
    assert (home.inbox / "failed" / "letter.mp3").exists()
    reason = (home.inbox / "failed" / "letter.mp3.error.txt").read_text()
    assert reason.startswith("letter.mp3 ")
    assert reason.count("\n") == 1
    assert "1 done, 1 failed" in ended.out
    assert home.manifest()["source"]["name"] == "a.wav"


def test_a_second_run_makes_nothing_again(home: Home, once: Once, tmp_path: Path) -> None:
    source = write_music(tmp_path / "music" / "a.wav")
    once(source.parent)
    [folder] = home.folders
    before = home.finished_at(), (folder / "manifest.json").stat().st_mtime_ns
    assert len(before[0]) == 5  # normalized, embedded, two variations, these embedded

    ended = once(source.parent)

    assert (ended.code, "0 done, 0 failed, 1 up to date" in ended.out) == (0, True)
    assert (home.finished_at(), (folder / "manifest.json").stat().st_mtime_ns) == before


def test_a_changed_parameter_makes_that_variation_alone_again(home: Home, once: Once, tmp_path: Path) -> None:
    source = write_music(tmp_path / "music" / "a.wav")
    once(source.parent)
    before, [folder] = home.finished_at("embed", "generate"), home.folders
    kept = (folder / "variations/01-near.wav").stat().st_ino

    home.configure(NEAR, {**FAR, "temperature": 1.5})
    assert once(source.parent).code == 0

    after = home.finished_at("embed", "generate")
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + 1
    assert (folder / "variations/01-near.wav").stat().st_ino == kept
    assert [one["params"]["temperature"] for one in home.manifest()["variations"]] == [0.4, 1.5]


def test_a_removed_and_a_moved_variation_leave_no_old_file(home: Home, once: Once, tmp_path: Path) -> None:
    source = write_music(tmp_path / "music" / "a.wav")
    once(source.parent)
    [folder] = home.folders
    before = contents(folder)

    home.configure(FAR)
    once(source.parent)

    assert contents(folder) == {
        "embedding.npz": before["embedding.npz"],
        "variations.npz": contents(folder)["variations.npz"],
        "variations/01-far.wav": before["variations/02-far.wav"],
    }


def test_a_lost_result_is_made_again_with_the_same_bytes(
    home: Home,
    once: Once,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_music(tmp_path / "music" / "a.wav")
    once(source.parent)
    [folder] = home.folders
    before = contents(folder)
    (folder / "variations/02-far.wav").unlink()

    run(capsys, monkeypatch, home, "requeue", "a.wav")
    assert once(source.parent).code == 0

    assert contents(folder) == before


def test_the_same_bytes_under_two_names_are_one_track(home: Home, once: Once, tmp_path: Path) -> None:
    source = write_music(tmp_path / "music" / "a.wav")
    shutil.copy(source, source.with_name("b.wav"))

    assert once(source.parent).code == 0

    assert home.manifest()["source"]["names"] == ["a.wav", "b.wav"]


def test_another_name_that_comes_later_is_added_to_the_manifest_and_nothing_is_made_again(
    home: Home, once: Once
) -> None:
    source = write_music(home.inbox / "a.wav")
    data = source.read_bytes()
    once()
    before = home.finished_at()
    (home.inbox / "later.wav").write_bytes(data)

    assert once().code == 0

    assert home.manifest()["source"]["names"] == ["a.wav", "later.wav"]
    assert home.finished_at() == before
    assert (home.inbox / "done" / "later.wav").exists()


def test_two_files_of_one_name_are_two_tracks(home: Home, once: Once, tmp_path: Path) -> None:
    for seed, album in enumerate(("one", "two")):
        write_music(tmp_path / "music" / album / "intro.wav", seed=seed)

    assert once(tmp_path / "music").code == 0

    names = [json.loads((f / "manifest.json").read_text())["source"]["names"] for f in home.folders]
    assert sorted(names) == [["one/intro.wav"], ["two/intro.wav"]]
    assert len({f.name for f in home.folders}) == 2


def test_another_home_and_another_batch_give_the_same_bytes(home: Home, once: Once, tmp_path: Path) -> None:
    source = write_music(tmp_path / "alone" / "a.wav")
    other = Home(tmp_path / "elsewhere")
    other.configure()
    write_music(tmp_path / "together" / "0.wav", seed=1)
    shutil.copy(source, tmp_path / "together" / "a.wav")

    once(source.parent)
    once(tmp_path / "together", of=other)

    [alone] = home.folders
    assert contents(other.outbox / alone.name) == contents(alone)


def test_after_keep_leaves_the_inbox_as_it_is(home: Home, once: Once) -> None:
    home.configure(intake={"settle_s": 0, "after": "keep"})
    write_music(home.inbox / "a.wav")

    assert (once().code, "1 up to date" in once().out) == (0, True)
    assert [p.name for p in home.inbox.iterdir()] == ["a.wav"]


def test_the_inbox_named_as_the_folder_is_still_the_inbox(home: Home, once: Once) -> None:
    write_music(home.inbox / "a.wav")

    assert once(home.inbox).code == 0
    assert "0 done, 0 failed; " in once(home.inbox).out  # what lies in done/ is not taken for input
    assert [str(p.relative_to(home.inbox)) for p in home.inbox.rglob("*.wav")] == ["done/a.wav"]


def test_after_delete_removes_the_source_and_a_requeue_without_it_is_refused(
    home: Home, once: Once, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home.configure(intake={"settle_s": 0, "after": "delete"})
    write_music(home.inbox / "gone.wav")
    assert once().code == 0
    assert list(home.inbox.iterdir()) == []
    before = contents(home.outbox)
    assert len(before) == 4

    refused = run(capsys, monkeypatch, home, "requeue", "gone", "--stage", "generate")

    assert (refused.code, refused.out) == (1, "")
    assert "its source is gone" in refused.err
    assert once().code == 0
    assert contents(home.outbox) == before
    assert home.manifest()["source"]["name"] == "gone.wav"


@pytest.mark.parametrize("kind", ["flac", "mp3", "opus"])
def test_another_output_format_replaces_the_files_and_reruns_to_the_same_bytes(
    home: Home, once: Once, tmp_path: Path, kind: str
) -> None:
    source = write_music(tmp_path / "music" / "a.wav")
    assert once(source.parent).code == 0
    home.configure(NEAR, output={"format": kind, "sample_rate": 48000})
    assert once(source.parent).code == 0
    [record], [folder] = home.manifest()["variations"], home.folders
    assert [path.name for path in (folder / "variations").iterdir()] == [f"01-near.{kind}"]
    assert record["file"] == f"variations/01-near.{kind}"
    info = soundfile.info(folder / record["file"])
    assert (info.samplerate, info.frames) == (record["sample_rate"], 2 * 48000)
    before = contents(folder)
    (folder / record["file"]).unlink()
    assert once(source.parent).code == 0
    assert contents(folder) == before


def test_a_loop_says_so_in_the_manifest_and_in_the_file(home: Home, once: Once, tmp_path: Path) -> None:
    source = write_music(tmp_path / "music" / "a.wav", seconds=12.0)
    home.configure(NEAR, generate={"duration_s": 4}, output={"loop": True, "format": "flac"})
    assert once(source.parent).code == 0
    [record], [folder] = home.manifest()["variations"], home.folders
    assert record["loop"].keys() == {"similarity", "level_step_db"}
    assert record["tempo_bpm"] == pytest.approx(120, abs=1)
    assert record["duration_s"] == pytest.approx(2.0 * record["bars"], abs=0.03)
    with av.open(folder / record["file"]) as file:
        tags = file.metadata
    assert (tags["BPM"], tags["LOOPSTART"]) == ("120", "0")
    assert record["key"].startswith(tags["KEY"].rstrip("m") + " ")
    assert tags["LOOPLENGTH"] == str(soundfile.info(folder / record["file"]).frames)
    home.configure(NEAR, generate={"duration_s": 4}, output={"loop": True})
    assert once(source.parent).code == 0
    wav = (folder / "variations" / "01-near.wav").read_bytes()
    assert b"smpl" in wav


def test_the_joins_of_a_remix_are_cue_points(home: Home, once: Once, tmp_path: Path) -> None:
    source = write_music(tmp_path / "music" / "a.wav", seconds=8.0)
    home.configure(FAR, generate={"duration_s": 12})
    assert once(source.parent).code == 0
    [record], [folder] = home.manifest()["variations"], home.folders
    wav = (folder / record["file"]).read_bytes()
    points = struct.unpack_from("<I", wav, wav.index(b"cue ") + 8)[0]
    assert points == len(record["details"]["joins"]) > 0


def test_records_are_made_again_from_the_outbox_so_that_nothing_is_made_twice(
    home: Home, once: Once, tmp_path: Path
) -> None:
    home.configure({**NEAR, "count": 2}, FAR, gates={"max_shared": None})
    tracks = tmp_path / "tracks"
    for n in range(2):
        write_music(tracks / f"{n}.wav", seed=n)
    assert once(tracks).code == 0
    before, units = contents(home.outbox), home.finished_at()
    manifests = {path: path.read_bytes() for path in home.outbox.rglob("manifest.json")}
    shutil.rmtree(home.folder / "state")

    said = once(verb="rebuild")
    assert said.code == 0
    assert said.out.splitlines()[-1] == "2 tracks recorded"
    again = once(tracks)

    assert "2 up to date" in again.out
    assert set(home.finished_at()) == set(units)
    assert contents(home.outbox) == before
    assert {path: path.read_bytes() for path in manifests} == manifests
    assert once(verb="rebuild").out.splitlines() == ["0 tracks recorded"]
