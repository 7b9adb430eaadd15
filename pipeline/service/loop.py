"""`once` and `watch`: look, work, wait, until there is nothing left or somebody says stop."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from pipeline.errors import DiskFull, FolderUnusable, PipelineError, Stopped
from pipeline.fs.disk import environment_error_outside_tracks
from pipeline.intake.ingest import Ingest, ScanResult
from pipeline.intake.watcher import Watcher
from pipeline.runner.runner import Runner
from pipeline.service.health import Health
from pipeline.service.sd_notify import Notifier
from pipeline.service.signals import SHORTEST_WAIT_S, Signals

log = logging.getLogger("pipeline")

LONGEST_PAUSE_S = 60.0  # between tries while the disk is full or a folder is away
REFILL_S = 1.0  # between looks while files wait for working copies to be worked off
LOOK_SHARE = 0.1  # of the time at most, that goes into looks while there is work


@dataclass(frozen=True)
class Processor:
    """What works by one configuration."""

    ingest: Ingest
    runner: Runner


def run_once(processor: Processor, signals: Signals, health: Health) -> ScanResult:
    """Process all there is, then end; of a folder that isn't the inbox, only its own tracks.

    Files somebody may still be writing are waited for as long as it takes to see that they are
    whole; one that keeps changing is left for the next run. Tracks that failed in passing are
    tried again when their time has come.

    Returns:
        The last look at the folder, with the queued tracks of all looks.
    """
    ingest, runner = processor.ingest, processor.runner
    queued, unreadable, patience_s = 0, 0, 2 * ingest.settings.settle_s + 1.0
    while True:
        scan_result = ingest.scan(should_stop=signals.is_stopped)
        queued, unreadable = queued + scan_result.queued, unreadable + scan_result.unreadable
        _note(health, scan_result)
        runner.reporter.queued(runner.store.counts()["queued"] + runner.outcome.done + runner.outcome.failed)
        worked = runner.drain()
        due = runner.next_due()
        if signals.is_stopped():
            raise Stopped("asked to stop")
        if scan_result.is_cut_short or (worked and (scan_result.waiting or scan_result.no_room)):
            continue
        if scan_result.no_room:
            raise scan_result.no_room
        if (scan_result.unsettled or scan_result.troubled) and patience_s > 0:
            pause_s = min(ingest.settings.settle_s / 2, patience_s)
            patience_s -= max(pause_s, SHORTEST_WAIT_S)
            signals.wait(max(pause_s, SHORTEST_WAIT_S))
        elif due is not None:
            signals.wait(max(due - runner.clock(), SHORTEST_WAIT_S))
        else:
            return replace(scan_result, queued=queued, unreadable=unreadable)


@dataclass
class Watch:
    """The daemon. Events only shorten the wait for the next look; what goes wrong is waited out."""

    processor: Processor
    watcher: Watcher
    signals: Signals
    health: Health
    notifier: Notifier
    reload: Callable[
        [Processor], tuple[Processor, Watcher | None]
    ]  # and what watches from now on, if that is another
    clock: Callable[[], float] = time.monotonic
    _scan_result: ScanResult = field(default_factory=ScanResult)
    _scan_at: float = -float("inf")  # when the next look is due
    _scan_s: float = 0.0  # how long the last one took
    _pause_s: float = 0.0  # doubles while something stays wrong

    def run(self) -> None:
        """Work until a signal says stop."""
        self.watcher.start()
        log.info("watching %s", self.processor.ingest.folder.path)
        self.notifier.ready()
        try:
            while not self.signals.is_stopped():
                if self.signals.take_reload():
                    self._reload()
                if (pause_s := self._turn()) > 0:
                    self.signals.wait(max(pause_s, SHORTEST_WAIT_S))
        except Stopped:
            pass
        finally:
            self.notifier.stopping()
            self.watcher.stop()

    def _turn(self) -> float:
        """ScanResult if it is time, then take one batch; returns how long to wait, in seconds."""
        try:
            if self._pause_s:
                self.processor.runner.make_room()
            self._see()
            worked = self.processor.runner.next_batch()
        except Stopped:
            raise
        except Exception as e:
            fault = environment_error_outside_tracks(e)
            if fault is None:
                raise
            return self._wait_out(fault)
        self._pause_s = 0.0
        for what in ("disk", "folders"):
            self.health.well(what)
        self.notifier.progress()
        return 0.0 if worked else self._until_next()

    def _see(self) -> None:
        """Take in what has arrived. A vanished inbox is no reason to leave the queue alone."""
        trouble = self.watcher.check()
        if trouble is None:
            self.health.well("events")
        else:
            self.health.degraded("events", trouble)
            self._scan_at = min(self._scan_at, self.clock() + self.processor.ingest.settings.poll_s)
        now = self.clock()
        if self.signals.take_wake():
            self._scan_at = min(self._scan_at, now + self._scan_s / LOOK_SHARE)
        if now < self._scan_at:
            return
        try:
            self._scan_result = self.processor.ingest.scan(should_stop=self._feed_and_ask)
        except FolderUnusable as e:
            if isinstance(e, DiskFull):
                raise
            self.health.degraded("inbox", str(e))
            self._scan_at = self.clock() + self.processor.ingest.settings.poll_s
            return
        self.health.well("inbox")
        if self._scan_result.no_room is None:
            self.health.well("room")
        else:
            self.health.degraded("room", f"nothing more is taken in: {self._scan_result.no_room}")
        _note(self.health, self._scan_result)
        self._scan_s = self.clock() - now
        self._scan_at = self.clock() + (0.0 if self._scan_result.is_cut_short else self._rest_s())
        self.notifier.status(_words(self.processor.runner.store.counts()))

    def _feed_and_ask(self) -> bool:
        """Between two blocks of a file that is taken in, which is progress."""
        self.notifier.progress()
        return self.signals.is_stopped()

    def _rest_s(self) -> float:
        """How long after a look the next one is due if nothing rings."""
        settings = self.processor.ingest.settings
        rests = [settings.poll_s if self.watcher.polling else settings.rescan_s]
        if self._scan_result.unsettled or self._scan_result.troubled:
            rests.append(max(settings.settle_s / 2, SHORTEST_WAIT_S))
        if self._scan_result.waiting:
            rests.append(min(REFILL_S, settings.poll_s))
        if self._scan_result.no_room:
            rests.append(settings.poll_s)
        return max(min(rests), self._scan_s / LOOK_SHARE)

    def _until_next(self) -> float:
        waits = [self._scan_at - self.clock()]
        runner = self.processor.runner
        if (due := runner.next_due()) is not None:
            waits.append(max(due - runner.clock(), SHORTEST_WAIT_S))
        if self.notifier.watchdog_s is not None:
            waits.append(self.notifier.watchdog_s / 3)
        return max(min(waits), SHORTEST_WAIT_S)

    def _wait_out(self, fault: FolderUnusable) -> float:
        """The machine's fault: nothing is claimed or taken in until it has passed; tried again ever later."""
        self.health.degraded("disk" if isinstance(fault, DiskFull) else "folders", str(fault))
        store, runner = self.processor.runner.store, self.processor.runner
        with suppress(sqlite3.Error):
            store.reopen()
            store.release_all(now=runner.clock())
        self.notifier.progress()  # waiting is all there is to do
        self._pause_s = min(max(2 * self._pause_s, self.processor.ingest.settings.poll_s), LONGEST_PAUSE_S)
        return self._pause_s

    def _reload(self) -> None:
        """Read the configuration again between two batches: swapped if it is right, kept if not."""
        self.notifier.reloading()
        try:
            self.processor, watcher = self.reload(self.processor)
            if watcher is not None:
                self.watcher.stop()
                self.watcher = watcher
                self.watcher.start()
            self._scan_at = -float("inf")
            log.info("the configuration was read again")
            self.health.well("configuration")
        except PipelineError as e:
            log.error("the configuration is kept as it was: %s", e)
            self.health.degraded("configuration", f"kept as it was: {e}")
        self.notifier.ready()


def _note(health: Health, scan_result: ScanResult) -> None:
    health.note(
        inbox={
            "waiting": scan_result.waiting,
            "settling": scan_result.unsettled,
            "unmarked": scan_result.unmarked,
        }
    )


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in counts.items())
