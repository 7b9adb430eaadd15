"""The loops of `once` and `watch`: what is scanned when, what is waited for, and how work continues."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from home_folder import write_music
from runner_setup import RunnerSetup, StubGenerator, StubJudge, UnloadableEngines, failing_for
from stored_tracks import claim_due

from pipeline.errors import BadAudio, ConfigError, DiskFull, EngineFailure, EngineUnusable, PipelineError
from pipeline.executors.inline import InlineExecutor
from pipeline.fs import copying
from pipeline.intake.ingest import Ingest, ScanResult
from pipeline.intake.scanner import Scanner
from pipeline.intake.watcher import Watcher
from pipeline.outbox.outbox import Outbox, Published
from pipeline.runner.runner import Runner
from pipeline.service.health import Health
from pipeline.service.loop import RETRY_PATIENCE_S, Session, Watch, run_once
from pipeline.service.sd_notify import Notifier
from pipeline.service.signals import Signals
from pipeline.workspace import InputFolder


class FullDisk(Outbox):
    """An outbox on a disk that is full until a test sets `is_full`."""

    is_full = True

    def publish(self, folder: str, file: str, content: bytes) -> Published:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().publish(folder, file, content)


@dataclass
class Configuration:
    """A configuration whose reload gives `fresh`: a new ingest and runner, or an error."""

    inbox: Path
    fresh: tuple[Ingest, Runner] | PipelineError

    def reloaded(self, runner: object, signals: object) -> tuple[Configuration, Ingest, Runner]:
        if isinstance(self.fresh, PipelineError):
            raise self.fresh
        return self, *self.fresh

    def watcher(self, signals: Signals) -> tuple[Watcher, str]:
        return Watcher(self.inbox, signals.wake, polling=True), "polling (test)"


class Daemon:
    """A `Watch` whose turns are taken by the test, and whose clock is set by the test."""

    def __init__(self, setup: RunnerSetup, outbox: Outbox | None = None) -> None:
        self.setup = setup
        self.monotonic = 0.0
        self.signals = Signals()
        self.health = Health(setup.workspace.health)
        ingest, runner = setup.ingest(), setup.runner(StubGenerator(), outbox=outbox)
        self.configuration = Configuration(setup.workspace.inbox, (ingest, runner))
        notifier = Notifier.from_env({})
        self.session = Session(self.configuration, ingest, runner, self.signals, self.health, notifier)
        self.watch = Watch(self.session, clock=lambda: self.monotonic)
        self.watch._note_mode()
        self.signals.take_wake()  # the one that is set at the start

    def turn(self) -> float:
        """Take one turn; returns how long the daemon would wait after it."""
        return self.watch._turn()

    def states(self) -> list[str]:
        return [track.state for track in self.setup.store.tracks()]


@pytest.fixture
def setup(tmp_path: Path) -> RunnerSetup:
    return RunnerSetup.at(tmp_path, settle_s=0, poll_s=5, rescan_s=30)


def test_a_file_is_taken_in_and_processed_in_one_turn_and_then_the_daemon_waits(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    write_music(setup.workspace.inbox / "a.wav")

    assert daemon.turn() == 0.0
    assert daemon.states() == ["done"]
    assert daemon.turn() == pytest.approx(5.0)  # polling: at the next poll
    assert daemon.session.runner.result.done == set()  # it would grow for ever


def test_no_scan_is_made_before_it_is_due_unless_an_event_comes(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    daemon.turn()
    write_music(setup.workspace.inbox / "a.wav")
    daemon.turn()
    assert daemon.states() == []

    daemon.signals.wake()
    daemon.turn()
    assert daemon.states() == ["done"]


def test_a_full_disk_pauses_all_work_and_is_reported_until_there_is_space(setup: RunnerSetup) -> None:
    outbox = FullDisk(setup.workspace.outbox_files)
    daemon = Daemon(setup, outbox)
    write_music(setup.workspace.inbox / "a.wav")

    pauses = [daemon.turn() for _ in range(6)]

    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    assert list(daemon.health.conditions) == ["disk"]
    assert [(track.state, track.attempts) for track in setup.store.tracks()] == [("queued", 0)]

    outbox.is_full = False
    daemon.turn()
    assert daemon.states() == ["done"]
    assert daemon.health.conditions == {}


def test_a_worker_has_nothing_to_do_once_its_batch_has_ended(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    setup.add_tracks("a.wav")
    daemon.turn()
    assert [one["stage"] for one in daemon.session.workers()] == [None]


def test_a_missing_inbox_is_checked_at_every_poll_and_does_not_stop_the_queue(
    setup: RunnerSetup,
) -> None:
    daemon = Daemon(setup)
    setup.add_tracks("a.wav")
    setup.workspace.inbox.rename(setup.workspace.home / "away")

    daemon.turn()

    assert daemon.states() == ["done"]
    assert "inbox" in daemon.health.conditions
    assert 0 < daemon.turn() <= 5.0

    (setup.workspace.home / "away").rename(setup.workspace.inbox)
    daemon.monotonic += 5.0
    daemon.turn()
    assert daemon.health.conditions == {}


def test_scans_take_a_tenth_of_the_time_at_most_however_many_events_come(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    scans = []

    class SlowScans:
        settings = setup.config.intake

        def scan(self, **_: object) -> ScanResult:
            scans.append(daemon.monotonic)
            daemon.monotonic += 1.0
            return ScanResult()

    daemon.session.ingest = SlowScans()  # type: ignore[arg-type]
    for _ in range(100):
        daemon.signals.wake()
        daemon.turn()
        daemon.monotonic += 0.25

    assert len(scans) <= daemon.monotonic / 10 + 1
    assert len(scans) >= 2


def test_a_valid_configuration_is_used_after_a_reload_and_a_wrong_one_is_not(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    ingest, runner = daemon.session.ingest, daemon.session.runner
    others = setup.ingest(), setup.runner(StubGenerator())

    daemon.configuration.fresh = ConfigError("retry: must be a mapping")
    daemon.watch._reload()
    assert daemon.session.ingest is ingest and daemon.session.runner is runner
    assert "stays as it was" in daemon.health.conditions["configuration"]["text"]

    daemon.configuration.fresh = others
    daemon.watch._reload()
    assert daemon.session.ingest is others[0] and daemon.session.runner is others[1]
    assert daemon.health.conditions == {}


def test_a_stop_ends_the_watch(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    daemon.signals.stop(15)
    daemon.watch.run()
    assert daemon.states() == []


def test_a_device_error_during_a_scan_is_waited_out(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)

    class Broken:
        settings = setup.config.intake

        def scan(self, **_: object) -> ScanResult:
            raise OSError(errno.EIO, "Input/output error", "inbox/a.wav")

    daemon.session.ingest = Broken()  # type: ignore[arg-type]
    assert daemon.turn() == 5.0
    assert "input/output error" in daemon.health.conditions["folders"]["text"]


def test_working_copies_without_space_do_not_stop_the_queue(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    setup.add_tracks("a.wav")

    class Full:
        settings = setup.config.intake

        def scan(self, **_: object) -> ScanResult:
            return ScanResult(disk_full=DiskFull("1 MB are free"))

    daemon.session.ingest = Full()  # type: ignore[arg-type]
    daemon.turn()

    assert daemon.states() == ["done"]
    assert "no more files are taken in" in daemon.health.conditions["room"]["text"]


def test_a_long_scan_feeds_the_watchdog(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    fed = []
    daemon.session.notifier.progress = lambda: fed.append(1)  # type: ignore[method-assign]
    write_music(setup.workspace.inbox / "a.wav")

    daemon.watch._scan_if_due()

    assert fed


def test_once_ends_when_there_is_no_space_for_waiting_files(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)

    class Full:
        settings, folder = setup.config.intake, setup.workspace.input_folder

        def scan(self, **_: object) -> ScanResult:
            return ScanResult(disk_full=DiskFull("1 MB are free"))

    daemon.session.ingest = Full()  # type: ignore[arg-type]
    with pytest.raises(DiskFull):
        run_once(daemon.session)


def test_once_of_a_folder_does_not_wait_for_the_queue_of_another(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0, spool_gb=1e-6)
    setup.add_tracks("a.wav")
    other = tmp_path / "other"
    write_music(other / "b.wav", seed=3, seconds=1.5)
    daemon = Daemon(setup)
    folder = InputFolder(other, is_inbox=False)
    ingest = replace(setup.ingest(), folder=folder, scanner=Scanner(folder, setup.config.intake))

    daemon.session.ingest = ingest
    daemon.session.runner = replace(setup.runner(StubGenerator()), folder=folder)
    run_once(daemon.session)

    assert sorted(daemon.states()) == ["done", "queued"]


def test_an_unexpected_error_ends_the_daemon(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    daemon.session.ingest = None  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        daemon.turn()


def test_files_that_wait_for_space_behind_a_queue_in_backoff_are_not_scanned_without_pause(
    tmp_path: Path,
) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0, spool_gb=1e-6, poll_s=5)
    [sha256] = setup.add_tracks("a.wav")
    claim_due(setup.store, 1, now=setup.now)
    setup.store.release(sha256, not_before=setup.now + 1000)
    write_music(setup.workspace.inbox / "b.wav", seed=5)
    daemon = Daemon(setup)

    assert daemon.turn() == pytest.approx(1.0)
    assert daemon.watch._scan.waiting == 1


def test_an_engine_that_cannot_be_loaded_is_waited_out_and_reported(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    write_music(setup.workspace.inbox / "a.wav")
    engines = UnloadableEngines(StubGenerator(), error=EngineUnusable("device: cuda can't be used"))
    daemon.session.runner = replace(daemon.session.runner, executor=InlineExecutor(engines, StubJudge()))

    assert [daemon.turn() for _ in range(3)] == [5.0, 10.0, 20.0]
    assert [(what, one["text"]) for what, one in daemon.health.conditions.items()] == [
        ("engine", "device: cuda can't be used")
    ]
    assert (setup.workspace.inbox / "a.wav").exists()
    assert daemon.states() == ["queued"]

    engines.error = None
    daemon.turn()
    assert daemon.states() == ["done"]
    assert daemon.health.conditions == {}


def test_once_says_what_it_waits_for_and_leaves_a_late_retry_for_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    setup = RunnerSetup.at(tmp_path, settle_s=0, max_attempts=9)
    [sha256] = setup.add_tracks("a.wav")
    daemon = Daemon(setup)
    runner = setup.runner(StubGenerator(failing_for(sha256, EngineFailure("made silence"))))
    daemon.session.runner = runner
    daemon.signals.wait = lambda seconds: setattr(setup, "now", setup.now + seconds)  # type: ignore[method-assign]

    run_once(daemon.session)

    track = setup.track(sha256)
    waits = caplog.text.count("waiting until")
    assert (track.state, track.attempts) == ("queued", waits + 1)
    assert waits > 2  # they double: about 10, 20, 40 ... s
    assert runner.result.postponed_until == track.not_before > setup.now + RETRY_PATIENCE_S


def test_once_of_a_folder_counts_each_track_once_however_many_scans_there_are(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=10)
    folder = InputFolder(tmp_path / "music", is_inbox=False)
    before = setup.now
    for n, name in enumerate(("old.wav", "fresh.wav")):
        write_music(folder.path / name, seed=n, seconds=1.5)
    os.utime(folder.path / "old.wav", (before - 100, before - 100))
    daemon = Daemon(setup)
    scanner = Scanner(folder, setup.config.intake)
    ingest = replace(setup.ingest(trust_times=False), folder=folder, scanner=scanner)
    runner = replace(setup.runner(StubGenerator()), folder=folder)
    daemon.session.ingest, daemon.session.runner = ingest, runner
    daemon.signals.wait = lambda seconds: setattr(setup, "now", setup.now + seconds)  # type: ignore[method-assign]

    first, second = run_once(daemon.session), run_once(daemon.session)

    assert len(runner.result.done) == 2
    assert (first.up_to_date, second.up_to_date) == (0, 2)


def test_once_waits_for_a_new_file_that_may_not_be_read_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=2.0)
    path = write_music(setup.workspace.inbox / "a.wav", seconds=1.5)
    setup.now = path.lstat().st_ctime
    readable_at, real = setup.now + 8.0, copying.copy_in

    def copy_in(source: Path, target: Path, **how: Any) -> str | None:
        if setup.now < readable_at:
            raise BadAudio("can't be read: permission denied")
        return real(source, target, **how)

    monkeypatch.setattr(copying, "copy_in", copy_in)
    daemon = Daemon(setup)
    daemon.signals.wait = lambda seconds: setattr(setup, "now", setup.now + seconds)  # type: ignore[method-assign]

    run_once(daemon.session)

    assert daemon.states() == ["done"]


class BusyRunner:
    """Wraps a runner, as if batches were being processed in other threads."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.is_busy = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def test_while_batches_are_processed_files_are_taken_in_and_nothing_is_freed_or_reloaded(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Daemon(setup)
    runner = BusyRunner(daemon.session.runner)
    monkeypatch.setattr(runner, "next_batch", lambda: True, raising=False)
    monkeypatch.setattr(runner, "free_space", lambda: pytest.fail("working copies are in use"), raising=False)
    daemon.session.runner = runner  # type: ignore[assignment]
    daemon.health.degraded("disk", "full")
    write_music(setup.workspace.inbox / "a.wav")

    assert daemon.turn() > 0
    setup.now += 100
    daemon.turn()
    assert daemon.states() == ["queued"]
