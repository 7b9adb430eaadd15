"""Signals turned into flags, and the forced end of work that does not stop."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from pipeline.service.signals import Signals


def wait_for_signal(signals: Signals) -> None:
    """Wait until the listening thread has passed a signal on."""
    assert signals._woken.wait(10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    signals = Signals()
    with signals.on_signals():
        os.kill(os.getpid(), number)
        wait_for_signal(signals)
        assert signals.stopped_by == number


def test_a_hangup_asks_a_daemon_to_read_its_configuration_and_nothing_else() -> None:
    signals = Signals()
    with signals.on_signals(hangup_reloads=True):
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for_signal(signals)
        assert not signals.is_stopped()
        assert [signals.take_reload(), signals.take_reload()] == [True, False]


def test_a_signal_while_handlers_are_set_up_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent as soon as Python's own handler is replaced."""
    signals, set_handler = Signals(), signal.signal

    def set_and_send(number: int, handler: object) -> object:
        before = set_handler(number, handler)  # type: ignore[arg-type]
        if number == signal.SIGTERM:
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGTERM)
        return before

    monkeypatch.setattr(signal, "signal", set_and_send)
    with signals.on_signals():
        wait_for_signal(signals)
        assert signals.stopped_by == signal.SIGTERM


def test_a_signal_while_handlers_are_removed_goes_to_the_handler_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        with Signals().on_signals():
            remove = signal.set_wakeup_fd

            def remove_and_send(*arguments: int) -> int:
                fd = remove(*arguments)
                os.kill(os.getpid(), signal.SIGTERM)
                return fd

            monkeypatch.setattr(signal, "set_wakeup_fd", remove_and_send)
        assert noted == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def open_descriptors() -> int:
    """How many files are open; 0 where the system does not report it."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_handlers_and_threads_are_gone_afterwards() -> None:
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    descriptors = open_descriptors()
    for _ in range(50):
        with Signals().on_signals():
            pass
    assert signal.getsignal(signal.SIGTERM) is before
    assert threading.active_count() == threads
    assert open_descriptors() <= descriptors  # what earlier tests left may be closed meanwhile


def test_work_that_does_not_stop_in_time_is_ended_by_force() -> None:
    overdue = threading.Event()
    signals = Signals(deadline_s=0.01, overdue=lambda number: overdue.set())
    with signals.on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert overdue.wait(10)


def test_work_that_stops_in_time_is_not_ended_by_force() -> None:
    overdue = threading.Event()
    signals = Signals(deadline_s=1000, overdue=lambda number: overdue.set())
    with signals.on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_signal(signals)
    assert not overdue.is_set()


def test_a_second_ctrl_c_does_not_wait() -> None:
    overdue = threading.Event()
    signals = Signals(deadline_s=1000, overdue=lambda number: overdue.set())
    with signals.on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        wait_for_signal(signals)
        os.kill(os.getpid(), signal.SIGINT)
        assert overdue.wait(10)


def test_waiting_ends_when_woken_and_asking_clears_the_wake() -> None:
    signals = Signals()
    signals.wake()
    signals.wait(1000)
    assert [signals.take_wake(), signals.take_wake()] == [True, False]


def test_waiting_ends_at_a_stop_even_if_the_wake_was_taken() -> None:
    signals = Signals()
    signals.stop(signal.SIGTERM)
    signals.wait(1000)
    assert signals.is_stopped()
