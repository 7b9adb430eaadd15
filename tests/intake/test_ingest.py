"""From the inbox to the queue: which files are taken, which wait, and recovery after a kill."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from home_folder import sha256_of, write_music
from runner_setup import RunnerSetup, StubGenerator
from stored_tracks import claim_due

from pipeline.errors import BadAudio, DiskFull, FolderUnusable
from pipeline.fs import copying
from pipeline.fs.copying import WriteFailed
from pipeline.intake.archive import archive_files, recover_moves, restore_to_inbox
from pipeline.outbox.outbox import Outbox
from pipeline.records import Failure
from pipeline.store.schema import FileState, Track
from pipeline.workspace import InputFolder

LATER_S = 100.0


def settled_now(setup: RunnerSetup, path: Path) -> None:
    """Set the clock so that the file has just been unchanged for long enough."""
    found = path.lstat()
    setup.now = max(found.st_mtime, found.st_ctime) + setup.config.intake.settle_s + 2.1


def test_the_bytes_are_in_the_state_folder_once_a_file_is_queued(setup: RunnerSetup) -> None:
    path = write_music(setup.workspace.inbox / "a.wav")
    settled_now(setup, path)

    assert setup.scan().queued == 1
    assert sha256_of(setup.workspace.scratch(sha256_of(path)).source) == sha256_of(path)
    assert path.exists()  # until the track is finished


def test_nothing_is_taken_while_it_settles(setup: RunnerSetup) -> None:
    path = write_music(setup.workspace.inbox / "a.wav")
    setup.now = path.stat().st_mtime + setup.config.intake.settle_s / 2

    scan_result = setup.scan()

    assert (scan_result.queued, scan_result.unsettled) == (0, 1)
    assert setup.store.tracks() == []


def test_a_file_that_is_open_for_writing_is_not_taken_however_old_it_is(setup: RunnerSetup) -> None:
    path = write_music(setup.workspace.inbox / "a.wav")
    settled_now(setup, path)
    with path.open("ab"):
        assert setup.scan().unsettled == 1
    assert setup.scan().queued == 1


def test_working_copies_are_made_up_to_a_limit_of_size(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0, spool_gb=200e3 / 1e9)
    for n in range(5):
        write_music(setup.workspace.inbox / f"{n}.wav", seed=n, seconds=1.0)  # 88 kB each

    scans = []
    for _ in range(4):
        scans.append(setup.scan())
        setup.runner(StubGenerator()).drain()

    results = [(scan_result.queued, scan_result.waiting) for scan_result in scans]
    assert results == [(2, 3), (2, 1), (1, 0), (0, 0)]
    assert len(setup.store.tracks("done")) == 5


def test_a_file_larger_than_the_limit_for_copies_is_taken_alone(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0, spool_gb=1e-6)
    for n in range(2):
        write_music(setup.workspace.inbox / f"{n}.wav", seed=n)

    assert [(scan_result.queued, scan_result.waiting) for scan_result in (setup.scan(), setup.scan())] == [
        (1, 1),
        (0, 1),
    ]


def test_nothing_is_taken_when_the_disk_is_nearly_full(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0)
    write_music(setup.workspace.inbox / "a.wav")
    more_than_any_disk = setup.config.disk.model_copy(update={"min_free_mb": 1e12})
    config = setup.config.model_copy(update={"disk": more_than_any_disk})
    setup.recipe = replace(setup.recipe, config=config)

    assert isinstance(setup.scan().disk_full, DiskFull)

    assert setup.store.tracks() == []
    assert not (setup.workspace.state / "work").exists() or not list(
        (setup.workspace.state / "work").iterdir()
    )


def test_a_vanished_inbox_is_an_error_and_changes_nothing(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav")
    setup.workspace.inbox.rename(setup.workspace.home / "away")

    with pytest.raises(FolderUnusable, match="can't be read"):
        setup.scan()

    assert setup.states(hashes) == [("queued", 0)]


def test_what_finishes_while_the_inbox_is_away_is_archived_when_it_is_back(setup: RunnerSetup) -> None:
    setup.add_tracks("a.wav")
    away = setup.workspace.inbox.rename(setup.workspace.home / "away")
    setup.runner(StubGenerator()).drain()
    away.rename(setup.workspace.inbox)

    setup.scan()

    assert (setup.workspace.inbox / "done" / "a.wav").exists()


def test_a_finished_file_of_the_inbox_is_archived_when_another_folder_has_the_same_bytes(
    setup: RunnerSetup,
) -> None:
    setup.add_tracks("a.wav")
    away = setup.workspace.inbox.rename(setup.workspace.home / "away")
    setup.runner(StubGenerator()).drain()
    away.rename(setup.workspace.inbox)
    elsewhere = InputFolder(setup.workspace.home / "elsewhere", is_inbox=False)
    elsewhere.path.mkdir()
    shutil.copyfile(setup.workspace.inbox / "a.wav", elsewhere.path / "b.wav")

    setup.ingest(elsewhere, settle_s=0).scan(should_stop=lambda: False)

    assert (setup.workspace.inbox / "done" / "a.wav").exists()
    assert (elsewhere.path / "b.wav").exists()


def test_with_markers_a_file_is_taken_once_it_has_its_marker_which_is_removed_with_it(
    tmp_path: Path,
) -> None:
    setup = RunnerSetup.at(tmp_path, marker=".ok")
    write_music(setup.workspace.inbox / "a.wav")
    setup.now = LATER_S
    assert (setup.scan().queued, setup.scan().unmarked) == (0, 1)

    (setup.workspace.inbox / "a.wav.ok").touch()
    assert setup.scan().queued == 1
    setup.runner(StubGenerator()).drain()

    assert sorted(path.name for path in setup.workspace.inbox.rglob("*")) == ["a.wav", "done"]


@pytest.mark.parametrize(("subfolders", "folder"), [("flatten", "a--"), ("keep", "album/disc 1/a--")])
def test_subfolders_of_the_inbox_are_kept_in_the_outbox_or_not(
    tmp_path: Path, subfolders: str, folder: str
) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0, subfolders=subfolders)
    path = write_music(setup.workspace.inbox / "album" / "disc 1" / "a.wav")
    sha256 = sha256_of(path)
    setup.scan()
    setup.runner(StubGenerator()).drain()

    assert (setup.workspace.outbox / f"{folder}{sha256[:8]}" / "manifest.json").exists()
    assert (setup.workspace.inbox / "done" / "album" / "disc 1" / "a.wav").exists()


# -- bytes that may be part of a file still being written ------------------------------------------


@pytest.fixture
def half_written(setup: RunnerSetup) -> Path:
    """The first half of a file, taken in because it seemed to be settled."""
    path = write_music(setup.workspace.inbox / "a.wav")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (setup.workspace.home / "whole").write_bytes(whole)
    settled_now(setup, path)
    assert setup.scan().queued == 1
    return path


def test_a_file_cut_off_is_waited_for_while_it_is_new(setup: RunnerSetup, half_written: Path) -> None:
    [sha256] = [track.sha256 for track in setup.store.tracks()]
    setup.runner(StubGenerator()).drain()
    assert setup.states([sha256]) == [("queued", 0)]
    assert setup.track(sha256).not_before > setup.now

    setup.now = setup.track(sha256).not_before
    setup.runner(StubGenerator()).drain()

    assert setup.states([sha256]) == [("failed", 1)]
    assert (setup.workspace.inbox / "failed" / "a.wav").exists()


def test_a_file_that_became_complete_is_done_and_its_first_half_is_forgotten(
    setup: RunnerSetup, half_written: Path
) -> None:
    setup.runner(StubGenerator()).drain()
    half_written.write_bytes((setup.workspace.home / "whole").read_bytes())
    settled_now(setup, half_written)
    setup.scan()
    setup.now += LATER_S

    setup.runner(StubGenerator()).drain()

    [track] = setup.store.tracks()
    assert (track.state, track.sha256) == ("done", sha256_of(setup.workspace.home / "whole"))
    assert [path.name for path in setup.workspace.outbox.iterdir()] == [track.folder]


def test_a_broken_file_that_is_settled_fails_at_once(setup: RunnerSetup, half_written: Path) -> None:
    setup.now += LATER_S
    setup.runner(StubGenerator()).drain()
    assert [track.state for track in setup.store.tracks()] == ["failed"]


# -- a kill between a move and its record ----------------------------------------------------------


@pytest.mark.parametrize("ending", ["done", "failed"])
def test_a_move_that_was_not_recorded_is_found_at_the_next_start(setup: RunnerSetup, ending: str) -> None:
    [sha256] = setup.add_tracks("album/a.wav")
    claim_due(setup.store, 1, now=setup.now)
    if ending == "done":
        setup.store.finish(sha256, plan_key="p", recipe_key="r", source={}, now=setup.now)
    else:
        setup.store.fail(sha256, stage="normalize", error="is silent", now=setup.now, retry_at=None)
    target = setup.workspace.inbox / ending / "album" / "a.wav"
    target.parent.mkdir(parents=True)
    (setup.workspace.inbox / "album" / "a.wav").rename(target)

    recover_moves(setup.store, setup.workspace.inbox_files)

    [file] = setup.store.files_of(sha256)
    assert (file.state, file.moved_to) == ("settled" if ending == "done" else "aside", target)
    assert target.with_name("a.wav.error.txt").exists() == (ending == "failed")
    recover_moves(setup.store, setup.workspace.inbox_files)
    assert setup.store.files_of(sha256) == [file]


@pytest.mark.parametrize("ending", ["done", "failed"])
def test_a_file_recorded_before_its_move_is_moved_by_the_next_scan(setup: RunnerSetup, ending: str) -> None:
    [sha256] = setup.add_tracks("a.wav")
    path = setup.workspace.inbox / "a.wav"
    if ending == "done":
        setup.runner(StubGenerator()).drain()
        (setup.workspace.inbox / "done" / "a.wav").rename(path)
        setup.store.set_file_state(path, FileState.WAITING)
    else:
        claim_due(setup.store, 1, now=setup.now)
        setup.store.fail(sha256, stage="normalize", error="is silent", now=setup.now, retry_at=None)

    setup.scan()

    assert (setup.workspace.inbox / ending / "a.wav").exists()


def test_a_file_replaced_while_its_track_was_made_stays_and_is_a_new_track(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0)
    [first] = setup.add_tracks("a.wav")
    second = sha256_of(write_music(setup.workspace.inbox / "a.wav", seed=5))
    setup.runner(StubGenerator()).drain()
    assert (setup.workspace.inbox / "a.wav").exists()

    setup.scan()
    setup.runner(StubGenerator()).drain()

    assert setup.states([first, second]) == [("done", 0), ("done", 0)]


def test_what_cannot_be_moved_is_tried_again_by_the_next_scan(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0)
    [sha256] = setup.add_tracks("a.wav")
    (setup.workspace.inbox / "done").write_text("in the way")
    setup.runner(StubGenerator()).drain()
    assert setup.states([sha256]) == [("done", 0)]
    assert (setup.workspace.inbox / "a.wav").exists()

    (setup.workspace.inbox / "done").unlink()
    setup.scan()

    assert (setup.workspace.inbox / "done" / "a.wav").exists()


def test_a_file_touched_since_it_was_taken_in_is_not_moved(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    os.utime(setup.workspace.inbox / "a.wav", (1, 1))
    archive_files(
        setup.store,
        setup.store.files_of(sha256),
        setup.workspace.inbox_files,
        setup.config.intake,
        error=None,
    )
    assert (setup.workspace.inbox / "a.wav").exists()


# -- files that come again ---------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["move", "delete"])
def test_a_file_dropped_again_whose_results_are_gone_is_made_again(tmp_path: Path, after: str) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0, after=after)
    [sha256] = setup.add_tracks("a.wav")
    setup.runner(StubGenerator()).drain()
    made = setup.files(sha256)
    shutil.rmtree(setup.workspace.outbox / setup.track(sha256).folder)

    write_music(setup.workspace.inbox / "a.wav", seed=0, seconds=1.5)
    assert setup.scan().queued == 1
    setup.runner(StubGenerator()).drain()

    assert setup.files(sha256) == made


def test_a_file_brought_back_from_failed_is_tried_again(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    setup.runner(StubGenerator(lambda request: Failure(request.request_id, BadAudio("is odd")))).drain()
    failed = setup.workspace.inbox / "failed" / "a.wav"
    failed.rename(setup.workspace.inbox / "a.wav")

    recover_moves(setup.store, setup.workspace.inbox_files)
    assert setup.ingest(settle_s=0).scan(should_stop=lambda: False).queued == 1
    setup.runner(StubGenerator()).drain()

    assert setup.states([sha256]) == [("done", 0)]
    assert list((setup.workspace.inbox / "failed").iterdir()) == []


def test_an_archived_file_is_still_found_after_another_one_came_under_its_name(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0)
    [first] = setup.add_tracks("a.wav")
    setup.runner(StubGenerator()).drain()
    write_music(setup.workspace.inbox / "a.wav", seed=7)
    setup.scan()
    setup.runner(StubGenerator()).drain()

    setup.store.requeue(first, now=setup.now, stages=["normalize", "generate"])
    setup.runner(StubGenerator()).drain()

    assert setup.track(first).state == "done"


def test_a_marker_is_removed_before_its_file_so_that_it_marks_no_other_file(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, marker=".ok")
    path = write_music(setup.workspace.inbox / "a.wav")
    path.with_name("a.wav.ok").touch()
    setup.scan()
    (setup.workspace.inbox / "done").write_text("in the way of the move")

    setup.runner(StubGenerator()).drain()

    assert path.exists()
    assert not path.with_name("a.wav.ok").exists()


# -- equal bytes under several names ------------------------------------------------------------------


def scanned_names(setup: RunnerSetup, *names: str, content_seed: int = 0) -> list[str]:
    """Put the same bytes under all names and scan; returns the names of all tracks."""
    for name in names:
        write_music(setup.workspace.inbox / name, seed=content_seed, seconds=1.5)
    setup.ingest(settle_s=0).scan(should_stop=lambda: False)
    return sorted(track.name for track in setup.store.tracks())


@pytest.mark.parametrize(
    "copy",
    [
        "song (conflicted copy 2024-01-01).wav",
        "song copy.wav",
        "song (1).wav",
        "Copy of song.wav",
        "song.sync-conflict-20240101-123456-ABCDEFG.wav",
    ],
)
def test_of_equal_files_the_track_has_the_plainest_name(setup: RunnerSetup, copy: str) -> None:
    assert scanned_names(setup, copy, "song.wav") == ["song.wav"]
    [track] = setup.store.tracks()
    assert track.folder == f"song--{track.sha256[:8]}"

    setup.runner(StubGenerator()).drain()
    manifest = Outbox(setup.workspace.outbox_files).read_manifest(track.folder)
    assert manifest is not None
    assert (manifest["source"]["name"], sorted(manifest["source"]["names"])) == (
        "song.wav",
        sorted([copy, "song.wav"]),
    )


def test_a_plainer_name_that_comes_before_the_work_names_the_track(setup: RunnerSetup) -> None:
    assert scanned_names(setup, "song copy.wav") == ["song copy.wav"]
    assert scanned_names(setup, "song.wav") == ["song.wav"]
    assert scanned_names(setup, "song (2).wav") == ["song.wav"]


def test_a_plainer_name_that_comes_after_an_attempt_changes_nothing(setup: RunnerSetup) -> None:
    scanned_names(setup, "song copy.wav")
    [track] = setup.store.tracks()
    setup.store.begin_attempt(track.sha256, "normalize", now=setup.now)
    assert scanned_names(setup, "song.wav") == ["song copy.wav"]


def test_a_conflict_copy_with_other_bytes_is_a_track_of_its_own(setup: RunnerSetup) -> None:
    scanned_names(setup, "song.wav")
    conflict = "song (conflicted copy 2024-01-01).wav"
    assert scanned_names(setup, conflict, content_seed=1) == [conflict, "song.wav"]


# -- reading and writing that fails ------------------------------------------------------------------


class FailingDevice:
    """A device on which reading or writing fails, or reading is not permitted, while a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails_to_read = self.fails_to_write = self.denies_reading = False
        real = copying.copy_in

        def copy_in(path: Path, target: Path, **how: Any) -> str | None:
            if self.denies_reading:
                raise BadAudio("can't be read: permission denied")
            if self.fails_to_read:
                raise OSError(errno.EIO, "Input/output error", str(path))
            if self.fails_to_write:
                raise WriteFailed(errno.EIO, "Input/output error", str(target))
            return real(path, target, **how)

        monkeypatch.setattr(copying, "copy_in", copy_in)


def failed_to_be_read(setup: RunnerSetup, device: FailingDevice) -> Track:
    """The track of the only file in the inbox, which could not be read until it failed; now it can be."""
    ingest, device.fails_to_read = setup.ingest(), True
    for _ in range(2):
        ingest.scan(should_stop=lambda: False)
        setup.now += 31
    device.fails_to_read = False
    [track] = setup.store.tracks("failed")
    return track


def test_a_source_whose_device_fails_is_tried_again_for_a_while_and_then_fails_visibly(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, device = write_music(setup.workspace.inbox / "a.wav"), FailingDevice(monkeypatch)
    settled_now(setup, path)
    ingest, device.fails_to_read = setup.ingest(), True
    assert ingest.scan(should_stop=lambda: False).read_errors == 1

    setup.now += 29
    assert ingest.scan(should_stop=lambda: False).read_errors == 1
    setup.now += 2
    assert len(ingest.scan(should_stop=lambda: False).unreadable) == 1

    assert (setup.workspace.inbox / "failed" / "a.wav").exists()


def test_a_file_that_may_not_be_read_yet_is_tried_again_while_it_is_new(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, device = write_music(setup.workspace.inbox / "a.wav"), FailingDevice(monkeypatch)
    ingest, device.denies_reading = setup.ingest(), True
    settled_now(setup, path)
    assert ingest.scan(should_stop=lambda: False).read_errors == 1
    setup.now = path.lstat().st_ctime + 5 * setup.config.intake.settle_s - 0.1
    assert ingest.scan(should_stop=lambda: False).read_errors == 1

    device.denies_reading = False
    assert ingest.scan(should_stop=lambda: False).queued == 1


def test_a_file_that_may_not_be_read_and_is_not_new_fails(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, device = write_music(setup.workspace.inbox / "a.wav"), FailingDevice(monkeypatch)
    device.denies_reading = True
    setup.now = path.lstat().st_ctime + 5 * setup.config.intake.settle_s + 0.1
    [sha256] = setup.scan().unreadable

    assert setup.outcomes(sha256) == [("intake", "failed")]
    error = setup.workspace.inbox / "failed" / "a.wav.error.txt"
    assert error.read_text() == "a.wav can't be read: permission denied\n"


def test_a_working_copy_that_cannot_be_written_is_not_the_sources_fault(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, device = write_music(setup.workspace.inbox / "a.wav"), FailingDevice(monkeypatch)
    settled_now(setup, path)
    device.fails_to_write = True
    with pytest.raises(FolderUnusable, match="input/output error"):
        setup.scan()

    device.fails_to_write = False
    assert setup.scan().queued == 1


def test_a_file_that_could_not_be_read_is_read_again_on_request(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, device = write_music(setup.workspace.inbox / "a.wav"), FailingDevice(monkeypatch)
    settled_now(setup, path)
    track = failed_to_be_read(setup, device)

    restore_to_inbox(setup.store, track, setup.workspace.inbox_files)
    assert setup.ingest(settle_s=0).scan(should_stop=lambda: False).queued == 1
    setup.runner(StubGenerator()).drain()

    assert [track.state for track in setup.store.tracks()] == ["done"]
    assert list((setup.workspace.inbox / "failed").iterdir()) == []


def test_an_interrupted_move_leaves_no_incomplete_copies(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.add_tracks("a.wav")

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "move", half)
    setup.runner(StubGenerator()).drain()
    setup.scan()

    assert list((setup.workspace.inbox / "done").iterdir()) == []
    assert (setup.workspace.inbox / "a.wav").exists()


def test_a_file_that_could_not_be_read_gets_its_name_back_though_another_file_had_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0)
    write_music(setup.workspace.inbox / "a.wav", seed=4)
    device = FailingDevice(monkeypatch)
    track = failed_to_be_read(setup, device)
    [other] = setup.add_tracks("a.wav")
    setup.runner(StubGenerator()).drain()

    restore_to_inbox(setup.store, track, setup.workspace.inbox_files)

    assert (setup.workspace.inbox / "a.wav").exists()
    assert setup.track(other).state == "done"


def test_an_unreadable_folder_of_a_finished_track_does_not_stop_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0)
    setup.add_tracks("a.wav")
    setup.runner(StubGenerator()).drain()
    write_music(setup.workspace.inbox / "another name.wav", seed=0, seconds=1.5)
    write_music(setup.workspace.inbox / "new.wav", seed=9)

    def closed(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Outbox, "set_source_names", closed)

    assert setup.scan().queued == 1
