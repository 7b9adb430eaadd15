"""The daemon's turns: what it looks at, what it waits out, and how it goes on."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from home_folder import write_music
from runner_setup import Answers, RunnerSetup
from stored_tracks import claim_due

from pipeline.errors import ConfigError, DiskFull, PipelineError
from pipeline.intake.ingest import ScanResult
from pipeline.intake.scanner import Rules, Scanner
from pipeline.intake.watcher import Watcher
from pipeline.outbox.outbox import Outbox
from pipeline.service.health import Health
from pipeline.service.loop import Processor, Watch, run_once
from pipeline.service.sd_notify import Notifier
from pipeline.service.signals import Signals
from pipeline.workspace import InputFolder


class FullDisk(Outbox):
    """An outbox on a disk that is full until a test says otherwise."""

    is_full = True

    def publish(self, *arguments: object, **how: object) -> object:  # type: ignore[override]
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().publish(*arguments, **how)  # type: ignore[arg-type]


class Daemon:
    """A `Watch` whose turns are taken by hand, and whose clock is set by hand."""

    def __init__(self, setup: RunnerSetup, outbox: Outbox | None = None) -> None:
        self.setup = setup
        self.monotonic = 0.0
        self.signals = Signals()
        self.health = Health(setup.workspace.health)
        self.processor = Processor(setup.ingest(), setup.runner(Answers(), outbox=outbox))
        self.watch = Watch(
            self.processor,
            Watcher(setup.workspace.inbox, self.signals.wake, polling=True),
            self.signals,
            self.health,
            Notifier.from_env({}),
            self.reload,
            clock=lambda: self.monotonic,
        )
        self.fresh: Processor | PipelineError = self.processor
        self.watch.watcher.start()
        self.signals.take_wake()  # of the start

    def reload(self, processor: Processor) -> tuple[Processor, None]:
        if isinstance(self.fresh, PipelineError):
            raise self.fresh
        return self.fresh, None

    def turn(self) -> float:
        """One turn; returns how long it would wait."""
        return self.watch._turn()

    def states(self) -> list[str]:
        return [track.state for track in self.setup.store.tracks()]


@pytest.fixture
def setup(tmp_path: Path) -> RunnerSetup:
    return RunnerSetup.at(tmp_path, settle_s=0, poll_s=5, rescan_s=30)


def test_a_file_is_taken_and_made_in_one_turn_and_then_it_rests(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    write_music(setup.workspace.inbox / "a.wav")

    assert daemon.turn() == 0.0
    assert daemon.states() == ["done"]
    assert daemon.turn() == pytest.approx(5.0)  # polling: at the next poll


def test_no_look_is_made_before_it_is_due_unless_something_rings(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    daemon.turn()
    write_music(setup.workspace.inbox / "a.wav")
    daemon.turn()
    assert daemon.states() == []

    daemon.signals.wake()
    daemon.turn()
    assert daemon.states() == ["done"]


def test_a_full_disk_pauses_everything_says_so_and_passes(setup: RunnerSetup) -> None:
    outbox = FullDisk(setup.workspace.outbox)
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


def test_a_vanished_inbox_is_looked_for_at_every_poll_and_leaves_the_queue_at_work(
    setup: RunnerSetup,
) -> None:
    daemon = Daemon(setup)
    setup.bring("a.wav")
    setup.workspace.inbox.rename(setup.workspace.home / "away")

    daemon.turn()

    assert daemon.states() == ["done"]
    assert "inbox" in daemon.health.conditions
    assert 0 < daemon.turn() <= 5.0

    (setup.workspace.home / "away").rename(setup.workspace.inbox)
    daemon.monotonic += 5.0
    daemon.turn()
    assert daemon.health.conditions == {}


def test_looks_take_a_tenth_of_the_time_at_most_however_often_it_rings(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    looks = []

    class SlowLooks:
        settings = setup.config.intake

        def scan(self, **_: object) -> ScanResult:
            looks.append(daemon.monotonic)
            daemon.monotonic += 1.0
            return ScanResult()

    daemon.watch.processor = Processor(SlowLooks(), daemon.processor.runner)  # type: ignore[arg-type]
    for _ in range(100):
        daemon.signals.wake()
        daemon.turn()
        daemon.monotonic += 0.25

    assert len(looks) <= daemon.monotonic / 10 + 1
    assert len(looks) >= 2


def test_a_configuration_that_is_right_is_taken_and_a_wrong_one_is_not(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    other = Processor(setup.ingest(), setup.runner(Answers()))

    daemon.fresh = ConfigError("retry: must be a mapping")
    daemon.watch._reload()
    assert daemon.watch.processor is daemon.processor
    assert "kept as it was" in daemon.health.conditions["configuration"].text

    daemon.fresh = other
    daemon.watch._reload()
    assert daemon.watch.processor is other
    assert daemon.health.conditions == {}


def test_a_stop_ends_the_watch(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    daemon.signals.stop(15)
    daemon.watch.run()
    assert daemon.states() == []


def test_a_device_that_fails_while_the_inbox_is_looked_at_is_waited_out(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)

    class Broken:
        settings = setup.config.intake

        def scan(self, **_: object) -> ScanResult:
            raise OSError(errno.EIO, "Input/output error", "inbox/a.wav")

    daemon.watch.processor = Processor(Broken(), daemon.processor.runner)  # type: ignore[arg-type]
    assert daemon.turn() == 5.0
    assert "input/output error" in daemon.health.conditions["folders"].text


def test_working_copies_without_room_do_not_keep_the_queue_from_work(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    setup.bring("a.wav")

    class Full:
        settings = setup.config.intake

        def scan(self, **_: object) -> ScanResult:
            return ScanResult(no_room=DiskFull("1 MB are free"))

    daemon.watch.processor = Processor(Full(), daemon.processor.runner)  # type: ignore[arg-type]
    daemon.turn()

    assert daemon.states() == ["done"]
    assert "nothing more is taken in" in daemon.health.conditions["room"].text


def test_a_long_look_feeds_the_watchdog(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    fed = []
    daemon.watch.notifier.progress = lambda: fed.append(1)  # type: ignore[method-assign]
    write_music(setup.workspace.inbox / "a.wav")

    daemon.watch._see()

    assert fed


def test_once_ends_when_what_waits_cannot_get_room(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)

    class Full:
        settings, folder = setup.config.intake, setup.workspace.input_folder

        def scan(self, **_: object) -> ScanResult:
            return ScanResult(no_room=DiskFull("1 MB are free"))

    with pytest.raises(DiskFull):
        run_once(Processor(Full(), daemon.processor.runner), daemon.signals, daemon.health)  # type: ignore[arg-type]


def test_once_of_a_folder_is_not_held_up_by_the_queue_of_another(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0, spool_gb=1e-6)
    setup.bring("a.wav")
    other = tmp_path / "other"
    write_music(other / "b.wav", seed=3, seconds=1.5)
    daemon = Daemon(setup)
    folder = InputFolder(other, is_inbox=False)
    ingest = replace(setup.ingest(), folder=folder, scanner=Scanner(other, Rules(is_inbox=False)))

    run_once(
        Processor(ingest, replace(setup.runner(Answers()), folder=folder)), daemon.signals, daemon.health
    )

    assert sorted(daemon.states()) == ["done", "queued"]


def test_a_bug_is_not_waited_out(setup: RunnerSetup) -> None:
    daemon = Daemon(setup)
    daemon.watch.processor = Processor(None, daemon.processor.runner)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        daemon.turn()


def test_files_that_wait_for_room_behind_a_queue_in_backoff_are_not_looked_at_without_pause(
    tmp_path: Path,
) -> None:
    setup = RunnerSetup.at(tmp_path, settle_s=0, spool_gb=1e-6, poll_s=5)
    [sha256] = setup.bring("a.wav")
    claim_due(setup.store, 1, now=setup.now)
    setup.store.release(sha256, not_before=setup.now + 1000)
    write_music(setup.workspace.inbox / "b.wav", seed=5)
    daemon = Daemon(setup)

    assert daemon.turn() == pytest.approx(1.0)
    assert daemon.watch._scan_result.waiting == 1
