"""When a file is ready: it is settled, and nobody has it open for writing."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from other_user import AsOtherUser

from pipeline.config import Intake
from pipeline.fs.copying import FileIdentity
from pipeline.intake.scanner import ScannedFile, Scanner
from pipeline.intake.settling import Settling, has_writer
from pipeline.workspace import InputFolder

ROOT = Path(__file__).parents[2]


# -- settling ----------------------------------------------------------------------------------------


def scanned(
    *, mtime_s: float = 0.5, ctime_s: float = 0.5, size: int = 10, inode: int = 7, device: int = 1
) -> ScannedFile:
    path = Path("/in/a.wav")
    identity = FileIdentity(size, int(mtime_s * 1e9), inode)
    return ScannedFile(path, path, "a.wav", identity, int(ctime_s * 1e9), device)


def test_a_file_is_ready_once_its_times_are_old_enough() -> None:
    settling = Settling(settle_s=2.0)
    written = scanned(mtime_s=100.5, ctime_s=100.5)

    assert not settling.is_settled(written, 102.4)
    assert settling.is_settled(written, 102.5)


def test_an_old_file_is_ready_at_the_first_scan() -> None:
    assert Settling(settle_s=2.0).is_settled(scanned(mtime_s=5.5, ctime_s=5.5), 1000.0)


def test_a_copy_with_its_old_mtime_is_as_young_as_its_ctime() -> None:
    copied = scanned(mtime_s=5.5, ctime_s=100.5)
    assert not Settling(settle_s=2.0).is_settled(copied, 101.5)
    assert Settling(settle_s=2.0).is_settled(copied, 102.5)


def test_a_time_in_whole_seconds_takes_two_seconds_more_to_settle() -> None:
    coarse = scanned(mtime_s=100.0, ctime_s=100.0)  # may have been written to at 101.9
    assert not Settling(settle_s=2.0).is_settled(coarse, 103.9)
    assert Settling(settle_s=2.0).is_settled(coarse, 104.0)
    copied = scanned(mtime_s=100.0, ctime_s=100.5)  # its mtime was set by whoever copied it
    assert Settling(settle_s=2.0).is_settled(copied, 102.5)


def test_a_file_from_the_future_is_ready_when_two_scans_agree() -> None:
    settling = Settling(settle_s=2.0)
    future = scanned(mtime_s=1e6 + 0.5, ctime_s=100.5)

    assert not settling.is_settled(future, 100.0)
    assert not settling.is_settled(future, 101.9)
    assert settling.is_settled(future, 102.0)


@pytest.mark.parametrize(
    "change",
    [{"size": 11}, {"size": 9}, {"mtime_s": 0.1}, {"inode": 8}, {"device": 2}],
    ids=lambda change: next(iter(change)),
)
def test_a_file_that_changes_between_two_scans_is_waited_for_again(change: dict[str, Any]) -> None:
    settling = Settling(settle_s=2.0, trust_times=False)
    settling.is_settled(scanned(), 100.0)
    changed = scanned(**change)

    assert not settling.is_settled(changed, 102.0)
    assert not settling.is_settled(changed, 103.9)
    assert settling.is_settled(changed, 104.0)


def test_times_of_another_clock_are_not_trusted() -> None:
    settling = Settling(settle_s=2.0, trust_times=False)
    old = scanned(mtime_s=5.5, ctime_s=5.5)

    assert not settling.is_settled(old, 1000.0)
    assert not settling.is_settled(old, 1001.9)
    assert settling.is_settled(old, 1002.0)


@pytest.mark.parametrize("trust_times", [True, False])
def test_a_file_of_which_only_the_ctime_keeps_changing_becomes_ready(trust_times: bool) -> None:
    settling = Settling(settle_s=2.0, trust_times=trust_times)
    results = [
        settling.is_settled(scanned(mtime_s=5.5, ctime_s=now), now) for now in (100.5, 101.5, 102.5, 103.5)
    ]
    assert results == [False, False, True, True]


def test_a_clock_set_back_delays_a_file_by_one_settling_time() -> None:
    settling = Settling(settle_s=2.0)
    future = scanned(mtime_s=1e6 + 0.5, ctime_s=1e6 + 0.5)

    assert not settling.is_settled(future, 1e6 + 0.6)
    assert not settling.is_settled(future, 100.0)
    assert settling.is_settled(future, 102.0)


def test_a_ready_file_that_is_not_taken_stays_ready() -> None:
    settling = Settling(settle_s=2.0, trust_times=False)
    settling.is_settled(scanned(), 100.0)
    assert [settling.is_settled(scanned(), now) for now in (102.0, 102.1, 103.0)] == [True, True, True]


def test_files_that_are_gone_are_forgotten() -> None:
    settling = Settling(settle_s=2.0)
    future = scanned(mtime_s=1e6 + 0.5)

    settling.is_settled(future, 100.0)
    settling.keep_only(set())
    assert not settling.is_settled(future, 103.0)
    settling.keep_only({future.path})
    assert settling.is_settled(future, 105.0)


@pytest.mark.parametrize("trust_times", [True, False])
@pytest.mark.parametrize("mtime_s", [100.0, 1e6])
def test_without_a_settling_time_every_file_is_ready(mtime_s: float, trust_times: bool) -> None:
    settling = Settling(settle_s=0, trust_times=trust_times)
    assert settling.is_settled(scanned(mtime_s=mtime_s), 100.0)
    assert settling.is_settled(scanned(mtime_s=mtime_s), 100.0)


@pytest.mark.parametrize("trust_times", [True, False])
def test_a_file_that_was_written_to_is_ready_by_its_real_times(tmp_path: Path, trust_times: bool) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    settling = Settling(settle_s=60.0, trust_times=trust_times)
    scanner = Scanner(InputFolder(tmp_path, is_inbox=True), Intake())
    now = time.time()

    def is_ready(now: float) -> bool:
        return all(settling.is_settled(found, now) for found in scanner.scan())

    assert not is_ready(now)
    with (tmp_path / "a.wav").open("ab") as file:
        file.write(b"more")
    assert not is_ready(now + 50)
    assert not is_ready(now + 60 if trust_times is False else now + 59)
    (tmp_path / "a.wav").rename(tmp_path / "b.wav")
    assert is_ready(now + 63) is trust_times
    assert is_ready(now + 123)


# -- writers -----------------------------------------------------------------------------------------


def _has_leases(folder: Path) -> bool:
    probe = folder / "probe"
    probe.touch()
    try:
        with probe.open("rb") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except (AttributeError, OSError):
        return False
    return True


@pytest.fixture
def leases(tmp_path: Path) -> None:
    if not _has_leases(tmp_path):
        pytest.skip("this system or file system has no leases")


WRITER = """
import sys
file = open(sys.argv[1], sys.argv[2])
print("open", flush=True)
for line in sys.stdin:
    if line == "write\\n":
        file.write("more"); file.flush()
    else:
        file.close()
    print(line, end="", flush=True)
"""


class Writer:
    """Another process that has a file open."""

    def __init__(self, path: Path, mode: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), mode],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def do(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self._answer() == what

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def writer(path: Path, mode: str = "a") -> Iterator[Writer]:
    made = Writer(path, mode)
    try:
        yield made
    finally:
        made.process.communicate(timeout=30)


@pytest.mark.usefixtures("leases")
def test_a_file_has_a_writer_until_the_last_one_closes_it(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    path = tmp_path / "a.wav"
    assert not has_writer(path)

    with writer(path) as first, writer(path, "r+") as second:
        assert has_writer(path)  # though nothing has been written
        first.do("write")
        assert has_writer(path)
        first.do("close")
        assert has_writer(path)
        second.do("close")
        assert not has_writer(path)
        assert not has_writer(path)


@pytest.mark.usefixtures("leases")
def test_a_reader_is_no_writer(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    with writer(tmp_path / "a.wav", "r"):
        assert not has_writer(tmp_path / "a.wav")


@pytest.mark.usefixtures("leases")
def test_a_file_that_is_renamed_while_it_is_written_still_has_its_writer(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    with writer(tmp_path / "a.wav"):
        (tmp_path / "a.wav").rename(tmp_path / "b.wav")
        assert has_writer(tmp_path / "b.wav")


@pytest.mark.usefixtures("leases")
def test_a_file_mapped_for_writing_has_a_writer_though_it_was_closed(tmp_path: Path) -> None:
    import mmap

    (tmp_path / "a.wav").write_bytes(b"x")
    with (tmp_path / "a.wav").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    assert has_writer(tmp_path / "a.wav")
    mapped.close()
    assert not has_writer(tmp_path / "a.wav")


@pytest.mark.usefixtures("leases")
def test_a_writer_can_open_a_file_that_was_checked(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    assert not has_writer(tmp_path / "a.wav")
    fd = os.open(tmp_path / "a.wav", os.O_WRONLY | os.O_NONBLOCK)  # would fail if a lease was left
    os.close(fd)


CHECKER = """
import sys
from pathlib import Path
from pipeline.intake.settling import has_writer
answers = [has_writer(Path(sys.argv[1])) for _ in range(3_000)]
print(sum(answers))
"""
OPEN_REPEATEDLY = """
import os, sys
while os.getppid() == int(sys.argv[2]):
    os.close(os.open(sys.argv[1], os.O_WRONLY))
"""


@pytest.mark.usefixtures("leases")
def test_a_writer_that_opens_the_file_during_the_check_does_not_end_this_process(tmp_path: Path) -> None:
    """With SIGIO, the default signal, the checking process would end within a few hundred checks."""
    (tmp_path / "a.wav").write_bytes(b"x")
    path = str(tmp_path / "a.wav")
    opener = subprocess.Popen([sys.executable, "-c", OPEN_REPEATEDLY, path, str(os.getpid())])
    try:
        asked = subprocess.run(
            [sys.executable, "-c", CHECKER, path], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert opener.poll() is None
    finally:
        opener.terminate()
        opener.wait()
    assert (asked.returncode, asked.stderr) == (0, "")
    assert int(asked.stdout) > 0  # some checks found the writer


def test_where_the_system_can_not_tell_there_is_no_writer(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    (tmp_path / "link.wav").symlink_to("a.wav")
    with (tmp_path / "a.wav").open("ab"):
        assert not has_writer(tmp_path / "link.wav")
    assert not has_writer(tmp_path / "none.wav")
    assert not has_writer(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else")
def test_the_file_of_another_user_counts_as_without_a_writer(
    tmp_path: Path, as_other_user: AsOtherUser
) -> None:
    (tmp_path / "a.wav").write_bytes(b"x")
    with (tmp_path / "a.wav").open("ab"), as_other_user(tmp_path):
        assert not has_writer(Path("a.wav"))
