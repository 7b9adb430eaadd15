"""Signals turned into flags, and the end by force of what doesn't listen."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from pipeline.service.signals import Alarm


def arrived(alarm: Alarm) -> None:
    """Wait until the thread that listens has passed a signal on; the alarm rings then."""
    assert alarm._bell.wait(10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    alarm = Alarm()
    with alarm.on_signals():
        os.kill(os.getpid(), number)
        arrived(alarm)
        assert alarm.stopped_by == number


def test_a_hangup_asks_a_daemon_to_read_its_configuration_and_nothing_else() -> None:
    alarm = Alarm()
    with alarm.on_signals(hangup_reloads=True):
        os.kill(os.getpid(), signal.SIGHUP)
        arrived(alarm)
        assert not alarm.is_stopped()
        assert [alarm.take_reload(), alarm.take_reload()] == [True, False]


def test_a_signal_while_handlers_are_set_up_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as soon as Python's own handling of it is replaced."""
    alarm, set_handler = Alarm(), signal.signal

    def set_and_send(number: int, handler: object) -> object:
        before = set_handler(number, handler)  # type: ignore[arg-type]
        if number == signal.SIGTERM:
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGTERM)
        return before

    monkeypatch.setattr(signal, "signal", set_and_send)
    with alarm.on_signals():
        arrived(alarm)
        assert alarm.stopped_by == signal.SIGTERM


def test_a_signal_while_handlers_are_taken_off_goes_to_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        with Alarm().on_signals():
            take_off = signal.set_wakeup_fd

            def take_off_and_send(*arguments: int) -> int:
                fd = take_off(*arguments)
                os.kill(os.getpid(), signal.SIGTERM)
                return fd

            monkeypatch.setattr(signal, "set_wakeup_fd", take_off_and_send)
        assert noted == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def open_descriptors() -> int:
    """How many files are open; 0 where the system doesn't tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_handlers_and_threads_are_gone_afterwards() -> None:
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    descriptors = open_descriptors()
    for _ in range(50):
        with Alarm().on_signals():
            pass
    assert signal.getsignal(signal.SIGTERM) is before
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors


def test_what_does_not_stop_in_time_is_ended_by_force() -> None:
    overdue = threading.Event()
    alarm = Alarm(deadline_s=0.01, overdue=lambda number: overdue.set())
    with alarm.on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert overdue.wait(10)


def test_what_stops_in_time_is_not() -> None:
    overdue = threading.Event()
    alarm = Alarm(deadline_s=1000, overdue=lambda number: overdue.set())
    with alarm.on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        arrived(alarm)
    assert not overdue.is_set()


def test_a_second_ctrl_c_does_not_wait() -> None:
    overdue = threading.Event()
    alarm = Alarm(deadline_s=1000, overdue=lambda number: overdue.set())
    with alarm.on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        arrived(alarm)
        os.kill(os.getpid(), signal.SIGINT)
        assert overdue.wait(10)


def test_waiting_ends_when_it_rings_and_asking_quiets_the_bell() -> None:
    alarm = Alarm()
    alarm.ring()
    alarm.wait(1000)
    assert [alarm.take_ring(), alarm.take_ring()] == [True, False]


def test_waiting_ends_at_a_stop_even_if_its_bell_was_quieted() -> None:
    alarm = Alarm()
    alarm.stop(signal.SIGTERM)
    alarm.wait(1000)
    assert alarm.is_stopped()
