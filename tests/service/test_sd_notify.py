"""The messages to systemd, as a real datagram socket receives them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.service.sd_notify import Notifier


class Manager:
    """The receiving end."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(0)

    def received(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return messages


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.socket.close()


@pytest.fixture
def env(tmp_path: Path, manager: Manager) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(tmp_path / "notify")}


def test_start_and_stop_are_reported_to_systemd(manager: Manager, env: dict[str, str]) -> None:
    notifier = Notifier.from_env(env)
    notifier.ready()
    notifier.stopping()
    assert manager.received() == ["READY=1", "STOPPING=1"]


def test_a_reload_says_when_in_microseconds_of_the_monotonic_clock(
    manager: Manager, env: dict[str, str]
) -> None:
    Notifier.from_env(env, clock=lambda: 12.345678).reloading()
    assert manager.received() == ["RELOADING=1\nMONOTONIC_USEC=12345678"]


def test_the_clock_by_default_is_the_one_that_systemd_reads(manager: Manager, env: dict[str, str]) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier.from_env(env).reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    [message] = manager.received()
    assert before <= int(message.split("MONOTONIC_USEC=")[1]) <= after + 1


def test_a_status_is_sent_whatever_it_contains(manager: Manager, env: dict[str, str]) -> None:
    notifier = Notifier.from_env(env)
    notifier.status("3 queued")
    notifier.status("\udcff.wav")
    assert manager.received() == ["STATUS=3 queued", "STATUS=?.wav"]


def test_progress_feeds_the_watchdog_at_most_four_times_per_period(
    manager: Manager, env: dict[str, str]
) -> None:
    now = [100.0]
    notifier = Notifier.from_env({**env, "WATCHDOG_USEC": "600000000"}, clock=lambda: now[0])
    assert notifier.watchdog_s == 600.0
    for seconds in (0, 1, 149, 150, 151, 299, 300, 1000):
        now[0] = 100.0 + seconds
        notifier.progress()
    assert manager.received() == ["WATCHDOG=1"] * 4  # at 0, 150, 300 and 1000 s


def test_without_a_watchdog_progress_is_not_reported(manager: Manager, env: dict[str, str]) -> None:
    Notifier.from_env(env).progress()
    assert manager.received() == []


@pytest.mark.parametrize("usec", ["", "0", "-1", "soon", "1.5", "²"])
def test_an_invalid_watchdog_time_counts_as_no_watchdog(env: dict[str, str], usec: str) -> None:
    assert Notifier.from_env({**env, "WATCHDOG_USEC": usec}).watchdog_s is None


def test_a_watchdog_applies_only_to_the_process_that_it_names(env: dict[str, str]) -> None:
    asked = {**env, "WATCHDOG_USEC": "30000000"}
    assert Notifier.from_env({**asked, "WATCHDOG_PID": str(os.getpid())}).watchdog_s == 30.0
    assert Notifier.from_env({**asked, "WATCHDOG_PID": str(os.getppid())}).watchdog_s is None


def test_names_in_the_abstract_namespace_are_reached() -> None:
    name = f"variations-test-{os.getpid()}"
    manager = Manager("\0" + name)
    Notifier.from_env({"NOTIFY_SOCKET": "@" + name}).ready()
    assert manager.received() == ["READY=1"]
    manager.socket.close()


def send_everything(notifier: Notifier) -> None:
    notifier.ready()
    notifier.reloading()
    notifier.status("well")
    notifier.progress()
    notifier.stopping()


@pytest.mark.parametrize(
    "name", [None, "", "relative/path", "vsock:2:1234", "/nowhere/notify", "/" + "x" * 500]
)
def test_where_nobody_listens_every_call_does_nothing(name: str | None) -> None:
    env = {"WATCHDOG_USEC": "1000000"}
    send_everything(Notifier.from_env(env if name is None else {**env, "NOTIFY_SOCKET": name}))


def test_a_socket_whose_listener_died_does_not_stop_the_program(
    manager: Manager, env: dict[str, str], tmp_path: Path
) -> None:
    manager.socket.close()
    assert (tmp_path / "notify").exists()
    send_everything(Notifier.from_env({**env, "WATCHDOG_USEC": "1000000"}))


def test_a_listener_that_never_reads_does_not_stop_the_program(
    manager: Manager, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.service.sd_notify.SEND_PATIENCE_S", 0.01)
    notifier = Notifier.from_env(env)
    backlog = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    for _ in range(backlog + 5):
        notifier.ready()
    assert 0 < len(manager.received()) <= backlog + 1


def test_no_descriptor_is_left_open(manager: Manager, env: dict[str, str]) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    send_everything(Notifier.from_env({**env, "WATCHDOG_USEC": "1000000"}))
    assert len(manager.received()) == 5
    assert len(list(Path("/dev/fd").iterdir())) == before
