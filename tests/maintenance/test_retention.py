"""What `gc` removes, and what it must not remove."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stored_tracks import StoredTracks, claim_due, tree

from pipeline.config import Retention
from pipeline.maintenance import retention
from pipeline.maintenance.retention import DAY_S, Removable, collect
from pipeline.outbox.outbox import MANIFEST, Outbox
from pipeline.store.schema import FileState, Rating
from pipeline.store.store import Store

NOW = time.time() + 1000 * DAY_S  # files get their times from the system, so "now" lies in the future
OLD, YOUNG = NOW - 40 * DAY_S, NOW - 10 * DAY_S


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[StoredTracks]:
    made = StoredTracks.new(tmp_path)
    yield made
    made.store.close()


def gc(stored: StoredTracks, *, dry_run: bool = False, now: float = NOW, **settings: Any) -> list[Removable]:
    wanted = Retention.model_validate({"work_days": None, **settings})
    return collect(stored.store, stored.workspace, wanted, now=now, dry_run=dry_run)


def names(removals: list[Removable]) -> list[str]:
    return [removal.path.name for removal in removals]


def everything(stored: StoredTracks) -> dict[str, bytes]:
    database = stored.workspace.database.name
    return {
        name: c for name, c in tree(stored.workspace.home).items() if not name.startswith(f"state/{database}")
    }


ALL = {"work_days": 0.0, "archive_days": 0.0, "archive_gb": 0.0, "outbox_days": 0.0, "outbox_gb": 0.0}


def test_by_default_only_working_copies_are_ever_removed(stored: StoredTracks) -> None:
    done = stored.finished("a.wav", b"a", now=OLD)
    stored.failed("b.wav", b"b", now=OLD)
    before = everything(stored)
    stored.scratch(done, age_s=8 * DAY_S, now=NOW)

    removals = collect(stored.store, stored.workspace, Retention(), now=NOW, dry_run=False)
    assert [removal.what for removal in removals] == ["working copy"]
    assert set(everything(stored)) - set(before) <= {"state/work/"}
    assert before.items() <= everything(stored).items()


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_queued_or_running_is_never_touched(stored: StoredTracks, dry_run: bool) -> None:
    running = stored.finished("a.wav", b"a", now=OLD)
    stored.store.requeue(running, now=OLD)
    claim_due(stored.store, 1, now=NOW)
    queued = stored.failed("b.wav", b"b", now=OLD)
    stored.store.requeue(queued, now=OLD)
    stored.arrived("c.wav", b"c", now=OLD)
    for sha256 in (running, queued):
        stored.scratch(sha256, age_s=100 * DAY_S, now=NOW)
    before = everything(stored)

    assert gc(stored, dry_run=dry_run, **ALL) == []
    assert everything(stored) == before


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(stored: StoredTracks) -> None:
    done, failed = stored.finished("a.wav", b"a", now=OLD), stored.failed("b.wav", b"b", now=OLD)
    stored.scratch(done, age_s=DAY_S, now=NOW)
    stored.scratch(failed, age_s=DAY_S, now=NOW)
    before = everything(stored)

    said = gc(stored, dry_run=True, **ALL)
    assert everything(stored) == before
    assert sorted({removal.what for removal in said}) == ["archive", "outbox", "working copy"]
    assert gc(stored, **ALL) == said
    assert tree(stored.workspace.inbox) == {"done/": b"", "failed/": b""}
    assert tree(stored.workspace.outbox) == {}
    assert tree(stored.workspace.state / "work") == {}
    assert gc(stored, **ALL) == []


# -- the outbox ------------------------------------------------------------------------------------


def test_results_are_removed_by_age(stored: StoredTracks) -> None:
    old, young = stored.finished("old.wav", b"o", now=OLD), stored.finished("young.wav", b"y", now=YOUNG)
    folder = stored.folder(old)

    [removal] = gc(stored, outbox_days=30.0)
    assert (removal.what, removal.path, removal.why) == ("outbox", folder, "older than 30 days")
    assert removal.bytes > 300
    assert not folder.exists()
    assert stored.folder(young).exists()
    collected = [stored.store.track(sha256).collected_at for sha256 in (old, young)]  # type: ignore[union-attr]
    assert collected == [NOW, None]
    assert stored.state(old) == "done"


def test_results_are_removed_by_size_oldest_first_and_no_more_than_needed(stored: StoredTracks) -> None:
    made = [stored.finished(f"{n}.wav", b"%d" % n, now=OLD + n, wav_bytes=1_000_000) for n in (3, 1, 2, 0)]
    removals = gc(stored, outbox_gb=0.0065)  # four tracks of 3 MB and little more

    assert [removal.path.name[:1] for removal in removals] == ["0", "1"]
    assert all(removal.why == "the oldest beyond 0.0065 GB" for removal in removals)
    assert [stored.folder(sha256).exists() for sha256 in made] == [True, False, True, False]


def test_what_may_not_be_removed_counts_towards_the_size(stored: StoredTracks) -> None:
    queued = stored.finished("q.wav", b"q", now=OLD, wav_bytes=1_000_000)
    stored.store.requeue(queued, now=NOW)
    stored.finished("a.wav", b"a", now=OLD, wav_bytes=1_000_000)
    assert len(gc(stored, outbox_gb=0.004)) == 1
    assert stored.folder(queued).exists()


def test_a_persons_files_in_a_tracks_folder_stay(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=OLD)
    notes = stored.folder(sha256) / "variations" / "notes.txt"
    notes.write_bytes(b"mine")
    assert len(gc(stored, outbox_days=30.0)) == 1
    assert tree(stored.workspace.outbox) == {f"{stored.folder(sha256).name}/variations/notes.txt": b"mine"}


def test_folders_of_albums_are_removed_only_when_they_are_empty(stored: StoredTracks) -> None:
    stored.finished("x/y/a.wav", b"a", now=OLD)
    stored.finished("x/b.wav", b"b", now=YOUNG)
    assert len(gc(stored, outbox_days=30.0)) == 1
    assert not (stored.outbox.root / "x" / "y").exists()
    assert (stored.outbox.root / "x").exists()

    assert len(gc(stored, outbox_days=5.0)) == 1
    assert tree(stored.workspace.outbox) == {}


def test_a_track_that_was_queued_since_it_was_listed_keeps_its_results(
    stored: StoredTracks, monkeypatch: pytest.MonkeyPatch
) -> None:
    requeued, again = stored.finished("a.wav", b"a", now=OLD), stored.finished("b.wav", b"b", now=OLD)
    before, real = everything(stored), retention._thin_out

    def meanwhile(*args: Any, **kwargs: Any) -> list[Removable]:
        other = Store(stored.workspace.database)  # another process
        other.requeue(requeued, now=NOW)
        other.requeue(again, now=NOW - 1)
        claim_due(other, 1, now=NOW)
        other.finish(again, plan_key="plan", recipe_key="r", source={}, now=NOW)
        other.close()
        return real(*args, **kwargs)

    monkeypatch.setattr(retention, "_thin_out", meanwhile)
    assert gc(stored, outbox_days=30.0) == []
    assert everything(stored) == before
    assert (stored.state(requeued), stored.state(again)) == ("queued", "done")


def test_results_whose_manifest_cannot_be_removed_stay_complete_and_others_are_removed(
    stored: StoredTracks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, other = stored.finished("a.wav", b"a", now=OLD), stored.finished("b.wav", b"b", now=OLD + 1)
    before, real = tree(stored.folder(stuck)), Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == stored.folder(stuck) / MANIFEST:
            raise OSError(5, "Input/output error", str(path))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    [removal] = gc(stored, outbox_days=30.0)
    assert removal.path == stored.folder(other)
    assert tree(stored.folder(stuck)) == before
    assert "can't be removed" in caplog.text
    assert stored.store.track(stuck).collected_at is None  # type: ignore[union-attr]


def test_a_result_that_cannot_be_removed_is_removed_by_the_next_gc(
    stored: StoredTracks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sha256 = stored.finished("a.wav", b"a", now=OLD)
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "01-near.wav":
            raise OSError(5, "Input/output error", str(path))
        real(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        assert gc(stored, outbox_days=30.0) == []
    assert "can't be removed" in caplog.text
    left = tree(stored.folder(sha256))
    assert "variations/01-near.wav" in left  # in a folder that doesn't count as complete
    assert MANIFEST not in left

    gc(stored)
    assert tree(stored.workspace.outbox) == {}


def test_a_commit_that_fails_costs_only_the_manifest(
    stored: StoredTracks, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = stored.finished("a.wav", b"a", now=OLD)
    before, real = tree(stored.folder(sha256)), Outbox.remove_manifest

    def remove_and_fail(outbox: Outbox, folder: str) -> None:
        real(outbox, folder)
        raise OSError(28, "No space left on device")  # within the transaction, as its commit would raise it

    monkeypatch.setattr(Outbox, "remove_manifest", remove_and_fail)
    assert gc(stored, outbox_days=30.0) == []
    del before[MANIFEST]
    assert tree(stored.folder(sha256)) == before
    assert stored.store.track(sha256).collected_at is None  # type: ignore[union-attr]


# A `gc` that was killed after the commit leaves a collected track's results without their manifest.


def test_a_gc_killed_before_the_deletion_is_completed_by_the_next(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=OLD)
    stored.store.set_collected(sha256, now=NOW)
    stored.outbox.remove_manifest(stored.folder(sha256).name)
    assert gc(stored, dry_run=True) == []
    assert tree(stored.folder(sha256)) != {}
    assert gc(stored) == []
    assert tree(stored.workspace.outbox) == {}


def test_after_a_killed_gc_the_results_of_a_track_queued_since_stay(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=OLD)
    stored.store.set_collected(sha256, now=NOW)
    stored.outbox.remove_manifest(stored.folder(sha256).name)
    before = tree(stored.workspace.outbox)
    stored.store.requeue(sha256, now=NOW)
    assert gc(stored) == []
    assert tree(stored.workspace.outbox) == before


def test_results_that_a_person_brought_back_after_their_removal_stay(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=OLD)
    before = tree(stored.workspace.outbox)
    stored.store.set_collected(sha256, now=NOW)  # as if all had been removed and then copied back
    gc(stored, outbox_days=0.0)
    assert tree(stored.workspace.outbox) == before


# -- the archive -----------------------------------------------------------------------------------


def test_sources_in_the_archive_are_removed_by_age_with_their_error_files(stored: StoredTracks) -> None:
    stored.finished("album/old.wav", b"o", now=OLD)
    stored.failed("album/bad.wav", b"bb", now=OLD)
    stored.finished("young.wav", b"y", now=YOUNG)
    outbox = tree(stored.workspace.outbox)

    removals = gc(stored, archive_days=30.0)
    assert sorted(names(removals)) == ["bad.wav", "old.wav"]
    assert {removal.path.name: removal.bytes for removal in removals} == {"old.wav": 1, "bad.wav": 2 + 10}
    assert tree(stored.workspace.inbox / "done") == {"young.wav": b"y"}
    assert tree(stored.workspace.inbox / "failed") == {}
    assert tree(stored.workspace.outbox) == outbox


def test_sources_in_the_archive_are_removed_by_size_oldest_first(stored: StoredTracks) -> None:
    for n in (2, 0, 1):
        stored.finished(f"{n}.wav", b"%d" % n * 1000, now=OLD + n)
    assert names(gc(stored, archive_gb=2.5e-6)) == ["0.wav"]
    assert names(gc(stored, archive_gb=0.0)) == ["1.wav", "2.wav"]


def test_the_age_of_a_later_copy_begins_when_it_was_archived(stored: StoredTracks) -> None:
    stored.finished("a.wav", b"a", now=1000.0)  # finished long ago, moved there just now
    assert gc(stored, now=time.time(), archive_days=30.0) == []
    assert len(gc(stored, archive_days=30.0)) == 1


def test_files_that_the_store_does_not_know_are_left_alone(stored: StoredTracks) -> None:
    stored.finished("a.wav", b"a", now=OLD)
    theirs = [
        stored.workspace.inbox / "done" / "mine.wav",
        stored.workspace.inbox / "failed" / "a.wav.error.txt",
        stored.workspace.inbox / "new.wav",
    ]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert names(gc(stored, archive_days=0.0, archive_gb=0.0)) == ["a.wav"]
    assert all(path.exists() for path in theirs)


def test_a_source_that_stayed_in_the_inbox_is_no_archive(stored: StoredTracks) -> None:
    sha256 = stored.arrived("kept.wav", b"k", now=OLD)
    claim_due(stored.store, 1, now=OLD)
    stored.store.finish(sha256, plan_key="plan", recipe_key="r", source={}, now=OLD)
    stored.store.set_file_state(stored.workspace.inbox / "kept.wav", FileState.SETTLED)
    assert gc(stored, archive_days=0.0, archive_gb=0.0) == []
    assert (stored.workspace.inbox / "kept.wav").exists()


@pytest.mark.parametrize("content", [b"other", b"b"])
def test_another_file_under_an_archived_name_is_left_alone(stored: StoredTracks, content: bytes) -> None:
    stored.finished("a.wav", b"a", now=OLD)
    path = stored.workspace.inbox / "done" / "a.wav"
    path.write_bytes(content)
    os.utime(path, (OLD, OLD))
    assert gc(stored, archive_days=0.0) == []
    assert path.exists()


def test_an_archive_behind_a_link_is_left_alone(stored: StoredTracks, tmp_path: Path) -> None:
    stored.finished("album/a.wav", b"a", now=OLD)
    album, elsewhere = stored.workspace.inbox / "done" / "album", tmp_path / "elsewhere"
    album.rename(elsewhere)
    album.symlink_to(elsewhere)
    assert gc(stored, archive_days=0.0) == []
    assert (elsewhere / "a.wav").exists()


def test_a_source_queued_since_it_was_listed_stays(
    stored: StoredTracks, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256, other = stored.failed("a.wav", b"a", now=OLD), stored.failed("b.wav", b"b", now=OLD)
    real = retention._thin_out

    def meanwhile(*args: Any, **kwargs: Any) -> list[Removable]:
        elsewhere = Store(stored.workspace.database)
        elsewhere.requeue(sha256, now=NOW)
        elsewhere.close()
        return real(*args, **kwargs)

    monkeypatch.setattr(retention, "_thin_out", meanwhile)
    assert names(gc(stored, archive_days=30.0)) == ["b.wav"]
    assert (stored.workspace.inbox / "failed" / "a.wav").exists()
    assert (stored.workspace.inbox / "failed" / "a.wav.error.txt").exists()
    assert stored.state(other) == "failed"


# -- working copies --------------------------------------------------------------------------------


def test_working_copies_that_nothing_needs_are_removed_by_age(stored: StoredTracks) -> None:
    done, failed = stored.finished("a.wav", b"a", now=OLD), stored.failed("b.wav", b"b", now=OLD)
    stored.scratch(done, age_s=8 * DAY_S, now=NOW)
    stored.scratch(failed, age_s=6 * DAY_S, now=NOW)
    stored.scratch("f" * 64, age_s=9 * DAY_S, now=NOW)

    removals = gc(stored, work_days=7.0)
    assert names(removals) == ["f" * 64, done]
    assert [removal.bytes for removal in removals] == [10, 10]
    assert tree(stored.workspace.state / "work") == {f"{failed}/source": b"x" * 10}


def test_a_working_copy_that_is_being_made_is_left_alone(stored: StoredTracks) -> None:
    work = stored.workspace.state / "work"
    stored.scratch("f" * 64, age_s=0.5 * DAY_S, now=NOW)
    for name, age_s in ((".incoming-1", 0.5 * DAY_S), (".incoming-2", 2 * DAY_S), ("notes", 99 * DAY_S)):
        (work / name).write_bytes(b"x")
        os.utime(work / name, (NOW - age_s, NOW - age_s))
    assert names(gc(stored, work_days=0.0)) == [".incoming-2"]
    assert sorted(path.name for path in work.iterdir()) == [".incoming-1", "f" * 64, "notes"]


@pytest.fixture
def unfinished(stored: StoredTracks) -> Path:
    """The folder in which an engine stores unfinished variations, with an old file and a fresh one."""
    folder = stored.workspace.state / "engines" / "musicgen" / "unfinished"
    folder.mkdir(parents=True)
    for name, age_s in (("old", 8 * DAY_S), ("fresh", 0.5 * DAY_S)):
        (folder / name).write_bytes(b"x" * 10)
        os.utime(folder / name, (NOW - age_s, NOW - age_s))
    (folder.parent / "kept").write_bytes(b"x")
    return folder


@pytest.mark.parametrize("work_days", [0.0, 7.0])
def test_what_an_engine_has_stored_of_an_unfinished_variation_is_removed_when_it_is_old(
    stored: StoredTracks, unfinished: Path, work_days: float
) -> None:
    said = gc(stored, dry_run=True, work_days=work_days)
    assert sorted(tree(unfinished.parent)) == ["kept", "unfinished/fresh", "unfinished/old"]

    [removal] = removals = gc(stored, work_days=work_days)
    assert (removal.what, removal.path, removal.bytes) == ("unfinished", unfinished / "old", 10)
    assert said == removals
    assert sorted(tree(unfinished.parent)) == ["kept", "unfinished/fresh"]


def test_what_an_engine_has_stored_again_since_it_was_listed_stays(
    stored: StoredTracks, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = retention._thin_out

    def meanwhile(*args: Any, **kwargs: Any) -> list[Removable]:
        os.utime(unfinished / "old", (NOW, NOW))
        return real(*args, **kwargs)

    monkeypatch.setattr(retention, "_thin_out", meanwhile)
    assert gc(stored, work_days=7.0) == []
    assert (unfinished / "old").exists()


def test_a_working_copy_is_as_young_as_its_youngest_file(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=OLD)
    scratch = stored.scratch(sha256, age_s=90 * DAY_S, now=NOW)
    os.utime(scratch / "source", (NOW - DAY_S, NOW - DAY_S))
    assert gc(stored, work_days=7.0) == []


def test_results_that_were_rated_as_kept_are_set_aside_before_they_are_removed(stored: StoredTracks) -> None:
    sha256 = stored.finished("a.wav", b"a", now=OLD)
    folder = stored.folder(sha256)
    content = (folder / "variations/01-near.wav").read_bytes()
    for file, is_kept in (("variations/01-near.wav", True), ("variations/02-far.wav", False)):
        of_file = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        stored.store.rate([Rating(of_file, sha256, file, None, is_kept, "")], now=OLD)

    assert gc(stored, outbox_days=0.0, dry_run=True) and set(tree(folder)) >= {MANIFEST}
    assert names(gc(stored, outbox_days=0.0)) == [folder.name]

    [(name, aside)] = tree(folder).items()
    assert name.startswith("kept/01-near-") and aside == content
    assert gc(stored, outbox_days=0.0) == []
    assert set(tree(folder)) == {name}
