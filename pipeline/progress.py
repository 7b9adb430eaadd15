"""Progress reports: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger("pipeline")

LOG_EVERY = 0.25  # of a stage: how often its progress is logged


@dataclass
class Activity:
    """What is being done: a stage of a track, or of several."""

    name: str
    stage: str
    began_at: float = field(default_factory=time.time)
    n_steps: int = 0  # reported so far
    done: float = 0.0  # of `total`: takes, parts of them included
    total: float = 0.0  # 0: not known yet
    stepped_at: float = field(default_factory=time.time)  # when `done` last changed

    @property
    def steps_per_s(self) -> float | None:
        """None before the first step."""
        took_s = time.time() - self.began_at
        return self.n_steps / took_s if self.n_steps and took_s > 0 else None


class Reporter:
    """Receives everything that happens to tracks; `name` is always printable. This one shows nothing.

    `progress` is called for real progress, which a watchdog may wait for; of the steps, only for
    those that are beyond the furthest so far.
    """

    activity: Activity | None = None  # None: nothing is being done

    def __init__(self, progress: Callable[[], None] = lambda: None) -> None:
        self._progress, self._furthest = progress, 0.0

    def another(self) -> Reporter:
        """A reporter to the same place, for stages that run at the same time as those of this one."""
        return self

    def queued(self, total: int) -> None:
        """`total` is how many tracks this run has finished or still has to process."""

    def stage(self, name: str, stage: str) -> None:
        """A stage begins; `name` is the track's name or the number of tracks."""
        self._furthest, self.activity = 0.0, Activity(name, stage)
        self._progress()

    def step(self, done: float, total: float, label: str) -> None:
        """The current stage has done `done` of `total` steps."""
        if now := self.activity:
            now.n_steps += 1
            if (done, total) != (now.done, now.total):
                now.done, now.total, now.stepped_at = done, total, time.time()
        if done > self._furthest:
            self._furthest = done
            self._progress()

    def idle(self) -> None:
        """A batch has ended, and the next one has not begun."""
        self.activity = None

    def finished(self, name: str, text: str) -> None:
        """A track is done."""
        self._progress()

    def failed(self, name: str, error: str) -> None:
        """A track failed for good."""
        self._progress()


class LogReporter(Reporter):
    """Log lines, for cron, systemd and files."""

    _name, _stage, _next = "", "", 0.0

    def another(self) -> Reporter:
        return LogReporter(self._progress)

    def stage(self, name: str, stage: str) -> None:
        super().stage(name, stage)
        self._name, self._stage, self._next = name, stage, LOG_EVERY
        log.info("%s: %s", name, stage)

    def step(self, done: float, total: float, label: str) -> None:
        super().step(done, total, label)
        share = done / total if total else 1.0
        if self._next <= share < 1.0:
            self._next = share + LOG_EVERY
            log.info("%s: %s %.0f %%%s", self._name, self._stage, 100 * share, f" ({label})" if label else "")

    def finished(self, name: str, text: str) -> None:
        super().finished(name, text)
        log.info("%s: done, %s", name, text)

    def failed(self, name: str, error: str) -> None:
        super().failed(name, error)
        log.error("%s: failed: %s", name, error)


@dataclass
class Counts:
    """The tracks of a run, and their bar."""

    bar: TaskID
    done: int = 0
    total: int = 0


class BarReporter(Reporter):
    """Bars on a terminal: one for the tracks of the run, and one for the steps of each current stage."""

    def __init__(self, bars: Progress, progress: Callable[[], None], counts: Counts | None = None) -> None:
        super().__init__(progress)
        self._bars = bars
        self._counts = counts or Counts(bars.add_task("tracks", total=None, label=""))
        self._now = bars.add_task("", total=None, label="", visible=False)

    def another(self) -> Reporter:
        return BarReporter(self._bars, self._progress, self._counts)

    def queued(self, total: int) -> None:
        self._counts.total = total
        self._show_tracks()

    def stage(self, name: str, stage: str) -> None:
        super().stage(name, stage)
        short = name if len(name) <= 40 else name[:39] + "…"
        self._bars.reset(self._now, description=f"{short}: {stage}", total=None, visible=True, label="")

    def step(self, done: float, total: float, label: str) -> None:
        super().step(done, total, label)
        self._bars.update(self._now, completed=done, total=total, label=label, visible=True)

    def finished(self, name: str, text: str) -> None:
        super().finished(name, text)
        self._one_less(f"[green]done[/]    {escape(name)}: {escape(text)}")

    def failed(self, name: str, error: str) -> None:
        super().failed(name, error)
        self._one_less(f"[red]failed[/]  {escape(name)}: {escape(error)}")

    def _one_less(self, line: str) -> None:
        self._bars.console.print(line, highlight=False, soft_wrap=True)
        self._bars.update(self._now, visible=False)
        self._counts.done += 1
        self._show_tracks()

    def _show_tracks(self) -> None:
        done, total = self._counts.done, self._counts.total
        self._bars.update(
            self._counts.bar, completed=done, total=total or None, label=f"{done} of {total}" if total else ""
        )


@contextmanager
def reporting_to(console: Console, progress: Callable[[], None]) -> Iterator[Reporter]:
    """Bars on a terminal, log lines elsewhere."""
    if not console.is_terminal:
        yield LogReporter(progress)
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[label]}", markup=False),
        console=console,
        transient=True,
    ) as bars:
        yield BarReporter(bars, progress)
