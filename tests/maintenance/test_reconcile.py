"""After a kill, a crash or changes by a user, records, results and working copies are made to agree."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from stored_tracks import StoredTracks, a_manifest, claim_due, tree

from pipeline.maintenance.reconcile import Finding, reconcile
from pipeline.outbox.outbox import EMBEDDING, MANIFEST

NOW = 1_700_000_000.0
NEAR, FAR = "variations/01-near.wav", "variations/02-far.wav"


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[StoredTracks]:
    made = StoredTracks.new(tmp_path)
    yield made
    made.store.close()


def check(
    stored: StoredTracks, *, thorough: bool = False, repair: bool = True, redo_missing: bool = True
) -> list[Finding]:
    return reconcile(
        stored.store,
        stored.outbox,
        stored.workspace,
        thorough=thorough,
        repair=repair,
        redo_missing=redo_missing,
        now=NOW + 100,
    )


def kinds(findings: list[Finding]) -> list[str]:
    return sorted(finding.kind for finding in findings)


@pytest.mark.parametrize("thorough", [False, True])
def test_results_that_are_as_recorded_are_neither_reported_nor_changed(
    stored: StoredTracks, thorough: bool
) -> None:
    stored.finished("a.wav", b"a", now=NOW)
    stored.finished("album/b.wav", b"b", now=NOW)
    stored.failed("c.wav", b"c", now=NOW)
    stored.arrived("d.wav", b"d", now=NOW)
    before = tree(stored.workspace.outbox)

    assert check(stored, thorough=thorough) == []
    assert tree(stored.workspace.outbox) == before
    assert stored.store.counts() == {"queued": 1, "running": 0, "done": 2, "failed": 1}


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("file", [EMBEDDING, NEAR, FAR, MANIFEST])
def test_a_missing_file_is_found_and_its_track_queued_again(
    stored: StoredTracks, file: str, thorough: bool
) -> None:
    sha256, other = stored.finished("a.wav", b"a", now=NOW), stored.finished("b.wav", b"b", now=NOW)
    (stored.folder(sha256) / file).unlink()

    [finding] = check(stored, thorough=thorough)
    assert (finding.kind, finding.mended) == ("result", True)
    assert file in finding.text
    assert (stored.state(sha256), stored.state(other)) == ("queued", "done")
    assert check(stored, thorough=thorough) == []


def test_a_folder_that_is_gone_is_queued_again(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    shutil.rmtree(stored.folder(sha256))
    assert kinds(check(stored)) == ["result"]
    assert stored.state(sha256) == "queued"


def test_a_result_of_another_size_is_found_at_every_start(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    path = stored.folder(sha256) / NEAR
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, (NOW, NOW))
    assert kinds(check(stored)) == ["result"]


def test_a_result_written_to_since_is_read_at_every_start(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    path = stored.folder(sha256) / NEAR
    content = path.read_bytes()
    path.write_bytes(content)  # only its time is new
    assert check(stored) == []

    path.write_bytes(content[:-1] + b"?")
    [finding] = check(stored)
    assert f"{NEAR} is altered" in finding.text
    assert stored.state(sha256) == "queued"


def test_a_byte_changed_without_a_new_mtime_is_found_by_a_thorough_check_only(
    stored: StoredTracks,
) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    path = stored.folder(sha256) / NEAR
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, (NOW, NOW))

    assert check(stored) == []
    assert kinds(check(stored, thorough=True)) == ["result"]
    assert stored.state(sha256) == "queued"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"embedding": ', json.dumps({"source": None, "embedding": {}}).encode()]
)
def test_a_damaged_manifest_is_made_again(stored: StoredTracks, content: bytes) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    (stored.folder(sha256) / MANIFEST).write_bytes(content)
    assert kinds(check(stored)) == ["result"]
    assert stored.state(sha256) == "queued"


def test_a_manifest_of_another_track_or_with_other_files_is_made_again(stored: StoredTracks) -> None:
    sha256, other = stored.finished("a.wav", b"a", now=NOW), stored.finished("b.wav", b"b", now=NOW)
    (stored.folder(sha256) / MANIFEST).write_bytes((stored.folder(other) / MANIFEST).read_bytes())
    manifest = stored.outbox.read_manifest(stored.folder(other).name)
    assert manifest is not None
    manifest["variations"][0]["sha256"] = "0" * 64
    (stored.folder(other) / MANIFEST).write_text(json.dumps(manifest))

    assert kinds(check(stored)) == ["result", "result"]
    assert stored.store.counts()["queued"] == 2


def test_without_repair_nothing_is_changed(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    (stored.folder(sha256) / NEAR).unlink()
    (stored.folder(sha256) / ".embedding.npz.part").write_bytes(b"x")
    stored.scratch(sha256)
    before = tree(stored.workspace.outbox)

    findings = check(stored, thorough=True, repair=False)
    assert kinds(findings) == ["leftover", "leftover", "result"]
    assert not any(finding.mended for finding in findings)
    assert tree(stored.workspace.outbox) == before
    assert stored.workspace.scratch(sha256).source.exists()
    assert stored.state(sha256) == "done"


def test_results_are_not_made_again_where_that_is_not_wanted(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    (stored.folder(sha256) / NEAR).unlink()
    [finding] = check(stored, redo_missing=False)
    assert (finding.kind, finding.mended) == ("result", False)
    assert stored.state(sha256) == "done"


def test_a_result_whose_source_is_gone_is_reported_and_the_other_files_stay(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    (stored.folder(sha256) / NEAR).unlink()
    (stored.workspace.inbox / "done" / "a.wav").unlink()
    before = tree(stored.workspace.outbox)

    [finding] = check(stored)
    assert (finding.kind, finding.mended) == ("lost", False)
    assert "source is gone" in finding.text
    assert stored.state(sha256) == "done"
    assert tree(stored.workspace.outbox) == before


def test_a_source_overwritten_by_something_of_another_size_is_gone(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    (stored.folder(sha256) / NEAR).unlink()
    (stored.workspace.inbox / "done" / "a.wav").write_bytes(b"something else")
    assert kinds(check(stored)) == ["lost"]


def test_a_working_copy_serves_as_source_and_stays(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"0123456789", now=NOW)
    (stored.folder(sha256) / NEAR).unlink()
    (stored.workspace.inbox / "done" / "a.wav").unlink()
    scratch = stored.scratch(sha256)

    assert kinds(check(stored)) == ["result"]
    assert stored.state(sha256) == "queued"
    assert (scratch / "source").exists()


def test_a_manifest_alone_needs_no_source_to_be_made_again(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    (stored.workspace.inbox / "done" / "a.wav").unlink()
    (stored.folder(sha256) / MANIFEST).unlink()
    assert kinds(check(stored)) == ["result"]
    assert stored.state(sha256) == "queued"


def test_a_manifest_and_a_result_missing_together_need_the_source(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    (stored.workspace.inbox / "done" / "a.wav").unlink()
    (stored.folder(sha256) / MANIFEST).unlink()
    (stored.folder(sha256) / FAR).unlink()
    assert kinds(check(stored)) == ["lost"]


def test_results_removed_by_gc_do_not_count_as_missing(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    shutil.rmtree(stored.folder(sha256))
    stored.store.set_collected(sha256, now=NOW)
    assert check(stored, thorough=True) == []
    assert stored.state(sha256) == "done"


def test_an_unreadable_folder_is_reported_and_left_alone(
    stored: StoredTracks, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256, other = stored.finished("a.wav", b"a", now=NOW), stored.finished("b.wav", b"b", now=NOW)
    (stored.folder(other) / NEAR).unlink()
    closed, real = stored.folder(sha256).name, stored.outbox.read_manifest

    def manifest(folder: str) -> object:
        if folder == closed:
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(stored.outbox, "read_manifest", manifest)  # root may read everything
    findings = check(stored)
    assert kinds(findings) == ["result", "unreadable"]
    assert (stored.state(sha256), stored.state(other)) == ("done", "queued")


# -- leftovers -------------------------------------------------------------------------------------


def test_temporary_files_of_a_killed_run_are_removed_and_a_users_files_stay(stored: StoredTracks) -> None:
    done, queued = stored.finished("a.wav", b"a", now=NOW), stored.arrived("album/b.wav", b"b", now=NOW)
    stored.made(queued, NEAR, 1, now=NOW, n_bytes=10)
    ours = [
        stored.folder(done) / ".manifest.json.part",
        stored.folder(done) / "variations" / ".02-far.wav.part",
    ]
    theirs = [
        stored.folder(done) / ".mix.part",
        stored.folder(done) / "variations" / "notes.part",
        stored.outbox.root / ".embedding.npz.part",
        stored.outbox.root / "album" / ".01-x.wav.part",
    ]
    for path in (*ours, *theirs):
        path.write_bytes(b"x")

    findings = check(stored)
    assert kinds(findings) == ["leftover"] * 2
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert (stored.state(done), stored.state(queued)) == ("done", "queued")


def test_a_file_of_an_interrupted_rename_stays_while_its_track_is_not_done(stored: StoredTracks) -> None:
    done, queued = stored.finished("a.wav", b"a", now=NOW), stored.arrived("b.wav", b"b", now=NOW)
    stored.made(queued, NEAR, 1, now=NOW, n_bytes=10)
    for sha256 in (done, queued):
        (stored.folder(sha256) / "variations" / ".02-far.wav.move").write_bytes(b"x")

    assert kinds(check(stored)) == ["leftover"]
    assert not (stored.folder(done) / "variations" / ".02-far.wav.move").exists()
    assert (stored.folder(queued) / "variations" / ".02-far.wav.move").exists()


def test_nothing_of_a_running_track_is_touched(stored: StoredTracks) -> None:
    sha256 = stored.arrived("a.wav", b"a", now=NOW)
    stored.made(sha256, NEAR, 1, now=NOW, n_bytes=10)
    claim_due(stored.store, 1, now=NOW)
    (stored.folder(sha256) / "variations" / ".02-far.wav.part").write_bytes(b"x")
    (stored.scratch(sha256) / "normalized.part").write_bytes(b"x")
    before = tree(stored.workspace.outbox), tree(stored.workspace.state / "work")

    assert check(stored) == []
    assert (tree(stored.workspace.outbox), tree(stored.workspace.state / "work")) == before


def test_a_folder_that_no_track_knows_is_reported_and_never_removed(stored: StoredTracks) -> None:
    folder = "album/old--01234567"
    published = stored.outbox.publish(folder, EMBEDDING, b"x")
    stored.outbox.publish_manifest(folder, a_manifest("0" * 64, [published]))
    (stored.outbox.root / "empty--89abcdef").mkdir()
    (stored.outbox.root / "not ours").mkdir()
    before = tree(stored.workspace.outbox)

    [finding] = check(stored)
    assert (finding.kind, finding.where, finding.mended) == ("unknown", folder, False)
    assert tree(stored.workspace.outbox) == before


def test_working_copies_that_nothing_needs_are_removed(stored: StoredTracks) -> None:
    done, failed = stored.finished("a.wav", b"a", now=NOW), stored.failed("b.wav", b"b", now=NOW)
    queued = stored.arrived("c.wav", b"c", now=NOW)
    for sha256 in (done, failed, queued, "f" * 64):
        stored.scratch(sha256)
    work = stored.workspace.state / "work"
    (work / ".incoming-77").write_bytes(b"x")
    (work / "somebody's").mkdir()
    (work / "somebody's" / "notes").write_bytes(b"x")

    assert kinds(check(stored)) == ["leftover"] * 4
    assert tree(work) == {f"{queued}/source": b"x" * 10, "somebody's/notes": b"x"}
    assert check(stored) == []


def test_a_leftover_that_cannot_be_removed_does_not_stop_the_start(
    stored: StoredTracks, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    stored.scratch(sha256)

    def refuse(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    [finding] = check(stored)
    assert (finding.kind, finding.mended) == ("leftover", False)
    assert "input/output error" in finding.text


def test_a_gc_that_was_killed_before_its_commit_costs_only_the_manifest(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    (stored.workspace.inbox / "done" / "a.wav").unlink()
    stored.outbox.remove_manifest(stored.folder(sha256).name)
    before = tree(stored.workspace.outbox)

    assert kinds(check(stored, thorough=True)) == ["result"]
    assert tree(stored.workspace.outbox) == before
    assert stored.state(sha256) == "queued"  # to have the manifest written, which needs no source


def test_a_gc_that_was_killed_after_its_commit_is_completed(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=NOW)
    stored.store.set_collected(sha256, now=NOW)
    stored.outbox.remove_manifest(stored.folder(sha256).name)

    assert check(stored, thorough=True) == []
    assert tree(stored.workspace.outbox) == {}
    assert stored.state(sha256) == "done"
