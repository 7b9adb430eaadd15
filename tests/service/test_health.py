"""The file in which a running instance says what is wrong: always whole, never larger, on a full disk too."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.service.health import SIZE_BYTES, Health, read_health

ROOT = Path(__file__).resolve().parents[2]


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
def health(path: Path, clock: Clock) -> Iterator[Health]:
    made = Health(path, clock=clock)
    made.open()
    yield made
    made.close()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="pipeline")
    return caplog


def written(path: Path) -> dict[str, object]:
    said = read_health(path)
    assert said is not None
    return said


def test_an_open_file_says_who_runs(path: Path, health: Health) -> None:
    assert written(path) == {"pid": os.getpid(), "written_at": 1000.0, "conditions": []}


def test_conditions_and_facts_are_read_back(path: Path, health: Health) -> None:
    health.note(mode="events on ext4", inbox={"waiting": 3, "settling": 1})
    health.degraded("disk", "the disk of /é\udcff is full")
    said = written(path)
    assert said["mode"] == "events on ext4"
    assert said["inbox"] == {"waiting": 3, "settling": 1}
    assert said["conditions"] == [{"what": "disk", "since": 1000.0, "text": "the disk of /é\udcff is full"}]


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
    assert health.conditions["disk"].since == 1100.0


def test_a_condition_is_logged_when_it_begins_and_when_it_ends_and_never_between(
    health: Health, clock: Clock, told: pytest.LogCaptureFixture
) -> None:
    for free_mb in (3, 3, 2):
        health.degraded("disk", f"{free_mb} MB are free")
    clock.now = 1090.0
    health.well("disk")
    health.well("disk")
    assert [(record.levelname, record.getMessage()) for record in told.records] == [
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


def test_the_file_is_json_of_one_size_rewritten_in_place(path: Path, health: Health) -> None:
    inode = path.stat().st_ino
    health.degraded("disk", "full " * 50)
    health.well("disk")
    assert (path.stat().st_ino, path.stat().st_size) == (inode, SIZE_BYTES)
    assert json.loads(path.read_text())["conditions"] == []


@pytest.mark.parametrize("letter", ["x", "é", "\udcff", "🎵", "\n", '"'])
def test_however_long_the_texts_it_fits(path: Path, health: Health, letter: str) -> None:
    for number in range(6):
        health.degraded(f"condition {number}", letter * 5000)
    said = written(path)
    assert path.stat().st_size == SIZE_BYTES
    assert isinstance(said["conditions"], list)
    assert len(said["conditions"]) == 6
    assert all(len(row["text"]) >= 30 and row["text"].endswith("…") for row in said["conditions"])


def test_however_many_the_facts_and_conditions_it_fits(path: Path, health: Health) -> None:
    health.note(inbox={f"file {number}": "x" for number in range(1000)})
    for number in range(200):
        health.degraded(f"condition {number}", "long " * 100)
    said = written(path)
    assert path.stat().st_size == SIZE_BYTES
    assert isinstance(said["conditions"], list)
    assert said["conditions"][0]["what"] == "condition 0"


def test_after_an_orderly_end_nobody_runs_and_nothing_is_wrong(path: Path, health: Health) -> None:
    health.note(mode="polling")
    health.degraded("disk", "full")
    health.close()
    assert written(path) == {"pid": None, "written_at": 1000.0, "conditions": []}
    assert path.stat().st_size == SIZE_BYTES


def test_the_words_of_a_killed_instance_are_replaced_by_the_next(path: Path, clock: Clock) -> None:
    killed = Health(path, clock=clock)
    killed.open()
    killed.degraded("disk", "full")
    following = Health(path, clock=clock)
    following.open()
    assert written(path)["conditions"] == []
    following.close()
    killed.close()


def test_a_file_that_somebody_removed_is_made_again(path: Path, health: Health) -> None:
    path.unlink()
    health.note(mode="polling")
    assert written(path)["mode"] == "polling"


def test_closing_leaves_no_descriptor(path: Path, health: Health) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(10):
        other = Health(path)
        other.open()
        other.note(mode="polling")
        other.close()
    assert len(list(Path("/dev/fd").iterdir())) == before


# -- readers ---------------------------------------------------------------------------------------


def test_a_missing_file_reads_as_none(path: Path) -> None:
    assert read_health(path) is None


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b" " * SIZE_BYTES,
        b"\0" * SIZE_BYTES,
        b"[1]",
        b'{"pid": 1}',
        b'{"pid": 1, "crc32": 5}',
        b"\xff\xfe",
    ],
)
def test_a_page_that_is_not_whole_reads_as_none(path: Path, page: bytes) -> None:
    path.write_bytes(page)
    assert read_health(path) is None


def test_a_page_of_two_writes_reads_as_none_though_it_is_json(path: Path, health: Health) -> None:
    health.degraded("disk", "aaaa")
    first = path.read_bytes()
    health.degraded("disk", "bbbb")
    second = path.read_bytes()
    torn = first.replace(b"aaaa", b"bbbb")
    assert json.loads(torn)["conditions"] == json.loads(second)["conditions"]
    path.write_bytes(torn)
    assert read_health(path) is None


def test_a_folder_in_its_place_reads_as_none_and_stops_nobody(
    path: Path, told: pytest.LogCaptureFixture
) -> None:
    path.mkdir()
    health = Health(path)
    health.open()
    health.degraded("disk", "full")
    health.note(mode="polling")
    health.close()
    assert read_health(path) is None
    assert [record.getMessage() for record in told.records] == [
        f"{path} can't be written: is a directory",
        "full",
    ]


def test_a_reader_never_sees_half_of_what_is_written_meanwhile(path: Path, health: Health) -> None:
    ended = threading.Event()

    def write() -> None:
        for number in range(3000):
            health.note(mode=str(number) * 300, again=str(number) * 300)
        ended.set()

    health.note(mode="", again="")
    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not ended.is_set():
        said = read_health(path)
        if said is not None:
            assert said["mode"] == said["again"]
            seen.add(said["mode"])
    writer.join()
    assert len(seen) > 1


# -- a full disk -----------------------------------------------------------------------------------


def on_small_disk(folder: Path, script: str) -> None:
    """Run Python where `folder` is a disk of 64 KB, in a namespace that nobody else sees."""
    unshare = shutil.which("unshare")
    command = [str(unshare), "-Urm"]
    if unshare is None or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    prelude = f"""
        import subprocess
        from pathlib import Path
        from pipeline.service.health import Health, read_health
        disk = Path({str(folder)!r})
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True)
        def fill():
            with (disk / "filler").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        health = Health(disk / "health.json")
    """
    ended = subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr


def test_a_full_disk_does_not_stop_it_from_saying_so(tmp_path: Path) -> None:
    on_small_disk(
        tmp_path,
        """
        health.open()
        fill()
        health.degraded("disk", "the disk is full")
        assert read_health(disk / "health.json")["conditions"][0]["text"] == "the disk is full"
        health.close()
        second = Health(disk / "health.json")  # the file kept its blocks
        second.open()
        second.degraded("disk", "the disk is still full")
        assert read_health(disk / "health.json")["conditions"][0]["text"] == "the disk is still full"
        """,
    )


def test_without_room_for_the_file_it_goes_on_in_memory_until_there_is(tmp_path: Path) -> None:
    on_small_disk(
        tmp_path,
        """
        fill()
        health.open()
        health.degraded("disk", "the disk is full")
        assert health.conditions["disk"].text == "the disk is full"
        assert read_health(disk / "health.json") is None
        (disk / "filler").unlink()
        health.note(mode="polling")
        assert read_health(disk / "health.json")["conditions"][0]["text"] == "the disk is full"
        """,
    )
