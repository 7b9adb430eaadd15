"""Progress reports: what is being done now, and a line for what is finished."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

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
    step: str = ""  # the last one, in words

    @property
    def steps_per_s(self) -> float | None:
        """None before the first step."""
        took_s = time.time() - self.began_at
        return self.n_steps / took_s if self.n_steps and took_s > 0 else None


def name_of(names: Sequence[str]) -> str:
    """What one or several tracks are called."""
    return names[0] if len(names) == 1 else f"{len(names)} tracks"


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

    def stage(self, names: Sequence[str], stage: str, *, total: float = 0.0) -> None:
        """A stage of one or several tracks begins, with `total` steps if that is known."""
        self._furthest, self.activity = 0.0, Activity(name_of(names), stage, total=total)
        self._progress()

    def step(self, done: float, total: float, label: str) -> None:
        """The current stage has done `done` of `total` steps."""
        if now := self.activity:
            now.n_steps += 1
            now.step = label
            if (done, total) != (now.done, now.total):
                now.done, now.total, now.stepped_at = done, total, time.time()
        if done > self._furthest:
            self._furthest = done
            self._progress()

    def stage_done(self, name: str, stage: str, *, attempt: int, seconds: float) -> None:
        """A stage of a track is done, at which attempt and in how many seconds."""

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

    _what, _next = "", 0.0
    _facts: Mapping[str, object] = {}

    def another(self) -> Reporter:
        return LogReporter(self._progress)

    def stage(self, names: Sequence[str], stage: str, *, total: float = 0.0) -> None:
        super().stage(names, stage, total=total)
        self._what, self._next = f"{name_of(names)}: {stage}", LOG_EVERY
        self._facts = {"stage": stage, **({"track": names[0]} if len(names) == 1 else {})}
        log.info("%s", self._what, extra=self._facts)

    def step(self, done: float, total: float, label: str) -> None:
        super().step(done, total, label)
        share = done / total if total else 1.0
        if self._next <= share < 1.0:
            self._next = share + LOG_EVERY
            label = f" ({label})" if label else ""
            log.info("%s %.0f %%%s", self._what, 100 * share, label, extra=self._facts)

    def stage_done(self, name: str, stage: str, *, attempt: int, seconds: float) -> None:
        facts = {"track": name, "stage": stage, "attempt": attempt, "seconds": seconds}
        log.info("%s: %s took %.1f s", name, stage, seconds, extra=facts)

    def finished(self, name: str, text: str) -> None:
        super().finished(name, text)
        log.info("%s: done, %s", name, text, extra={"track": name})

    def failed(self, name: str, error: str) -> None:
        super().failed(name, error)
        log.error("%s: failed: %s", name, error, extra={"track": name})


class TerminalReporter(Reporter):
    """A line for each track that is finished; what runs is shown by `pipeline.cli.live`."""

    def __init__(self, console: Console, progress: Callable[[], None]) -> None:
        super().__init__(progress)
        self._console = console

    def another(self) -> Reporter:
        return TerminalReporter(self._console, self._progress)

    def finished(self, name: str, text: str) -> None:
        super().finished(name, text)
        self._print(f"[green]done[/]    {escape(name)}: {escape(text)}")

    def failed(self, name: str, error: str) -> None:
        super().failed(name, error)
        self._print(f"[red]failed[/]  {escape(name)}: {escape(error)}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
