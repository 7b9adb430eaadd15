"""The watcher wakes the daemon at any change, reports when it can't, and leaves no threads or descriptors."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.intake.watcher import Watcher

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 20.0  # for the system's events; ends a test that would hang

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")


class Wakes:
    """Counts the calls of `wake`, and waits for the next."""

    def __init__(self) -> None:
        self.count = 0
        self._event = threading.Event()

    def wake(self) -> None:
        self.count += 1
        self._event.set()

    def arrived(self) -> bool:
        """Whether `wake` is called in time; waits for the last call and resets the count."""
        arrived = self._event.wait(TIMEOUT_S)
        self.reset()
        return arrived

    def reset(self) -> None:
        """Wait until `wake` is not called any more, and reset the count."""
        while True:
            before = self.count
            time.sleep(0.1)
            if self.count == before:
                break
        self._event.clear()
        self.count = 0


def until(condition: Callable[[], object]) -> object:
    """The first true value of the condition, or its last one when the time is over."""
    end = time.monotonic() + TIMEOUT_S
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return value


def descriptors() -> int:
    gc.collect()  # closes what earlier tests left in cycles of references
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def threads_and_leaks(before: tuple[int, int]) -> tuple[int, int]:
    """The number of threads now, and how many descriptors were opened since; earlier tests' may be closed."""
    return threading.active_count(), max(0, descriptors() - before[1])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


@pytest.fixture
def wakes() -> Wakes:
    return Wakes()


@contextmanager
def watching(root: Path, wakes: Wakes) -> Iterator[Watcher]:
    """A watcher after its first check, which is stopped at the end of the block."""
    made = Watcher(root, wakes.wake, polling=False)
    made.check()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def watcher(root: Path, wakes: Wakes) -> Iterator[Watcher]:
    with watching(root, wakes) as made:
        wakes.reset()
        yield made


# -- events -----------------------------------------------------------------------------------------


def write(root: Path) -> None:
    (root / "new.wav").write_bytes(b"x")


def assert_changes_wake(root: Path, wakes: Wakes) -> None:
    wakes.reset()
    write(root)
    assert wakes.arrived()


def assert_restored(watcher: Watcher, root: Path, wakes: Wakes) -> None:
    """A check restores the watch and wakes, since changes may have been missed; later changes wake."""
    wakes.reset()
    assert watcher.check() is None
    assert wakes.count > 0
    assert_changes_wake(root, wakes)


def overwrite(root: Path) -> None:
    (root / "old.wav").write_bytes(b"other")


def rename(root: Path) -> None:
    (root / "old.wav").rename(root / "other.wav")


def delete(root: Path) -> None:
    (root / "old.wav").unlink()


def move_in(root: Path) -> None:
    (root.parent / "outside.wav").rename(root / "outside.wav")


def link_in(root: Path) -> None:
    (root / "linked.wav").hardlink_to(root.parent / "outside.wav")


def move_tree_in(root: Path) -> None:
    (root.parent / "album").rename(root / "album")


def make_readable(root: Path) -> None:
    (root / "old.wav").chmod(0o600)


CHANGES = [write, overwrite, rename, delete, move_in, link_in, move_tree_in, make_readable]


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_wakes(tmp_path: Path, root: Path, wakes: Wakes, change: Callable[[Path], None]) -> None:
    (root / "old.wav").write_bytes(b"old")
    (tmp_path / "outside.wav").write_bytes(b"outside")
    (tmp_path / "album" / "disc 1").mkdir(parents=True)
    with watching(root, wakes) as watcher:
        wakes.reset()
        change(root)
        assert wakes.arrived()
        assert watcher.check() is None


def test_a_file_deep_in_a_tree_that_was_moved_in_wakes(watcher: Watcher, root: Path, wakes: Wakes) -> None:
    (root.parent / "album" / "disc 1").mkdir(parents=True)
    (root.parent / "album").rename(root / "album")
    assert wakes.arrived()
    (root / "album" / "disc 1" / "song.wav").write_bytes(b"x")
    assert wakes.arrived()


def test_reading_a_file_and_listing_the_folder_does_not_wake(
    watcher: Watcher, root: Path, wakes: Wakes
) -> None:
    write(root)
    assert wakes.arrived()
    for _ in range(20):
        assert (root / "new.wav").read_bytes() == b"x"
        assert list(root.rglob("*")) == [root / "new.wav"]
        assert watcher.check() is None
    time.sleep(0.2)
    assert wakes.count == 0
    (root / "new.wav").unlink()
    assert wakes.arrived()  # events do come


def test_the_first_check_wakes_for_files_that_came_before(root: Path, wakes: Wakes) -> None:
    with watching(root, wakes):
        assert wakes.count > 0


def test_a_root_that_is_a_link_is_watched_where_it_leads(tmp_path: Path, root: Path, wakes: Wakes) -> None:
    (tmp_path / "link").symlink_to(root)
    with watching(tmp_path / "link", wakes):
        assert_changes_wake(root, wakes)


# -- the root disappears ---------------------------------------------------------------------------


def test_a_missing_root_is_degraded_until_it_is_there(tmp_path: Path, wakes: Wakes) -> None:
    with watching(tmp_path / "inbox", wakes) as watcher:
        assert watcher.check() == f"{tmp_path / 'inbox'} can't be watched: no such file or directory"
        assert watcher.polling
        (tmp_path / "inbox").mkdir()
        assert watcher.check() is None
        assert not watcher.polling
        assert_changes_wake(tmp_path / "inbox", wakes)


def test_a_vanished_root_is_reported_as_long_as_it_is_away(
    watcher: Watcher, root: Path, wakes: Wakes
) -> None:
    root.rmdir()
    assert "no such file" in str(watcher.check())
    assert "no such file" in str(watcher.check())
    root.mkdir()
    assert_restored(watcher, root, wakes)


def test_a_root_removed_and_made_again_between_two_checks_is_watched(
    watcher: Watcher, root: Path, wakes: Wakes
) -> None:
    root.rmdir()
    root.mkdir()  # on many file systems with the same inode number
    wakes.reset()
    assert until(lambda: watcher.check() is None and wakes.count)
    assert_changes_wake(root, wakes)


def test_another_folder_in_the_place_of_the_root_is_watched(
    watcher: Watcher, root: Path, wakes: Wakes
) -> None:
    root.rename(root.parent / "old inbox")
    root.mkdir()
    assert_restored(watcher, root, wakes)


def test_a_root_moved_away_and_back_is_still_watched(watcher: Watcher, root: Path, wakes: Wakes) -> None:
    root.rename(root.parent / "elsewhere")
    assert watcher.check() is not None
    (root.parent / "elsewhere").rename(root)
    assert watcher.check() is None
    assert_changes_wake(root, wakes)


def test_a_file_in_the_place_of_the_root_is_degraded(watcher: Watcher, root: Path) -> None:
    root.rmdir()
    root.write_bytes(b"")
    assert "not a directory" in str(watcher.check())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_root_is_degraded_until_it_can_be_read(
    watcher: Watcher, root: Path, wakes: Wakes
) -> None:
    for mode in (0o000, 0o600, 0o300):
        root.chmod(mode)
        assert "permission denied" in str(watcher.check())
    root.chmod(0o700)
    assert watcher.check() is None
    assert_changes_wake(root, wakes)


def test_polling_has_no_threads(root: Path, wakes: Wakes) -> None:
    before = threading.active_count()
    watcher = Watcher(root, wakes.wake, polling=True)
    assert (watcher.check(), watcher.polling) == (None, True)
    assert threading.active_count() == before
    watcher.stop()


# -- the observer dies -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["InotifyObserver", "InotifyEmitter"])
def test_a_dead_thread_of_the_observer_is_replaced(
    watcher: Watcher, root: Path, wakes: Wakes, kind: str
) -> None:
    [thread] = [thread for thread in threading.enumerate() if type(thread).__name__ == kind]
    thread.stop()  # type: ignore[attr-defined]
    thread.join(TIMEOUT_S)
    assert_restored(watcher, root, wakes)


def test_two_hundred_recoveries_leave_no_thread_and_no_descriptor(
    watcher: Watcher, root: Path, wakes: Wakes
) -> None:
    before = threading.active_count(), descriptors()
    for _ in range(200):
        root.rmdir()
        assert watcher.check() is not None
        root.mkdir()
        assert watcher.check() is None
    assert threads_and_leaks(before) == (before[0], 0)
    assert_changes_wake(root, wakes)


def test_a_stopped_watcher_leaves_nothing(root: Path, wakes: Wakes) -> None:
    before = threading.active_count(), descriptors()
    for _ in range(20):
        watcher = Watcher(root, wakes.wake, polling=False)
        watcher.check()
        assert threading.active_count() > before[0]
        write(root)
        watcher.stop()
    assert threads_and_leaks(before) == (before[0], 0)


# -- the system refuses ----------------------------------------------------------------------------


def in_namespace(root: Path, script: str) -> str:
    """Run Python as root of a new user namespace, which has limits and mounts of its own."""
    unshare = shutil.which("unshare")
    if (
        unshare is None
        or subprocess.run([unshare, "-Urm", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no user namespaces here")
    prelude = f"""
        import subprocess, sys, threading, time
        from pathlib import Path
        from pipeline.intake.watcher import Watcher
        root, woken = Path({str(root)!r}), threading.Event()
        watches = Path("/proc/sys/user/max_inotify_watches")
        instances = Path("/proc/sys/user/max_inotify_instances")
        def wakes(path):
            time.sleep(0.2)
            woken.clear()
            path.write_bytes(b"x")
            return woken.wait({TIMEOUT_S})
        def descriptors():
            return len(list(Path("/proc/self/fd").iterdir()))
        watcher = Watcher(root, woken.set, polling=False)
    """
    ended = subprocess.run(
        [unshare, "-Urm", sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("limit", "named"), [("watches", "max_user_watches"), ("instances", "max_user_instances")]
)
def test_at_a_limit_of_the_system_it_says_which_limit_and_tries_again(
    root: Path, limit: str, named: str
) -> None:
    output = in_namespace(
        root,
        f"""
        {limit}.write_text("0")
        watcher.check()
        print(watcher.check())
        count = descriptors(), threading.active_count()
        for _ in range(200):
            assert "{named}" in watcher.check()
        assert (descriptors(), threading.active_count()) == count
        assert watcher.polling
        {limit}.write_text("100")
        assert watcher.check() is None and not watcher.polling
        assert wakes(root / "new.wav")
        watcher.stop()
        """,
    )
    assert output.startswith(f"{root} gives no events and is polled instead: the limit fs.inotify.{named}")


def test_what_is_there_instead_of_an_unmounted_file_system_is_watched(root: Path) -> None:
    in_namespace(
        root,
        """
        def run(*words):
            subprocess.run(words, check=True)
        run("mount", "-t", "tmpfs", "none", str(root))
        watcher.check()
        assert watcher.check() is None and wakes(root / "one.wav")
        run("umount", str(root))
        assert watcher.check() is None and wakes(root / "below the mount.wav")
        run("mount", "-t", "tmpfs", "none", str(root))
        assert watcher.check() is None and wakes(root / "two.wav")
        watcher.stop()
        """,
    )
