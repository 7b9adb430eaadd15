"""The lease on a prefix of a bucket: of several instances, wherever they run, one writes there.

The lease is an object that its holder writes again and again, each time only over what it wrote before. One
that was not written for `lasts_s` has expired, by the clock of the bucket, and may be taken over. The holder
stops writing earlier: when it has not succeeded in renewing it for so long since it last asked to.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import AlreadyRunning, BucketAway, FolderUnusable, LeaseLost
from pipeline.fs.bucket import BucketFiles
from pipeline.fs.copying import FileIdentity

log = logging.getLogger("pipeline")

NAME = ".lease"
LASTS_S = 30.0
RENEWALS = 4  # in the time that it lasts
RESOLUTION_S = 1.0  # of the times of objects


def seconds() -> float:
    """Of a clock that goes on while the machine sleeps, where the system has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass
class Lease:
    """One instance's lease on a bucket's prefix."""

    files: BucketFiles
    owner: str  # names the state folder, whose lock is held: what a killed instance has left is taken at once
    lasts_s: float = LASTS_S
    clock: Callable[[], float] = seconds
    _written: FileIdentity | None = None
    _until: float = 0.0  # by `clock`
    _lost: bool = False
    _n_written: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def take(self) -> None:
        """Take the lease.

        Raises:
            AlreadyRunning: another instance holds it.
            FolderUnusable: the bucket can't be used, or ignores the conditions of writes.
        """
        now = self.files.check_conditions(self.owner)
        found = self.files.find(self.files.root / NAME)
        if found is not None:
            holder = self._holder()
            left_s = found.modified_s + float(holder.get("lasts_s", self.lasts_s)) + RESOLUTION_S - now
            if holder.get("owner") not in ("", self.owner) and left_s > 0:
                raise self._is_held_by(holder, f": its lease ends in {left_s:.0f} s if it is not renewed")
        if not self._write(self.owner, found.identity if found else None):
            raise self._is_held_by(self._holder())

    def _is_held_by(self, holder: dict[str, Any], more: str = "") -> AlreadyRunning:
        who = f"process {holder.get('process', '?')} on {holder.get('host', '?')}"
        return AlreadyRunning(f"another instance ({who}) uses {self.files.url}{more}")

    def _holder(self) -> dict[str, Any]:
        with suppress(FileNotFoundError, ValueError):
            holder = json.loads(self.files.read(self.files.root / NAME))
            return holder if isinstance(holder, dict) else {}
        return {}

    def _write(self, owner: str, known: FileIdentity | None) -> bool:
        asked_at = self.clock()
        self._n_written += 1  # so that no two writes are equal
        facts = {"owner": owner, "host": socket.gethostname(), "process": os.getpid(), "n": self._n_written}
        content = json.dumps({**facts, "at": time.time(), "lasts_s": self.lasts_s})
        written = self.files.write_if(self.files.root / NAME, content.encode(), known)
        if written is None:
            return False
        self._written, self._until = written, asked_at + self.lasts_s
        return True

    def check(self) -> None:
        """Called before anything is written.

        Raises:
            LeaseLost: another instance has taken the lease over.
            BucketAway: it can't be renewed at the moment, so that another instance may do so.
        """
        if self._lost:
            raise LeaseLost(f"another instance has taken over {self.files.url}")
        if self.clock() > self._until:
            raise BucketAway(f"the lease on {self.files.url} could not be renewed")

    def renew(self) -> None:
        """Renew it once; what prevents that is logged."""
        try:
            self._lost = self._lost or not self._write(self.owner, self._written)
        except FolderUnusable as e:
            log.warning("the lease on %s can't be renewed now: %s", self.files.url, e)

    def _keep(self) -> None:
        while not self._lost and not self._ended.wait(self.lasts_s / RENEWALS):
            self.renew()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease, renew it in a thread, and give it back at the end; raises as `take`."""
        self.take()
        thread = threading.Thread(target=self._keep, daemon=True)
        thread.start()
        self.files.lease = self
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self.files.lease = None
            if not self._lost:
                with suppress(FolderUnusable):
                    self._write("", self._written)
