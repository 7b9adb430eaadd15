"""After a kill, a crash or somebody's cleaning up: records, results and working copies agree again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from stored_tracks import World, a_manifest, tree, trust

from pipeline.maintenance.reconcile import Finding, reconcile
from pipeline.maintenance.retention import ASIDE_PREFIX
from pipeline.outbox.outbox import EMBEDDING, MANIFEST

NOW = 1_700_000_000.0
NEAR, FAR = "variations/01-near.wav", "variations/02-far.wav"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World.new(tmp_path)
    yield made
    made.store.close()


def check(
    world: World, *, thorough: bool = False, repair: bool = True, redo_missing: bool = True
) -> list[Finding]:
    return reconcile(
        world.store,
        world.outbox,
        world.workplace,
        thorough=thorough,
        repair=repair,
        redo_missing=redo_missing,
        now=NOW + 100,
    )


def kinds(findings: list[Finding]) -> list[str]:
    return sorted(finding.kind for finding in findings)


@pytest.mark.parametrize("thorough", [False, True])
def test_where_all_is_as_recorded_there_is_nothing_to_say_and_nothing_to_do(
    world: World, thorough: bool
) -> None:
    world.finished("a.wav", b"a", now=NOW)
    world.finished("album/b.wav", b"b", now=NOW)
    world.failed("c.wav", b"c", now=NOW)
    world.arrived("d.wav", b"d", now=NOW)
    before = tree(world.workplace.outbox)

    assert check(world, thorough=thorough) == []
    assert tree(world.workplace.outbox) == before
    assert world.store.counts() == {"queued": 1, "running": 0, "done": 2, "failed": 1}


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("file", [EMBEDDING, NEAR, FAR, MANIFEST])
def test_a_missing_file_is_found_and_its_track_queued_again(world: World, file: str, thorough: bool) -> None:
    sha256, other = world.finished("a.wav", b"a", now=NOW), world.finished("b.wav", b"b", now=NOW)
    (world.folder(sha256) / file).unlink()

    [finding] = check(world, thorough=thorough)
    assert (finding.kind, finding.mended) == ("result", True)
    assert file in finding.text
    assert (world.state(sha256), world.state(other)) == ("queued", "done")
    assert check(world, thorough=thorough) == []


def test_a_folder_that_is_gone_is_queued_again(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    shutil.rmtree(world.folder(sha256))
    assert kinds(check(world)) == ["result"]
    assert world.state(sha256) == "queued"


def test_a_result_of_another_size_is_found_at_every_start(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    path = world.folder(sha256) / NEAR
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, (NOW, NOW))
    assert kinds(check(world)) == ["result"]


def test_a_result_written_to_since_is_read_at_every_start(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    path = world.folder(sha256) / NEAR
    content = path.read_bytes()
    path.write_bytes(content)  # only its time is new
    assert check(world) == []

    path.write_bytes(content[:-1] + b"?")
    [finding] = check(world)
    assert f"{NEAR} is altered" in finding.text
    assert world.state(sha256) == "queued"


def test_a_byte_changed_behind_the_clocks_back_is_found_by_a_thorough_check_only(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    path = world.folder(sha256) / NEAR
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, (NOW, NOW))

    assert check(world) == []
    assert kinds(check(world, thorough=True)) == ["result"]
    assert world.state(sha256) == "queued"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"embedding": ', json.dumps({"source": None, "embedding": {}}).encode()]
)
def test_a_damaged_manifest_is_made_again(world: World, content: bytes) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    (world.folder(sha256) / MANIFEST).write_bytes(content)
    assert kinds(check(world)) == ["result"]
    assert world.state(sha256) == "queued"


def test_a_manifest_of_another_track_or_with_other_files_is_made_again(world: World) -> None:
    sha256, other = world.finished("a.wav", b"a", now=NOW), world.finished("b.wav", b"b", now=NOW)
    (world.folder(sha256) / MANIFEST).write_bytes((world.folder(other) / MANIFEST).read_bytes())
    manifest = world.outbox.manifest(world.folder(other).name)
    assert manifest is not None
    manifest["variations"][0]["sha256"] = "0" * 64
    (world.folder(other) / MANIFEST).write_text(json.dumps(manifest))

    assert kinds(check(world)) == ["result", "result"]
    assert world.store.counts()["queued"] == 2


def test_without_repair_nothing_is_changed(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    (world.folder(sha256) / NEAR).unlink()
    (world.folder(sha256) / ".embedding.npz.part").write_bytes(b"x")
    world.desk(sha256)
    before = tree(world.workplace.outbox)

    findings = check(world, thorough=True, repair=False)
    assert kinds(findings) == ["leftover", "leftover", "result"]
    assert not any(finding.mended for finding in findings)
    assert tree(world.workplace.outbox) == before
    assert world.workplace.desk(sha256).source.exists()
    assert world.state(sha256) == "done"


def test_results_are_not_made_again_where_that_is_not_wanted(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    (world.folder(sha256) / NEAR).unlink()
    [finding] = check(world, redo_missing=False)
    assert (finding.kind, finding.mended) == ("result", False)
    assert world.state(sha256) == "done"


def test_a_result_whose_source_is_gone_is_reported_and_what_is_left_of_it_stays(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    (world.folder(sha256) / NEAR).unlink()
    (world.workplace.inbox / "done" / "a.wav").unlink()
    before = tree(world.workplace.outbox)

    [finding] = check(world)
    assert (finding.kind, finding.mended) == ("lost", False)
    assert "source is gone" in finding.text
    assert world.state(sha256) == "done"
    assert tree(world.workplace.outbox) == before


def test_a_source_overwritten_by_something_of_another_size_is_gone(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    (world.folder(sha256) / NEAR).unlink()
    (world.workplace.inbox / "done" / "a.wav").write_bytes(b"something else")
    assert kinds(check(world)) == ["lost"]


def test_a_working_copy_is_source_enough_and_stays_for_the_work(world: World) -> None:
    sha256 = world.finished("a.wav", b"0123456789", now=NOW)
    (world.folder(sha256) / NEAR).unlink()
    (world.workplace.inbox / "done" / "a.wav").unlink()
    desk = world.desk(sha256)

    assert kinds(check(world)) == ["result"]
    assert world.state(sha256) == "queued"
    assert (desk / "source").exists()


def test_a_manifest_alone_needs_no_source_to_be_made_again(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    (world.workplace.inbox / "done" / "a.wav").unlink()
    (world.folder(sha256) / MANIFEST).unlink()
    assert kinds(check(world)) == ["result"]
    assert world.state(sha256) == "queued"


def test_a_manifest_and_a_result_missing_together_need_the_source(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    (world.workplace.inbox / "done" / "a.wav").unlink()
    (world.folder(sha256) / MANIFEST).unlink()
    (world.folder(sha256) / FAR).unlink()
    assert kinds(check(world)) == ["lost"]


def test_results_removed_on_purpose_are_not_missed(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    shutil.rmtree(world.folder(sha256))
    assert world.store.collect(sha256, lambda: None, now=NOW)
    assert check(world, thorough=True) == []
    assert world.state(sha256) == "done"


def test_what_can_be_seen_but_not_read_is_reported_and_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256, other = world.finished("a.wav", b"a", now=NOW), world.finished("b.wav", b"b", now=NOW)
    (world.folder(other) / NEAR).unlink()
    closed, real = world.folder(sha256).name, world.outbox.manifest

    def manifest(folder: str) -> object:
        if folder == closed:
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(world.outbox, "manifest", manifest)  # root may read everything
    findings = check(world)
    assert kinds(findings) == ["result", "unreadable"]
    assert (world.state(sha256), world.state(other)) == ("done", "queued")


# -- leftovers -------------------------------------------------------------------------------------


def test_temporary_files_of_a_killed_run_are_removed_and_a_persons_files_stay(world: World) -> None:
    done, queued = world.finished("a.wav", b"a", now=NOW), world.arrived("album/b.wav", b"b", now=NOW)
    world.made(queued, NEAR, 1, now=NOW, n_bytes=10)
    ours = [
        world.folder(done) / ".manifest.json.part",
        world.folder(done) / "variations" / ".02-far.wav.part",
        world.folder(queued) / "variations" / ".02-far.wav.part",
    ]
    theirs = [
        world.folder(done) / ".mix.part",
        world.folder(done) / "variations" / "notes.part",
        world.outbox.root / ".embedding.npz.part",
        world.outbox.root / "album" / ".01-x.wav.part",
    ]
    for path in (*ours, *theirs):
        path.write_bytes(b"x")

    findings = check(world)
    assert kinds(findings) == ["leftover"] * 3
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert (world.state(done), world.state(queued)) == ("done", "queued")


def test_a_file_between_two_names_stays_while_its_track_is_not_done(world: World) -> None:
    done, queued = world.finished("a.wav", b"a", now=NOW), world.arrived("b.wav", b"b", now=NOW)
    world.made(queued, NEAR, 1, now=NOW, n_bytes=10)
    for sha256 in (done, queued):
        (world.folder(sha256) / "variations" / ".02-far.wav.move").write_bytes(b"x")

    assert kinds(check(world)) == ["leftover"]
    assert not (world.folder(done) / "variations" / ".02-far.wav.move").exists()
    assert (world.folder(queued) / "variations" / ".02-far.wav.move").exists()


def test_nothing_of_a_running_track_is_touched(world: World) -> None:
    sha256 = world.arrived("a.wav", b"a", now=NOW)
    world.made(sha256, NEAR, 1, now=NOW, n_bytes=10)
    world.store.claim(1, now=NOW)
    (world.folder(sha256) / "variations" / ".02-far.wav.part").write_bytes(b"x")
    (world.desk(sha256) / "normalized.part").write_bytes(b"x")
    before = tree(world.workplace.outbox), tree(world.workplace.state / "work")

    assert check(world) == []
    assert (tree(world.workplace.outbox), tree(world.workplace.state / "work")) == before


def test_a_folder_that_no_track_knows_is_reported_and_never_removed(world: World) -> None:
    folder = "album/old--01234567"
    published = world.outbox.publish(folder, EMBEDDING, lambda out: out.write(b"x"), verify=trust)
    world.outbox.publish_manifest(folder, a_manifest("0" * 64, [published]))
    (world.outbox.root / "empty--89abcdef").mkdir()
    (world.outbox.root / "not ours").mkdir()
    before = tree(world.workplace.outbox)

    [finding] = check(world)
    assert (finding.kind, finding.where, finding.mended) == ("stranger", folder, False)
    assert tree(world.workplace.outbox) == before


def test_working_copies_that_nothing_needs_are_removed(world: World) -> None:
    done, failed = world.finished("a.wav", b"a", now=NOW), world.failed("b.wav", b"b", now=NOW)
    queued = world.arrived("c.wav", b"c", now=NOW)
    for sha256 in (done, failed, queued, "f" * 64):
        world.desk(sha256)
    work = world.workplace.state / "work"
    (work / queued / "normalized.part").write_bytes(b"x")
    (work / ".incoming-77").write_bytes(b"x")
    (work / "somebody's").mkdir()
    (work / "somebody's" / "notes").write_bytes(b"x")

    assert kinds(check(world)) == ["leftover"] * 5
    assert tree(work) == {f"{queued}/source": b"x" * 10, "somebody's/notes": b"x"}
    assert check(world) == []


def test_a_leftover_that_cannot_be_removed_keeps_nothing_from_starting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    world.desk(sha256)

    def refuse(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    [finding] = check(world)
    assert (finding.kind, finding.mended) == ("leftover", False)
    assert "input/output error" in finding.text


def test_a_gc_that_was_killed_before_its_commit_is_undone(world: World) -> None:
    sha256 = world.finished("a.wav", b"a", now=NOW)
    before = tree(world.workplace.outbox)
    aside = world.outbox.root / f"{ASIDE_PREFIX}{sha256}"
    world.folder(sha256).rename(aside)

    assert check(world, thorough=True) == []
    assert tree(world.workplace.outbox) == before
    assert world.state(sha256) == "done"
