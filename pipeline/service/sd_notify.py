"""Reports the service's state to systemd: sd_notify(3), datagrams to the socket named by NOTIFY_SOCKET.

Outside systemd the variable is not set and every call does nothing. A socket that is full or dead
never raises, since the work matters more than the report of it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

log = logging.getLogger("pipeline")

SEND_PATIENCE_S = 1.0  # for a service manager that is slow to read


@dataclass
class Notifier:
    """`clock` is CLOCK_MONOTONIC in seconds, which is the clock of the times of reloads in systemd."""

    address: str | None  # as sendto() takes it; None: there is no service manager
    watchdog_s: float | None  # systemd ends the service after this time without progress
    clock: Callable[[], float] = time.monotonic
    _progress_at: float | None = field(default=None, init=False)

    @classmethod
    def from_env(
        cls, env: Mapping[str, str] = os.environ, *, clock: Callable[[], float] = time.monotonic
    ) -> Notifier:
        return cls(_address(env.get("NOTIFY_SOCKET", "")), _watchdog_s(env), clock)

    def ready(self) -> None:
        """The service has started, or has finished a reload."""
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` reports the end."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={round(self.clock() * 1e6)}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def progress(self) -> None:
        """Progress was made. It is sent at most four times per `watchdog_s`, so it may be called freely."""
        now = self.clock()
        if self.watchdog_s is None:
            return
        if self._progress_at is None or now - self._progress_at >= self.watchdog_s / 4:
            self._progress_at = now
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self.address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_PATIENCE_S)
                sender.sendto(message.encode("utf-8", errors="replace"), self.address)
        except OSError as e:
            log.debug("%r can't be sent to the service manager: %s", message, e)


def _address(name: str) -> str | None:
    """A path, or a name in the abstract namespace, written with "@" in place of its first byte, a zero."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _watchdog_s(env: Mapping[str, str]) -> float | None:
    """WATCHDOG_USEC in seconds, if it is meant for this process and not for the parent it came from."""
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    usec = env.get("WATCHDOG_USEC", "")
    return int(usec) / 1e6 if usec.isascii() and usec.isdigit() and int(usec) > 0 else None
