"""From the inbox to the queue: what is taken, what waits, and what a kill in between leaves."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from home_folder import sha256_of, write_music
from runner_setup import Answers, Works

from pipeline.errors import BadAudio, DiskFull, FolderUnusable
from pipeline.fs import copying
from pipeline.fs.copying import WriteFailed
from pipeline.intake.archive import bring_back, finish_moves, put_away
from pipeline.outbox.outbox import Outbox
from pipeline.records import Failure

LATER_S = 100.0


def settled_now(works: Works, path: Path) -> None:
    """Set the clock so that the file has just rested for long enough."""
    found = path.lstat()
    works.now = max(found.st_mtime, found.st_ctime) + works.config.intake.settle_s + 2.1


def test_the_bytes_are_in_the_state_folder_once_a_file_is_queued(works: Works) -> None:
    path = write_music(works.workplace.inbox / "a.wav")
    settled_now(works, path)

    assert works.look().queued == 1
    assert sha256_of(works.workplace.desk(sha256_of(path)).source) == sha256_of(path)
    assert path.exists()  # until the track is finished


def test_nothing_is_taken_while_it_settles(works: Works) -> None:
    path = write_music(works.workplace.inbox / "a.wav")
    works.now = path.stat().st_mtime + works.config.intake.settle_s / 2

    look = works.look()

    assert (look.queued, look.unsettled) == (0, 1)
    assert works.store.tracks() == []


def test_what_somebody_holds_open_for_writing_is_not_taken_however_long_it_rests(works: Works) -> None:
    path = write_music(works.workplace.inbox / "a.wav")
    settled_now(works, path)
    with path.open("ab"):
        assert works.look().unsettled == 1
    assert works.look().queued == 1


def test_working_copies_are_made_ahead_only_so_far(tmp_path: Path) -> None:
    works = Works.at(tmp_path, settle_s=0, spool_gb=200e3 / 1e9)
    for n in range(5):
        write_music(works.workplace.inbox / f"{n}.wav", seed=n, seconds=1.0)  # 88 kB each

    looks = []
    for _ in range(4):
        looks.append(works.look())
        works.runner(Answers()).drain()

    assert [(look.queued, look.waiting) for look in looks] == [(2, 3), (2, 1), (1, 0), (0, 0)]
    assert len(works.store.tracks("done")) == 5


def test_a_file_larger_than_all_the_room_for_copies_is_taken_alone(tmp_path: Path) -> None:
    works = Works.at(tmp_path, settle_s=0, spool_gb=1e-6)
    for n in range(2):
        write_music(works.workplace.inbox / f"{n}.wav", seed=n)

    assert [(look.queued, look.waiting) for look in (works.look(), works.look())] == [(1, 1), (0, 1)]


def test_nothing_is_taken_when_the_disk_is_nearly_full(tmp_path: Path) -> None:
    works = Works.at(tmp_path, settle_s=0)
    write_music(works.workplace.inbox / "a.wav")
    all_of_it = works.config.disk.model_copy(update={"min_free_mb": 1e12})
    works.config = works.config.model_copy(update={"disk": all_of_it})

    assert isinstance(works.look().no_room, DiskFull)

    assert works.store.tracks() == []
    assert not (works.workplace.state / "work").exists() or not list(
        (works.workplace.state / "work").iterdir()
    )


def test_a_vanished_inbox_is_said_and_changes_nothing(works: Works) -> None:
    hashes = works.bring("a.wav")
    works.workplace.inbox.rename(works.workplace.home / "away")

    with pytest.raises(FolderUnusable, match="can't be read"):
        works.look()

    assert works.states(hashes) == [("queued", 0)]


def test_what_finishes_while_the_inbox_is_away_is_put_away_when_it_is_back(works: Works) -> None:
    works.bring("a.wav")
    away = works.workplace.inbox.rename(works.workplace.home / "away")
    works.runner(Answers()).drain()
    away.rename(works.workplace.inbox)

    works.look()

    assert (works.workplace.inbox / "done" / "a.wav").exists()


def test_with_markers_a_file_is_taken_when_its_own_is_there_and_the_marker_goes_with_it(
    tmp_path: Path,
) -> None:
    works = Works.at(tmp_path, marker=".ok")
    write_music(works.workplace.inbox / "a.wav")
    works.now = LATER_S
    assert (works.look().queued, works.look().unmarked) == (0, 1)

    (works.workplace.inbox / "a.wav.ok").touch()
    assert works.look().queued == 1
    works.runner(Answers()).drain()

    assert sorted(path.name for path in works.workplace.inbox.rglob("*")) == ["a.wav", "done"]


@pytest.mark.parametrize(("subfolders", "folder"), [("flatten", "a--"), ("keep", "album/disc 1/a--")])
def test_subfolders_of_the_inbox_are_kept_in_the_outbox_or_not(
    tmp_path: Path, subfolders: str, folder: str
) -> None:
    works = Works.at(tmp_path, settle_s=0, subfolders=subfolders)
    path = write_music(works.workplace.inbox / "album" / "disc 1" / "a.wav")
    sha256 = sha256_of(path)
    works.look()
    works.runner(Answers()).drain()

    assert (works.workplace.outbox / f"{folder}{sha256[:8]}" / "manifest.json").exists()
    assert (works.workplace.inbox / "done" / "album" / "disc 1" / "a.wav").exists()


# -- bytes that may be part of a file still being written ------------------------------------------


@pytest.fixture
def begun(works: Works) -> Path:
    """The first half of a file, taken in because it seemed to rest."""
    path = write_music(works.workplace.inbox / "a.wav")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (works.workplace.home / "whole").write_bytes(whole)
    settled_now(works, path)
    assert works.look().queued == 1
    return path


def test_a_file_cut_off_is_waited_for_while_it_is_new(works: Works, begun: Path) -> None:
    [sha256] = [track.sha256 for track in works.store.tracks()]
    works.runner(Answers()).drain()
    assert works.states([sha256]) == [("queued", 0)]
    assert works.track(sha256).not_before > works.now

    works.now = works.track(sha256).not_before
    works.runner(Answers()).drain()

    assert works.states([sha256]) == [("failed", 1)]
    assert (works.workplace.inbox / "failed" / "a.wav").exists()


def test_a_file_that_became_whole_is_done_and_its_first_half_is_forgotten(works: Works, begun: Path) -> None:
    works.runner(Answers()).drain()
    begun.write_bytes((works.workplace.home / "whole").read_bytes())
    settled_now(works, begun)
    works.look()
    works.now += LATER_S

    works.runner(Answers()).drain()

    [track] = works.store.tracks()
    assert (track.state, track.sha256) == ("done", sha256_of(works.workplace.home / "whole"))
    assert [path.name for path in works.workplace.outbox.iterdir()] == [track.folder]


def test_a_broken_file_that_has_rested_fails_at_once(works: Works, begun: Path) -> None:
    works.now += LATER_S
    works.runner(Answers()).drain()
    assert [track.state for track in works.store.tracks()] == ["failed"]


# -- a kill between a move and its record ----------------------------------------------------------


@pytest.mark.parametrize("ending", ["done", "failed"])
def test_a_move_that_was_made_but_not_recorded_is_found_at_the_next_start(works: Works, ending: str) -> None:
    [sha256] = works.bring("album/a.wav")
    works.store.claim(1, now=works.now)
    if ending == "done":
        works.store.finish(sha256, plan_key="p", source={}, now=works.now)
    else:
        works.store.fail(sha256, stage="normalize", error="is silent", now=works.now, retry_at=None)
    target = works.workplace.inbox / ending / "album" / "a.wav"
    target.parent.mkdir(parents=True)
    (works.workplace.inbox / "album" / "a.wav").rename(target)

    assert finish_moves(works.store, works.workplace.inbox) == 1

    [file] = works.store.files_of(sha256)
    assert (file.state, file.moved_to) == ("settled" if ending == "done" else "aside", target)
    assert target.with_name("a.wav.error.txt").exists() == (ending == "failed")
    assert finish_moves(works.store, works.workplace.inbox) == 0


@pytest.mark.parametrize("ending", ["done", "failed"])
def test_a_record_that_was_made_before_the_move_is_followed_by_it(works: Works, ending: str) -> None:
    [sha256] = works.bring("a.wav")
    path = works.workplace.inbox / "a.wav"
    if ending == "done":
        works.runner(Answers()).drain()
        (works.workplace.inbox / "done" / "a.wav").rename(path)
        works.store.settle_file(path, state="waiting")
    else:
        works.store.claim(1, now=works.now)
        works.store.fail(sha256, stage="normalize", error="is silent", now=works.now, retry_at=None)

    works.look()

    assert (works.workplace.inbox / ending / "a.wav").exists()


def test_a_file_replaced_while_its_track_was_made_stays_and_is_a_new_track(tmp_path: Path) -> None:
    works = Works.at(tmp_path, settle_s=0)
    [first] = works.bring("a.wav")
    second = sha256_of(write_music(works.workplace.inbox / "a.wav", seed=5))
    works.runner(Answers()).drain()
    assert (works.workplace.inbox / "a.wav").exists()

    works.look()
    works.runner(Answers()).drain()

    assert works.states([first, second]) == [("done", 0), ("done", 0)]


def test_what_cannot_be_moved_is_tried_again_at_the_next_look(tmp_path: Path) -> None:
    works = Works.at(tmp_path, settle_s=0)
    [sha256] = works.bring("a.wav")
    (works.workplace.inbox / "done").write_text("in the way")
    works.runner(Answers()).drain()
    assert works.states([sha256]) == [("done", 0)]
    assert (works.workplace.inbox / "a.wav").exists()

    (works.workplace.inbox / "done").unlink()
    works.look()

    assert (works.workplace.inbox / "done" / "a.wav").exists()


def test_a_file_touched_since_it_was_taken_in_is_not_moved(works: Works) -> None:
    [sha256] = works.bring("a.wav")
    os.utime(works.workplace.inbox / "a.wav", (1, 1))
    put_away(
        works.store, works.store.files_of(sha256), works.workplace.inbox, works.config.intake, error=None
    )
    assert (works.workplace.inbox / "a.wav").exists()


# -- files that come again ---------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["move", "delete"])
def test_a_file_dropped_again_whose_results_are_gone_is_made_again(tmp_path: Path, after: str) -> None:
    works = Works.at(tmp_path, settle_s=0, after=after)
    [sha256] = works.bring("a.wav")
    works.runner(Answers()).drain()
    made = works.files(sha256)
    shutil.rmtree(works.workplace.outbox / works.track(sha256).folder)

    write_music(works.workplace.inbox / "a.wav", seed=0, seconds=1.5)
    assert works.look().queued == 1
    works.runner(Answers()).drain()

    assert works.files(sha256) == made


def test_a_file_brought_back_from_failed_is_tried_again(works: Works) -> None:
    [sha256] = works.bring("a.wav")
    works.runner(Answers(lambda request: Failure(request.request_id, BadAudio("is odd")))).drain()
    failed = works.workplace.inbox / "failed" / "a.wav"
    failed.rename(works.workplace.inbox / "a.wav")

    assert finish_moves(works.store, works.workplace.inbox) == 0
    assert works.arrivals(settle_s=0).look(should_stop=lambda: False).queued == 1
    works.runner(Answers()).drain()

    assert works.states([sha256]) == [("done", 0)]
    assert list((works.workplace.inbox / "failed").iterdir()) == []


def test_an_archived_file_is_still_found_after_another_one_came_under_its_name(tmp_path: Path) -> None:
    works = Works.at(tmp_path, settle_s=0)
    [first] = works.bring("a.wav")
    works.runner(Answers()).drain()
    write_music(works.workplace.inbox / "a.wav", seed=7)
    works.look()
    works.runner(Answers()).drain()

    works.store.requeue(first, now=works.now, stages=["normalize", "generate"])
    works.runner(Answers()).drain()

    assert works.track(first).state == "done"


def test_a_marker_goes_before_its_file_so_that_it_vouches_for_no_other(tmp_path: Path) -> None:
    works = Works.at(tmp_path, marker=".ok")
    path = write_music(works.workplace.inbox / "a.wav")
    path.with_name("a.wav.ok").touch()
    works.look()
    (works.workplace.inbox / "done").write_text("in the way of the move")

    works.runner(Answers()).drain()

    assert path.exists()
    assert not path.with_name("a.wav.ok").exists()


# -- reading and writing that fails ------------------------------------------------------------------


class Failing:
    """A device on which one operation fails while a test wants it to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, works: Works) -> None:
        self.reading = self.writing = False
        real = copying.copy_in

        def copy_in(path: Path, target: Path, **how: Any) -> str | None:
            if self.reading:
                raise OSError(errno.EIO, "Input/output error", str(path))
            if self.writing:
                raise WriteFailed(errno.EIO, "Input/output error", str(target))
            return real(path, target, **how)

        monkeypatch.setattr(copying, "copy_in", copy_in)


def test_a_source_whose_device_fails_is_tried_again_for_a_while_and_then_fails_visibly(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, device = write_music(works.workplace.inbox / "a.wav"), Failing(monkeypatch, works)
    settled_now(works, path)
    arrivals, device.reading = works.arrivals(), True
    assert arrivals.look(should_stop=lambda: False).troubled == 1

    works.now += 29
    assert arrivals.look(should_stop=lambda: False).troubled == 1
    works.now += 2
    assert arrivals.look(should_stop=lambda: False).unreadable == 1

    assert (works.workplace.inbox / "failed" / "a.wav").exists()


def test_a_working_copy_that_cannot_be_written_is_not_the_sources_fault(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, device = write_music(works.workplace.inbox / "a.wav"), Failing(monkeypatch, works)
    settled_now(works, path)
    device.writing = True
    with pytest.raises(FolderUnusable, match="input/output error"):
        works.look()

    device.writing = False
    assert works.look().queued == 1


def test_what_could_not_be_read_is_read_again_on_request(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, device = write_music(works.workplace.inbox / "a.wav"), Failing(monkeypatch, works)
    settled_now(works, path)
    arrivals, device.reading = works.arrivals(), True
    for _ in range(2):
        arrivals.look(should_stop=lambda: False)
        works.now += 31
    [track] = works.store.tracks("failed")
    device.reading = False

    bring_back(works.store, track)
    assert works.arrivals(settle_s=0).look(should_stop=lambda: False).queued == 1
    works.runner(Answers()).drain()

    assert [track.state for track in works.store.tracks()] == ["done"]
    assert list((works.workplace.inbox / "failed").iterdir()) == []


def test_a_move_that_breaks_off_leaves_no_half_copies(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    works.bring("a.wav")

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "move", half)
    works.runner(Answers()).drain()
    works.look()

    assert list((works.workplace.inbox / "done").iterdir()) == []
    assert (works.workplace.inbox / "a.wav").exists()


def test_what_could_not_be_read_comes_back_under_its_own_name_also_after_another_file_had_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = Works.at(tmp_path, settle_s=0)
    write_music(works.workplace.inbox / "a.wav", seed=4)
    device = Failing(monkeypatch, works)
    arrivals, device.reading = works.arrivals(), True
    for _ in range(2):
        arrivals.look(should_stop=lambda: False)
        works.now += 31
    [track] = works.store.tracks("failed")
    device.reading = False
    [other] = works.bring("a.wav")
    works.runner(Answers()).drain()

    bring_back(works.store, track)

    assert (works.workplace.inbox / "a.wav").exists()
    assert works.track(other).state == "done"


def test_a_closed_folder_of_a_finished_track_keeps_no_new_file_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = Works.at(tmp_path, settle_s=0)
    works.bring("a.wav")
    works.runner(Answers()).drain()
    write_music(works.workplace.inbox / "another name.wav", seed=0, seconds=1.5)
    write_music(works.workplace.inbox / "new.wav", seed=9)

    def closed(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Outbox, "add_names", closed)

    assert works.look().queued == 1
