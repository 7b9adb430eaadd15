"""The loops of `once` and `watch`: scan the input folder, process the queue, wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from pipeline.engines.base import check_stop
from pipeline.errors import AlreadyRunning, DiskFull, EngineUnusable, FolderUnusable, PipelineError, Stopped
from pipeline.fs.disk import environment_error
from pipeline.fs.names import printable
from pipeline.intake.ingest import Ingest, ScanResult
from pipeline.intake.settling import PATIENCE
from pipeline.intake.watcher import Watcher
from pipeline.pace import Wanted
from pipeline.runner.retry import local_time
from pipeline.runner.runner import Runner
from pipeline.service.health import WATCHDOG_S, Health
from pipeline.service.sd_notify import Notifier
from pipeline.service.signals import SHORTEST_WAIT_S, Signals

log = logging.getLogger("pipeline")

LONGEST_PAUSE_S = 60.0  # between tries while the disk is full, a folder is missing or an engine can't be used
REFILL_S = 1.0  # between scans while files wait for space among the working copies
RETRY_PATIENCE_S = 300.0  # how long `once` waits for the next try of a failed track
SCAN_SHARE = 0.1  # of the time, at most, that is spent on scans while there is work


class Configured(Protocol):
    """A configuration that can be read again; `pipeline.app.App` is one."""

    def reloaded(self, runner: Runner, signals: Signals) -> tuple[Configured, Ingest, Runner]: ...
    def watcher(self, signals: Signals) -> tuple[Watcher, str]: ...


@dataclass
class Session:
    """What a working command has open."""

    app: Configured  # replaced, with the next two, when the configuration is read again
    ingest: Ingest
    runner: Runner
    signals: Signals
    health: Health
    notifier: Notifier

    def workers(self) -> list[dict[str, Any]]:
        """See `Runner.workers`."""
        return self.runner.workers()

    def progress(self) -> None:
        """Tell those who wait for progress that there is some."""
        self.notifier.progress()
        self.health.progress()

    def note_wanted(self) -> None:
        """Report what the configuration makes of each track."""
        self.health.note(wanted=asdict(Wanted.of(self.runner.recipe)))


def run_once(session: Session) -> ScanResult:
    """Process everything that is ready, then end; from a folder that is not the inbox, only its own tracks.

    Files that may still be being written are waited for as long as it takes to see that they are
    complete; one that keeps changing is left for the next run. Tracks whose attempt failed are tried
    again when they are due, if that is within `RETRY_PATIENCE_S`; later tries are left for the next run,
    so that a run started by cron does not keep the lock for hours.

    Returns:
        The last scan, with what all scans found failed before, and as up to date the known files of the first
        scan and the new ones of all scans.
    """
    signals, ingest, runner = session.signals, session.ingest, session.runner
    failed, waited_s = set[str](), 0.0
    up_to_date: int | None = None
    settle_s, result = ingest.settings.settle_s, runner.result
    while True:
        scan = ingest.scan(should_stop=signals.is_stopped)
        result.failed |= scan.unreadable
        up_to_date = scan.brought_again + (scan.up_to_date if up_to_date is None else up_to_date)
        failed |= scan.failed - result.failed
        _report_inbox(session.health, scan)
        worked = runner.drain()
        check_stop(signals.is_stopped)
        has_more = scan.is_cut_short or (worked and (scan.waiting or scan.disk_full))
        if has_more:
            continue
        if scan.disk_full:
            raise scan.disk_full
        patience_s = (PATIENCE if scan.read_errors else 2) * settle_s + 1.0
        if (scan.unsettled or scan.read_errors) and waited_s < patience_s:
            pause_s = max(min(settle_s / 2, patience_s - waited_s), SHORTEST_WAIT_S)
            waited_s += pause_s
        elif (due := runner.next_due()) is not None and due <= runner.clock() + RETRY_PATIENCE_S:
            pause_s = max(due - runner.clock(), SHORTEST_WAIT_S)
            log.info("nothing else is due: waiting until %s for the next try", local_time(due))
        else:
            result.postponed_until = due
            return replace(scan, up_to_date=up_to_date, failed=failed)
        session.progress()
        signals.wait(pause_s)


@dataclass
class Watch:
    """The daemon. File system events only bring the next scan forward; environment errors are waited out."""

    session: Session
    clock: Callable[[], float] = time.monotonic
    _watcher: Watcher = field(init=False)
    _scan: ScanResult = field(default_factory=ScanResult)  # the last one
    _scan_at: float = -float("inf")  # when the next scan is due
    _scan_s: float = 0.0  # how long the last scan took
    _pause_s: float = 0.0  # doubles while an environment error lasts
    _reload_due: bool = False  # once no batch is being processed

    def __post_init__(self) -> None:
        self._watcher, self._mode = self.session.app.watcher(self.session.signals)

    def run(self) -> None:
        """Work until a signal asks to stop."""
        session = self.session
        self._note_mode()
        log.info("watching %s", printable(session.ingest.folder.path))
        session.notifier.ready()
        try:
            while not session.signals.is_stopped():
                self._reload_due |= session.signals.take_reload()
                if self._reload_due and not session.runner.is_busy:
                    self._reload()
                if (pause_s := self._turn()) > 0:
                    session.signals.wait(max(pause_s, SHORTEST_WAIT_S))
        except Stopped:
            pass
        finally:
            session.notifier.stopping()
            self._watcher.stop()

    def _note_mode(self) -> None:
        self.session.health.note(mode=self._mode)
        log.info("the inbox is watched by %s", self._mode)

    def _turn(self) -> float:
        """Scan if it is time to, then process one batch; returns how long to wait, in seconds."""
        self.session.runner.result.forget_tracks()
        try:
            if "disk" in self.session.health.conditions and not self.session.runner.is_busy:
                self.session.runner.free_space()
            self._scan_if_due()
            worked = not self._reload_due and self.session.runner.next_batch()
            if not worked and (gallery := self.session.runner.gallery):
                gallery.refresh(force=True)
        except Exception as e:
            fault = environment_error(e, in_track=False)
            if fault is None or isinstance(fault, AlreadyRunning):
                raise
            return self._wait_out(fault)
        self.session.health.note(workers=self.session.workers())
        if self.session.runner.is_busy:
            return self._until_next()
        if self.session.runner.has_error:
            return 0.0
        self._pause_s = 0.0
        for what in ("disk", "folders", "engine"):
            self.session.health.well(what)
        self.session.progress()
        if worked:
            return 0.0
        self.session.runner.release_if_idle()
        self.session.health.note(workers=self.session.workers())
        return self._until_next()

    def _scan_if_due(self) -> None:
        """Take in what has arrived. A missing inbox does not keep the queue from being processed."""
        health = self.session.health
        self._check_events()
        now = self.clock()
        if self.session.signals.take_wake():
            self._scan_at = min(self._scan_at, now + self._scan_s / SCAN_SHARE)
        if now < self._scan_at:
            return
        try:
            self._scan = self.session.ingest.scan(should_stop=self._feed_and_ask)
        except (AlreadyRunning, DiskFull):
            raise
        except FolderUnusable as e:
            health.degraded("inbox", str(e))
            self._scan_at = self.clock() + self.session.ingest.settings.poll_s
            return
        health.well("inbox")
        if self._scan.disk_full is None:
            health.well("room")
        else:
            health.degraded("room", f"no more files are taken in: {self._scan.disk_full}")
        _report_inbox(health, self._scan)
        self._scan_s = self.clock() - now
        self._scan_at = self.clock() + (0.0 if self._scan.is_cut_short else self._until_rescan())
        counts = self.session.runner.store.counts()
        self.session.notifier.status(", ".join(f"{n} {state}" for state, n in counts.items()))

    def _check_events(self) -> None:
        problem = self._watcher.check()
        if problem is None:
            self.session.health.well("events")
        else:
            self.session.health.degraded("events", problem)
            self._scan_at = min(self._scan_at, self.clock() + self.session.ingest.settings.poll_s)

    def _feed_and_ask(self) -> bool:
        """Called between two blocks of a file that is taken in, which is progress."""
        self.session.progress()
        return self.session.signals.is_stopped()

    def _until_rescan(self) -> float:
        """How long after a scan the next one is due if no event comes, in seconds."""
        settings, scan = self.session.ingest.settings, self._scan
        rests = [settings.poll_s if self._watcher.polling else settings.rescan_s]
        if scan.unsettled or scan.read_errors:
            rests.append(max(settings.settle_s / 2, SHORTEST_WAIT_S))
        if scan.waiting:
            rests.append(min(REFILL_S, settings.poll_s))
        if scan.disk_full:
            rests.append(settings.poll_s)
        return max(min(rests), self._scan_s / SCAN_SHARE)

    def _until_next(self) -> float:
        waits = [self._scan_at - self.clock()]
        if self.session.runner.has_room and (due := self.session.runner.next_due()) is not None:
            waits.append(max(due - self.session.runner.clock(), SHORTEST_WAIT_S))
        waits.append((self.session.notifier.watchdog_s or WATCHDOG_S) / 3)
        return max(min(waits), SHORTEST_WAIT_S)

    def _wait_out(self, fault: FolderUnusable | EngineUnusable) -> float:
        """Queue what was running again; returns the pause until the next try, which grows with each try."""
        self.session.health.degraded(condition_name(fault), str(fault))
        if not self.session.runner.is_busy:
            self.session.runner.attempts.put_back_all()
        self.session.progress()  # waiting is the right thing to do, so the watchdog must not act
        self._pause_s = min(max(2 * self._pause_s, self.session.ingest.settings.poll_s), LONGEST_PAUSE_S)
        return self._pause_s

    def _reload(self) -> None:
        """Read the configuration again; a wrong one is refused, and the old one stays in use."""
        session, self._reload_due = self.session, False
        session.notifier.reloading()
        try:
            session.app, session.ingest, session.runner = session.app.reloaded(
                session.runner, session.signals
            )
        except PipelineError as e:
            log.error("the configuration stays as it was: %s", e)
            session.health.degraded("configuration", f"stays as it was: {e}")
        else:
            self._watcher.stop()
            self._watcher, self._mode = session.app.watcher(session.signals)
            self._note_mode()
            self._scan_at = -float("inf")
            session.note_wanted()
            log.info("the configuration was read again")
            session.health.well("configuration")
        session.notifier.ready()


def condition_name(fault: FolderUnusable | EngineUnusable) -> str:
    """What `status` calls an environment error."""
    if isinstance(fault, EngineUnusable):
        return "engine"
    return "disk" if isinstance(fault, DiskFull) else "folders"


def _report_inbox(health: Health, scan: ScanResult) -> None:
    health.scanned(waiting=scan.waiting, settling=scan.unsettled, unmarked=scan.unmarked)
