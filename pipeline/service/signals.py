"""Signals, and waking a waiting service.

Signals are read from the file descriptor that Python's C-level handler writes to, by a thread that
does nothing else: so they are seen while the main thread is deep in a library's C code, and no lock
is taken inside a handler. If the work has not ended `deadline_s` after it was asked to stop, or at a
second Ctrl-C, `overdue` is called, which is expected to release the work and end the process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SHORTEST_WAIT_S = 0.05
DEADLINE_S = 8.0  # systemd and people expect an end within 10 s
STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Signals:
    """Asks a service to stop or to read its configuration again, and wakes it while it waits."""

    stopped_by: int | None = None  # the signal's number
    deadline_s: float = DEADLINE_S
    overdue: Callable[[int], None] | None = None  # called with the signal's number after the deadline
    _reload: threading.Event = field(default_factory=threading.Event)
    _woken: threading.Event = field(default_factory=threading.Event)
    _halt: threading.Event = field(default_factory=threading.Event)

    def wake(self) -> None:
        self._woken.set()

    def take_wake(self) -> bool:
        """Whether `wake` was called since the last time this was asked."""
        woken = self._woken.is_set()
        self._woken.clear()
        return woken

    def stop(self, signum: int) -> None:
        self.stopped_by = signum
        self._halt.set()
        self._woken.set()

    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    def reload(self) -> None:
        self._reload.set()
        self._woken.set()

    def take_reload(self) -> bool:
        """Whether the configuration is to be read again, asked for since the last call of this."""
        asked = self._reload.is_set()
        self._reload.clear()
        return asked

    def wait(self, seconds: float) -> None:
        """Wait until woken or the time is up, but at least `SHORTEST_WAIT_S` unless stopped."""
        if not self._halt.wait(max(0.0, min(seconds, SHORTEST_WAIT_S))):
            self._woken.wait(max(0.0, seconds - SHORTEST_WAIT_S))

    @contextmanager
    def on_signals(self, *, hangup_reloads: bool = False) -> Iterator[None]:
        """Within, SIGINT and SIGTERM stop the work at its next step; SIGHUP too, unless it means reload."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        numbers = (*STOPPING, signal.SIGHUP)
        old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # first, so that no signal is lost
        before = {number: signal.signal(number, _ignore) for number in numbers}
        thread = threading.Thread(target=self._listen, args=(reader, hangup_reloads), daemon=True)
        thread.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_fd)
            os.close(writer)
            thread.join()
            os.close(reader)

    def _listen(self, reader: int, hangup_reloads: bool) -> None:
        """Pass signals on until the pipe is closed."""
        deadline = threading.Timer(self.deadline_s, self._end_by_force)
        deadline.daemon = True
        while number := os.read(reader, 1):
            if self.is_stopped():
                if number[0] == signal.SIGINT:
                    self._end_by_force()
            elif number[0] == signal.SIGHUP and hangup_reloads:
                self.reload()
            elif number[0] in (*STOPPING, signal.SIGHUP):
                self.stop(number[0])
                deadline.start()
        deadline.cancel()

    def _end_by_force(self) -> None:
        if self.overdue is not None:
            self.overdue(self.stopped_by or signal.SIGTERM)


def _ignore(_number: int, _frame: object) -> None:
    """Replaces the default action; the signal's number has been written to the pipe already."""
