"""The file in which a running instance reports what is wrong: always whole, and kept on a full disk."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.service.health import Health, read_health


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "health.json"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(path: Path, clock: Clock) -> Health:
    made = Health(path, clock=clock)
    made.open()
    return made


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="pipeline")
    return caplog


def written(path: Path) -> dict[str, Any]:
    report = read_health(path)
    assert report is not None
    return report


def test_it_reports_which_process_runs(path: Path, health: Health) -> None:
    times = dict.fromkeys(["started_at", "written_at", "progress_at"], 1000.0)
    assert written(path) == {"pid": os.getpid(), **times, "scanned_at": None, "conditions": []}


def test_progress_is_known_from_its_last_time_and_written_once_a_second(
    path: Path, health: Health, clock: Clock
) -> None:
    for clock.now, known in ((1000.5, 1000.0), (1001.0, 1001.0), (1600.0, 1600.0)):
        health.progress()
        assert written(path)["progress_at"] == known
    clock.now = 1700.0
    health.degraded("disk", "full")  # is no progress
    assert written(path)["progress_at"] == 1600.0


def test_the_time_of_a_scan_is_reported_although_it_alone_writes_nothing(
    path: Path, health: Health, clock: Clock
) -> None:
    health.scanned(waiting=3)
    clock.now = 1050.0
    health.scanned(waiting=3)
    assert written(path)["scanned_at"] == 1000.0
    health.progress()
    assert written(path)["scanned_at"] == 1050.0


def test_conditions_and_facts_are_read_back(path: Path, health: Health) -> None:
    health.note(mode="events on ext4", inbox={"waiting": 3, "settling": 1})
    health.degraded("disk", "the disk of /é\udcff is full")
    report = written(path)
    assert report["mode"] == "events on ext4"
    assert report["inbox"] == {"waiting": 3, "settling": 1}
    assert report["conditions"] == [{"what": "disk", "since": 1000.0, "text": "the disk of /é\udcff is full"}]


def test_since_is_kept_while_the_text_of_a_condition_changes(
    path: Path, health: Health, clock: Clock
) -> None:
    health.degraded("disk", "12 MB are free")
    clock.now = 1060.0
    health.degraded("disk", "3 MB are free")
    assert written(path)["conditions"] == [{"what": "disk", "since": 1000.0, "text": "3 MB are free"}]
    health.well("disk")
    clock.now = 1100.0
    health.degraded("disk", "1 MB is free")
    assert health.conditions["disk"]["since"] == 1100.0


def test_a_condition_is_logged_when_it_begins_and_when_it_ends_and_never_between(
    health: Health, clock: Clock, messages: pytest.LogCaptureFixture
) -> None:
    for free_mb in (3, 3, 2):
        health.degraded("disk", f"{free_mb} MB are free")
    clock.now = 1090.0
    health.well("disk")
    health.well("disk")
    assert [(record.levelname, record.getMessage()) for record in messages.records] == [
        ("WARNING", "3 MB are free"),
        ("INFO", "disk: well again after 90 s"),
    ]


def test_nothing_is_written_when_nothing_has_changed(path: Path, health: Health, clock: Clock) -> None:
    health.note(mode="polling")
    health.degraded("disk", "full")
    clock.now = 2000.0
    health.note(mode="polling")
    health.degraded("disk", "full")
    health.well("inbox")
    assert written(path)["written_at"] == 1000.0
    health.note(mode="events")
    assert written(path)["written_at"] == 2000.0


def test_the_report_of_an_ended_instance_is_replaced_by_the_next(path: Path, clock: Clock) -> None:
    ended = Health(path, clock=clock)
    ended.open()
    ended.note(mode="polling")
    ended.degraded("disk", "full")
    clock.now = 1060.0
    Health(path, clock=clock).open()
    report = written(path)
    assert (report["pid"], report["started_at"], report["conditions"]) == (os.getpid(), 1060.0, [])
    assert "mode" not in report


def test_what_workers_do_is_reported_once_a_second(path: Path, health: Health, clock: Clock) -> None:
    health.workers = lambda: [{"track": clock.now}]
    clock.now = 1000.9
    health.progress()
    assert "workers" not in written(path)
    clock.now = 1001.0
    health.progress()
    assert written(path)["workers"] == [{"track": 1001.0}]
    clock.now = 500.0  # the clock was set back
    health.progress()
    assert written(path)["workers"] == [{"track": 500.0}]


def test_a_file_that_somebody_removed_is_made_again(path: Path, health: Health) -> None:
    path.unlink()
    health.note(mode="polling")
    assert written(path)["mode"] == "polling"


def test_a_missing_file_reads_as_none(path: Path) -> None:
    assert read_health(path) is None


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"pid": 1', b"\xff\xfe"])
def test_a_damaged_file_reads_as_none(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert read_health(path) is None


def test_a_folder_in_its_place_reads_as_none_and_raises_nothing(
    path: Path, messages: pytest.LogCaptureFixture
) -> None:
    path.mkdir()
    health = Health(path)
    health.open()
    health.degraded("disk", "full")
    health.note(mode="polling")
    assert read_health(path) is None
    assert [record.getMessage() for record in messages.records] == [
        f"{path} can't be written: is a directory",
        "full",
    ]


def test_a_reader_never_sees_half_of_what_is_written_meanwhile(path: Path, health: Health) -> None:
    ended = threading.Event()

    def write() -> None:
        for number in range(300):
            health.note(mode=str(number) * 300, again=str(number) * 300)
        ended.set()

    health.note(mode="", again="")
    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not ended.is_set():
        report = read_health(path)
        if report is not None:
            assert report["mode"] == report["again"]
            seen.add(report["mode"])
    writer.join()
    assert len(seen) > 1


def test_while_the_disk_is_full_the_last_state_stays_and_the_log_says_so_once(
    path: Path, health: Health, messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    health.note(mode="polling")
    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_text", refuse)
        health.degraded("disk", "the disk is full")
        health.degraded("disk", "the disk is still full")
    assert written(path)["mode"] == "polling"
    assert written(path)["conditions"] == []
    assert [record.getMessage() for record in messages.records] == [
        "the disk is full",
        f"{path} can't be written: no space left on device",
    ]
    health.note(mode="events")
    assert [row["text"] for row in written(path)["conditions"]] == ["the disk is still full"]


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
