"""The daemon's turns: what it looks at, what it waits out, and how it goes on."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from home_folder import write_music
from runner_setup import Answers, Works

from pipeline.errors import ConfigError, DiskFull, PipelineError
from pipeline.intake.ingest import Look
from pipeline.intake.scanner import Rules, Scanner
from pipeline.intake.watcher import Watcher
from pipeline.outbox.outbox import Outbox
from pipeline.service.health import Health
from pipeline.service.loop import Crew, Watch, run_once
from pipeline.service.sd_notify import Notifier
from pipeline.service.signals import Alarm


class FullDisk(Outbox):
    """An outbox on a disk that is full until a test says otherwise."""

    is_full = True

    def publish(self, *arguments: object, **how: object) -> object:  # type: ignore[override]
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().publish(*arguments, **how)  # type: ignore[arg-type]


class Daemon:
    """A `Watch` whose turns are taken by hand, and whose clock is set by hand."""

    def __init__(self, works: Works, outbox: Outbox | None = None) -> None:
        self.works = works
        self.monotonic = 0.0
        self.alarm = Alarm()
        self.health = Health(works.workplace.health)
        self.crew = Crew(works.arrivals(), works.runner(Answers(), outbox=outbox))
        self.watch = Watch(
            self.crew,
            Watcher(works.workplace.inbox, self.alarm.ring, polling=True),
            self.alarm,
            self.health,
            Notifier.from_env({}),
            self.reload,
            clock=lambda: self.monotonic,
        )
        self.fresh: Crew | PipelineError = self.crew
        self.watch.watcher.start()
        self.alarm.take_ring()  # of the start

    def reload(self, crew: Crew) -> tuple[Crew, None]:
        if isinstance(self.fresh, PipelineError):
            raise self.fresh
        return self.fresh, None

    def turn(self) -> float:
        """One turn; returns how long it would wait."""
        return self.watch._turn()

    def states(self) -> list[str]:
        return [track.state for track in self.works.store.tracks()]


@pytest.fixture
def works(tmp_path: Path) -> Works:
    return Works.at(tmp_path, settle_s=0, poll_s=5, rescan_s=30)


def test_a_file_is_taken_and_made_in_one_turn_and_then_it_rests(works: Works) -> None:
    daemon = Daemon(works)
    write_music(works.workplace.inbox / "a.wav")

    assert daemon.turn() == 0.0
    assert daemon.states() == ["done"]
    assert daemon.turn() == pytest.approx(5.0)  # polling: at the next poll


def test_no_look_is_made_before_it_is_due_unless_something_rings(works: Works) -> None:
    daemon = Daemon(works)
    daemon.turn()
    write_music(works.workplace.inbox / "a.wav")
    daemon.turn()
    assert daemon.states() == []

    daemon.alarm.ring()
    daemon.turn()
    assert daemon.states() == ["done"]


def test_a_full_disk_pauses_everything_says_so_and_passes(works: Works) -> None:
    outbox = FullDisk(works.workplace.outbox)
    daemon = Daemon(works, outbox)
    write_music(works.workplace.inbox / "a.wav")

    pauses = [daemon.turn() for _ in range(6)]

    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    assert list(daemon.health.conditions) == ["disk"]
    assert [(track.state, track.attempts) for track in works.store.tracks()] == [("queued", 0)]

    outbox.is_full = False
    daemon.turn()
    assert daemon.states() == ["done"]
    assert daemon.health.conditions == {}


def test_a_vanished_inbox_is_looked_for_at_every_poll_and_leaves_the_queue_at_work(works: Works) -> None:
    daemon = Daemon(works)
    works.bring("a.wav")
    works.workplace.inbox.rename(works.workplace.home / "away")

    daemon.turn()

    assert daemon.states() == ["done"]
    assert "inbox" in daemon.health.conditions
    assert 0 < daemon.turn() <= 5.0

    (works.workplace.home / "away").rename(works.workplace.inbox)
    daemon.monotonic += 5.0
    daemon.turn()
    assert daemon.health.conditions == {}


def test_looks_take_a_tenth_of_the_time_at_most_however_often_it_rings(works: Works) -> None:
    daemon = Daemon(works)
    looks = []

    class SlowLooks:
        settings = works.config.intake

        def look(self, **_: object) -> Look:
            looks.append(daemon.monotonic)
            daemon.monotonic += 1.0
            return Look()

    daemon.watch.crew = Crew(SlowLooks(), daemon.crew.runner)  # type: ignore[arg-type]
    for _ in range(100):
        daemon.alarm.ring()
        daemon.turn()
        daemon.monotonic += 0.25

    assert len(looks) <= daemon.monotonic / 10 + 1
    assert len(looks) >= 2


def test_a_configuration_that_is_right_is_taken_and_a_wrong_one_is_not(works: Works) -> None:
    daemon = Daemon(works)
    other = Crew(works.arrivals(), works.runner(Answers()))

    daemon.fresh = ConfigError("retry: must be a mapping")
    daemon.watch._reload()
    assert daemon.watch.crew is daemon.crew
    assert "kept as it was" in daemon.health.conditions["configuration"].text

    daemon.fresh = other
    daemon.watch._reload()
    assert daemon.watch.crew is other
    assert daemon.health.conditions == {}


def test_a_stop_ends_the_watch(works: Works) -> None:
    daemon = Daemon(works)
    daemon.alarm.stop(15)
    daemon.watch.run()
    assert daemon.states() == []


def test_a_device_that_fails_while_the_inbox_is_looked_at_is_waited_out(works: Works) -> None:
    daemon = Daemon(works)

    class Broken:
        settings = works.config.intake

        def look(self, **_: object) -> Look:
            raise OSError(errno.EIO, "Input/output error", "inbox/a.wav")

    daemon.watch.crew = Crew(Broken(), daemon.crew.runner)  # type: ignore[arg-type]
    assert daemon.turn() == 5.0
    assert "input/output error" in daemon.health.conditions["folders"].text


def test_working_copies_without_room_do_not_keep_the_queue_from_work(works: Works) -> None:
    daemon = Daemon(works)
    works.bring("a.wav")

    class Full:
        settings = works.config.intake

        def look(self, **_: object) -> Look:
            return Look(no_room=DiskFull("1 MB are free"))

    daemon.watch.crew = Crew(Full(), daemon.crew.runner)  # type: ignore[arg-type]
    daemon.turn()

    assert daemon.states() == ["done"]
    assert "nothing more is taken in" in daemon.health.conditions["room"].text


def test_a_long_look_feeds_the_watchdog(works: Works) -> None:
    daemon = Daemon(works)
    fed = []
    daemon.watch.notifier.progress = lambda: fed.append(1)  # type: ignore[method-assign]
    write_music(works.workplace.inbox / "a.wav")

    daemon.watch._see()

    assert fed


def test_once_ends_when_what_waits_cannot_get_room(works: Works) -> None:
    daemon = Daemon(works)

    class Full:
        settings, is_inbox, root = works.config.intake, True, works.workplace.inbox

        def look(self, **_: object) -> Look:
            return Look(no_room=DiskFull("1 MB are free"))

    with pytest.raises(DiskFull):
        run_once(Crew(Full(), daemon.crew.runner), daemon.alarm, daemon.health)  # type: ignore[arg-type]


def test_once_of_a_folder_is_not_held_up_by_the_queue_of_another(tmp_path: Path) -> None:
    works = Works.at(tmp_path, settle_s=0, spool_gb=1e-6)
    works.bring("a.wav")
    other = tmp_path / "other"
    write_music(other / "b.wav", seed=3, seconds=1.5)
    daemon = Daemon(works)
    arrivals = replace(
        works.arrivals(), root=other, is_inbox=False, scanner=Scanner(other, Rules(is_inbox=False))
    )

    run_once(Crew(arrivals, daemon.crew.runner), daemon.alarm, daemon.health)

    assert sorted(daemon.states()) == ["done", "queued"]


def test_a_bug_is_not_waited_out(works: Works) -> None:
    daemon = Daemon(works)
    daemon.watch.crew = Crew(None, daemon.crew.runner)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        daemon.turn()


def test_files_that_wait_for_room_behind_a_queue_in_backoff_are_not_looked_at_without_pause(
    tmp_path: Path,
) -> None:
    works = Works.at(tmp_path, settle_s=0, spool_gb=1e-6, poll_s=5)
    [sha256] = works.bring("a.wav")
    works.store.claim(1, now=works.now)
    works.store.release(sha256, not_before=works.now + 1000)
    write_music(works.workplace.inbox / "b.wav", seed=5)
    daemon = Daemon(works)

    assert daemon.turn() == pytest.approx(1.0)
    assert daemon.watch._look.waiting == 1
