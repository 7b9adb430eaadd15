"""Progress reports: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger("pipeline")

LOG_EVERY = 0.25  # of a stage: how often its progress is logged


class Reporter(Protocol):
    """Receives everything that happens to tracks; `name` is always printable."""

    def queued(self, total: int) -> None:
        """`total` is how many tracks this run has finished or still has to process."""

    def stage(self, name: str, stage: str) -> None:
        """A stage begins; `name` is the track's name or the number of tracks."""

    def step(self, done: float, total: float, label: str) -> None:
        """The current stage has done `done` of `total` steps."""

    def finished(self, name: str, text: str) -> None:
        """A track is done."""

    def failed(self, name: str, error: str) -> None:
        """A track failed for good."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LogReporter:
    """Log lines, for cron, systemd and files."""

    def __init__(self) -> None:
        self._name, self._stage, self._next = "", "", 0.0

    def queued(self, total: int) -> None:
        pass

    def stage(self, name: str, stage: str) -> None:
        self._name, self._stage, self._next = name, stage, LOG_EVERY
        log.info("%s: %s", name, stage)

    def step(self, done: float, total: float, label: str) -> None:
        share = done / total if total else 1.0
        if self._next <= share < 1.0:
            self._next = share + LOG_EVERY
            log.info("%s: %s %.0f %%%s", self._name, self._stage, 100 * share, f" ({label})" if label else "")

    def finished(self, name: str, text: str) -> None:
        log.info("%s: done, %s", name, text)

    def failed(self, name: str, error: str) -> None:
        log.error("%s: failed: %s", name, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class BarReporter:
    """Two bars on a terminal: the tracks of the run, and the steps of the current stage."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[label]}", markup=False),
            console=console,
            transient=True,
        )
        self._tracks = self._progress.add_task("tracks", total=None, label="")
        self._now = self._progress.add_task("", total=None, label="", visible=False)
        self._done, self._total = 0, 0

    def queued(self, total: int) -> None:
        self._total = total
        self._show_tracks()

    def stage(self, name: str, stage: str) -> None:
        short = name if len(name) <= 40 else name[:39] + "…"
        self._progress.reset(self._now, description=f"{short}: {stage}", total=None, visible=True, label="")

    def step(self, done: float, total: float, label: str) -> None:
        self._progress.update(self._now, completed=done, total=total, label=label)

    def finished(self, name: str, text: str) -> None:
        self._one_less(f"[green]done[/]    {escape(name)}: {escape(text)}")

    def failed(self, name: str, error: str) -> None:
        self._one_less(f"[red]failed[/]  {escape(name)}: {escape(error)}")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _one_less(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, soft_wrap=True)
        self._done += 1
        self._show_tracks()

    def _show_tracks(self) -> None:
        label = f"{self._done} of {self._total}" if self._total else ""
        self._progress.update(self._tracks, completed=self._done, total=self._total or None, label=label)


class WatchedReporter:
    """Passes everything on, and calls `progress` for a step only if it is beyond the furthest so far."""

    def __init__(self, reporter: Reporter, progress: Callable[[], None]) -> None:
        self._reporter, self._progress, self._furthest = reporter, progress, 0.0

    def queued(self, total: int) -> None:
        self._reporter.queued(total)

    def stage(self, name: str, stage: str) -> None:
        self._furthest = 0.0
        self._progress()
        self._reporter.stage(name, stage)

    def step(self, done: float, total: float, label: str) -> None:
        if done > self._furthest:
            self._furthest = done
            self._progress()
        self._reporter.step(done, total, label)

    def finished(self, name: str, text: str) -> None:
        self._progress()
        self._reporter.finished(name, text)

    def failed(self, name: str, error: str) -> None:
        self._progress()
        self._reporter.failed(name, error)

    def __enter__(self) -> Self:
        self._reporter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reporter.__exit__(*error)


def reporter_for(console: Console) -> Reporter:
    return BarReporter(console) if console.is_terminal else LogReporter()
