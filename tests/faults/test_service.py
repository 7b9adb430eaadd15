"""The program as a service: signals, reloads, messages to systemd, and long idle times.

The engines are those of drive.py, so that work lasts as long as a test needs.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from drive import AT_ONCE, STUCK_AT, Child, counts, is_idle, log_of, start, stop, wait_until
from home_folder import FAR, NEAR, Home, contents, write_music

pytestmark = pytest.mark.long  # true processes

INTAKE = {"settle_s": 0.2, "rescan_s": 1.0, "poll_s": 0.3}
TWO = ({"name": "one"}, {"name": "two"})
FORCED_S = 8  # how long the program waits for its engine to stop before it ends by force


def configure(home: Home, *variations: dict[str, Any], engine: str = "paced", **sections: Any) -> None:
    """Configure the engines of drive.py."""
    made_by = {"engine": engine, "duration_s": 1}
    settings = {"intake": INTAKE, "embed": {"engine": "free-vectors"}, "generate": made_by, **sections}
    home.configure(*(variations or TWO), **settings)


def drop(home: Home, *names: str) -> None:
    """Whole files, put in place by a rename."""
    for name in names:
        made = write_music(home.folder / "beside" / name, seed=zlib.crc32(name.encode()), seconds=1.5)
        made.replace(home.inbox / name)


def is_generating(home: Home) -> bool:
    """Whether an attempt at the variations is open."""
    if not counts(home):
        return False
    store = home.store()
    stages = [attempt.stage for attempt in store.attempts()]
    store.close()
    return "generate" in stages


def made_undisturbed(home: Home, folder: Path, *names: str) -> dict[str, str]:
    """What the same sources become in another home without any disturbance."""
    other = Home(folder)
    other.folder.mkdir()
    (other.folder / "settings.yaml").write_text((home.folder / "settings.yaml").read_text())
    other.inbox.mkdir()
    drop(other, *names)
    with start(other, "once", engines=True, env=AT_ONCE) as child:
        assert child.ended() == 0, child.text()
    return contents(other.outbox)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a.wav and b.wav become."""
    folder = tmp_path_factory.mktemp("undisturbed")
    like = Home(folder / "like")
    configure(like)
    return made_undisturbed(like, folder / "other", "a.wav", "b.wav")


def attempts(home: Home) -> dict[str, int]:
    """The counted attempts of each track."""
    store = home.store()
    found = {track.name: track.attempts for track in store.tracks()}
    store.close()
    return found


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [
    ("watch", signal.SIGTERM, 0),
    pytest.param(("watch", signal.SIGINT, 0), marks=pytest.mark.torture),
    pytest.param(("once", signal.SIGTERM, 128 + signal.SIGTERM), marks=pytest.mark.torture),
    pytest.param(("once", signal.SIGHUP, 128 + signal.SIGHUP), marks=pytest.mark.long),
], ids=str)  # fmt: skip
def test_a_signal_ends_the_work_at_its_next_step_and_a_later_run_gives_the_same_files(
    home: Home, figures: list[str], undisturbed: dict[str, str], case: tuple[str, signal.Signals, int]
) -> None:
    verb, signum, code = case
    configure(home)
    drop(home, "a.wav", "b.wav")
    with start(home, verb, engines=True) as child:
        wait_until(lambda: is_generating(home), "the variations are begun", child=child)
        began_s = time.monotonic()
        child.send(signum)
        assert child.ended() == code, child.text()
        figures.append(f"{verb} ended {time.monotonic() - began_s:.2f} s after {signum.name}")
    assert counts(home) == {"queued": 2, "running": 0, "done": 0, "failed": 0}
    assert attempts(home) == {"a.wav": 0, "b.wav": 0}
    with start(home, "once", engines=True, env=AT_ONCE) as child:
        assert child.ended() == 0, child.text()
    assert contents(home.outbox) == undisturbed


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(10))
def test_a_signal_at_any_moment_of_real_work_loses_nothing(
    home: Home, figures: list[str], tmp_path: Path, seed: int
) -> None:
    home.configure(NEAR, FAR, intake=INTAKE)
    names = [f"{i}.wav" for i in range(20)]
    drop(home, *names)
    rng, took_s = random.Random(seed), []
    for _ in range(6):
        with start(home, "watch") as child:
            wait_until(lambda: counts(home), "the program is up", child=child)
            time.sleep(rng.uniform(0.5, 3))
            began_s = time.monotonic()
            assert stop(child) == 0, child.text()
            took_s.append(time.monotonic() - began_s)
    assert set(attempts(home).values()) <= {0}
    with start(home, "once") as child:
        assert child.ended() == 0, child.text()
    figures.append(f"ended after at most {max(took_s):.2f} s")
    assert contents(home.outbox) == made_undisturbed(home, tmp_path / "other", *names)


@pytest.mark.parametrize(("verb", "code"), [
    pytest.param("watch", 0, marks=pytest.mark.long),
    pytest.param("once", 143, marks=pytest.mark.torture),
])  # fmt: skip
def test_a_program_whose_engine_does_not_stop_ends_by_force_with_its_tracks_queued(
    home: Home, figures: list[str], tmp_path: Path, verb: str, code: int
) -> None:
    configure(home, engine="stuck")
    drop(home, "a.wav", "b.wav")
    at = tmp_path / "stuck"
    with start(home, verb, engines=True, env={STUCK_AT: str(at)}) as child:
        wait_until(at.exists, "the engine is stuck", child=child)
        began_s = time.monotonic()
        child.send(signal.SIGTERM)
        assert child.ended(tries=20 * FORCED_S * 4) == code, child.text()
        figures.append(f"{verb} with a stuck engine ended {time.monotonic() - began_s:.2f} s after SIGTERM")
    assert counts(home)["queued"] == 2
    configure(home)
    with start(home, "once", engines=True, env=AT_ONCE) as child:
        assert child.ended() == 0, child.text()
    assert counts(home)["done"] == 2
    assert attempts(home) == {"a.wav": 0, "b.wav": 0}


def test_a_killed_run_leaves_no_lock_and_the_next_goes_on_without_waiting(
    home: Home, undisturbed: dict[str, str]
) -> None:
    configure(home, retry={"max_attempts": 3, "backoff_s": 3600})  # a wait for the backoff would take an hour
    drop(home, "a.wav", "b.wav")
    with start(home, "watch", engines=True) as child:
        wait_until(lambda: is_generating(home), "the variations are begun", child=child)
        child.send(signal.SIGKILL)
        child.ended()
    with start(home, "once", engines=True, env=AT_ONCE) as child:
        assert child.ended() == 0, child.text()
    assert contents(home.outbox) == undisturbed


# -- SIGHUP ----------------------------------------------------------------------------------------


def variations(home: Home, name: str) -> list[str]:
    """The names of a finished track's variations."""
    [folder] = home.outbox.glob(f"{name}--*")
    return [entry["name"] for entry in json.loads((folder / "manifest.json").read_text())["variations"]]


@pytest.mark.torture
def test_sighup_in_the_middle_of_work_ends_that_work_under_the_old_configuration_or_redoes_it(
    home: Home,
) -> None:
    """In either case the folder has the variations of one configuration, never some of both."""
    configure(home, {"name": "old"}, {"name": "older"})
    with start(home, "watch", engines=True) as child:
        drop(home, "first.wav")
        wait_until(lambda: is_generating(home), "it is generating", child=child)
        configure(home, {"name": "new"}, engine="free")
        child.send(signal.SIGHUP)
        wait_until(lambda: is_idle(home, done=1), "the first one is done", child=child)
        drop(home, "second.wav")
        wait_until(lambda: is_idle(home, done=2), "the second one is done", child=child)
        assert stop(child) == 0
    assert variations(home, "first") in (["old", "older"], ["new"])
    assert variations(home, "second") == ["new"]


@pytest.mark.long
def test_sighup_keeps_the_configuration_that_works_while_the_new_one_does_not(home: Home) -> None:
    configure(home, {"name": "old"}, engine="free")
    settings = home.folder / "settings.yaml"
    good = settings.read_text()
    broken = ("generate: {variations: [}", yaml.safe_dump({"generate": {"variatons": []}}), None)
    with start(home, "watch", engines=True) as child:
        wait_until(lambda: "watching" in log_of(home), "it listens to signals", child=child)
        for n, text in enumerate(broken, start=1):
            settings.unlink() if text is None else settings.write_text(text)
            child.send(signal.SIGHUP)
            wait_until(lambda n=n: len(errors_in(log_of(home))) == n, "the error is logged", child=child)
            drop(home, f"{n}.wav")
            wait_until(lambda n=n: is_idle(home, done=n), "work continues", child=child)
            assert variations(home, str(n)) == ["old"]
        settings.write_text(good.replace("old", "new"))
        child.send(signal.SIGHUP)
        drop(home, "mended.wav")
        wait_until(lambda: is_idle(home, done=4), "work continues", child=child)
        assert stop(child) == 0
    assert variations(home, "mended") == ["new"]


def errors_in(log: str) -> list[str]:
    return re.findall(r" ERROR .*settings\.yaml.*", log)


# -- messages to systemd ---------------------------------------------------------------------------


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(0.1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                self.messages += self._socket.recv(4096).decode().splitlines()
            except TimeoutError:
                continue

    def fed(self) -> int:
        return self.messages.count("WATCHDOG=1")

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()


@contextmanager
def manager() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        made = Manager(Path(folder) / "notify")
        try:
            yield made
        finally:
            made.close()


def environment(manager: Manager, watchdog_s: float) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": str(round(watchdog_s * 1e6))}


def test_start_idle_time_work_reload_and_end_are_reported_to_systemd(home: Home) -> None:
    configure(home)
    with manager() as systemd, start(home, "watch", engines=True, env=environment(systemd, 1.0)) as child:
        wait_until(lambda: "READY=1" in systemd.messages, "it reports that it is ready", child=child)
        idle = systemd.fed()
        wait_until(lambda: systemd.fed() >= idle + 3, "it feeds the watchdog while idle", child=child)
        drop(home, "a.wav")
        wait_until(lambda: is_generating(home), "it is generating", child=child)
        working = systemd.fed()
        wait_until(lambda: systemd.fed() >= working + 2, "it feeds the watchdog at work", child=child)
        assert is_generating(home)
        wait_until(lambda: is_idle(home, done=1), "it is done", child=child)
        readies = systemd.messages.count("READY=1")
        child.send(signal.SIGHUP)
        wait_until(lambda: systemd.messages.count("READY=1") > readies, "it is ready again", child=child)
        assert "RELOADING=1" in systemd.messages
        assert stop(child) == 0
        wait_until(lambda: "STOPPING=1" in systemd.messages, "it reports its end")


@pytest.mark.long
def test_a_stuck_engine_does_not_feed_the_watchdog(home: Home, tmp_path: Path) -> None:
    configure(home, engine="stuck")
    at = tmp_path / "stuck"
    with (
        manager() as systemd,
        start(home, "watch", engines=True, env={**environment(systemd, 1.0), STUCK_AT: str(at)}) as child,
    ):
        wait_until(lambda: "READY=1" in systemd.messages, "it reports that it is ready", child=child)
        drop(home, "a.wav")
        wait_until(at.exists, "the engine is stuck", child=child)
        time.sleep(0.5)  # for messages that were sent before
        fed = systemd.fed()
        time.sleep(3)
        assert fed > 0
        assert systemd.fed() == fed


# -- idle days, long queues ------------------------------------------------------------------------


def wait_until_idle(home: Home, child: Child, done: int) -> None:
    wait_until(lambda: is_idle(home, done=done), f"{done} are done", tries=30_000, child=child)
    time.sleep(1.0)  # for the last file to be archived


@pytest.mark.torture
@pytest.mark.parametrize("watch", ["events", "polling"])
def test_ten_idle_minutes_cost_nearly_nothing(home: Home, figures: list[str], watch: str) -> None:
    """With the default intervals, after many tracks (FINISHED) that were archived."""
    minutes, finished = float(os.environ.get("IDLE_MINUTES", "10")), int(os.environ.get("FINISHED", "2000"))
    configure(home, {"name": "one"}, engine="free", intake={"watch": watch})
    drop(home, *(f"{i}.wav" for i in range(finished)))
    with start(home, "watch", engines=True) as child:
        wait_until_idle(home, child, finished)
        cpu_s, descriptors, rss_mb = child.cpu_s(), child.descriptors(), child.rss_mb()
        time.sleep(60 * minutes)
        share = (child.cpu_s() - cpu_s) / (60 * minutes)
        what = f"{minutes:g} idle minutes of watch ({watch}) after {finished} files"
        figures.append(f"{what}: {share:.3%} of one core, {rss_mb:.0f} MB, {descriptors.total()} descriptors")
        assert share < 0.005
        assert child.descriptors() == descriptors
        assert child.rss_mb() < rss_mb + 10
        assert stop(child) == 0


@pytest.mark.torture
def test_memory_and_descriptors_stay_flat_over_2000_files(home: Home, figures: list[str]) -> None:
    configure(home, {"name": "one"}, engine="free")
    seen: dict[int, tuple[float, int]] = {}
    with start(home, "watch", engines=True) as child:
        for n in range(200, 2001, 200):
            drop(home, *(f"{i}.wav" for i in range(n - 200, n)))
            wait_until_idle(home, child, n)
            seen[n] = child.rss_mb(), child.descriptors().total()
            figures.append(f"{n} files: {seen[n][0]:.1f} MB, {seen[n][1]} descriptors")
        assert stop(child) == 0
    assert seen[2000][1] == seen[200][1]
    assert seen[2000][0] < seen[400][0] + 3  # 2 KB a file, as allocators vary
