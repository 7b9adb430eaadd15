"""`once` and `watch`: look, work, wait, until there is nothing left or somebody says stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.arrivals import Arrivals, Look
from pipeline.errors import Stopped
from pipeline.runner import Runner

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver

log = logging.getLogger("pipeline")

SHORTEST_WAIT_S = 0.05


@dataclass
class Alarm:
    """Wakes a waiting service: for a signal to stop, or because something moved in the inbox."""

    stopped_by: int | None = None  # the signal's number
    _bell: threading.Event = field(default_factory=threading.Event)

    def ring(self) -> None:
        self._bell.set()

    def stop(self, signum: int, _frame: object = None) -> None:
        self.stopped_by = signum
        self._bell.set()

    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    def wait(self, seconds: float) -> None:
        self._bell.wait(max(seconds, SHORTEST_WAIT_S))
        if not self.is_stopped():
            self._bell.clear()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the work at its next step; what is under way is queued again."""
        before = {s: signal.signal(s, self.stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def run_once(arrivals: Arrivals, runner: Runner, alarm: Alarm, *, root: Path | None) -> Look:
    """Process all there is, then end; `root` limits it to the tracks of that folder.

    Files somebody may still be writing are waited for as long as it takes to see that they are
    whole; one that keeps changing is left for the next run. Tracks that failed in passing are
    tried again when their time has come.

    Returns:
        The last look at the folder, with the queued tracks of all looks.
    """
    queued, patience = 0, 2 * arrivals.settings.settle_s + 1.0
    while True:
        look = arrivals.look(should_stop=alarm.is_stopped)
        queued += look.queued
        runner.reporter.queued(runner.store.counts()["queued"] + runner.outcome.done + runner.outcome.failed)
        runner.drain(root=root)
        due = runner.store.next_due(root=root)
        if alarm.is_stopped():
            raise Stopped("asked to stop")
        if look.unsettled and patience > 0:
            pause = min(arrivals.settings.settle_s / 2, patience)
            patience -= max(pause, SHORTEST_WAIT_S)
            alarm.wait(pause)
        elif due is not None:
            alarm.wait(due - runner.clock())
        else:
            look.queued = queued
            return look


def run_watch(arrivals: Arrivals, runner: Runner, alarm: Alarm) -> None:
    """Work until a signal says stop. Events only shorten the wait for the next look."""
    observer = _observed(arrivals.root, alarm)
    log.info("watching %s", arrivals.root)
    try:
        while not alarm.is_stopped():
            look = arrivals.look(should_stop=alarm.is_stopped)
            try:
                runner.drain()
            except Stopped:
                return
            alarm.wait(_pause(arrivals, runner, look))
    finally:
        observer.stop()
        observer.join()


def _pause(arrivals: Arrivals, runner: Runner, look: Look) -> float:
    pauses = [arrivals.settings.rescan_s]
    if look.unsettled:
        pauses.append(arrivals.settings.settle_s / 2)
    if (due := runner.store.next_due()) is not None:
        pauses.append(due - runner.clock())
    return min(pauses)


def _observed(root: Path, alarm: Alarm) -> BaseObserver:
    """A running observer that rings at any change below `root`; reading a file is none."""
    from watchdog.events import FileSystemEvent, FileSystemEventHandler
    from watchdog.observers import Observer

    class Ring(FileSystemEventHandler):
        def on_any_event(self, event: FileSystemEvent) -> None:
            if event.event_type not in ("opened", "closed_no_write"):
                alarm.ring()

    observer = Observer()
    observer.schedule(Ring(), str(root), recursive=True)
    observer.start()
    return observer
