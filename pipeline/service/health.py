"""What a running instance reports to `status`: a small JSON file, replaced as a whole at every change.

On a full disk the file keeps its last state, and the log says so.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import os_reason

# All conditions that there are.
CONDITIONS = ("configuration", "disk", "engine", "events", "folders", "inbox", "metrics", "room")

log = logging.getLogger("pipeline")

PROGRESS_S = 1.0  # between two reports of what the workers do
WATCHDOG_S = 600.0  # of no progress, after which an instance counts as hung; as WatchdogSec in deploy/


class Health:
    """Keeps the file at `path` up to date. No method raises when the file can't be written."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self.conditions: dict[str, dict[str, Any]] = {}  # what is wrong now, by its short name
        self.on_report: Callable[[dict[str, Any]], None] = lambda report: None  # called with what is written
        self._started_at = self._progress_at = clock()
        self._scanned_at: float | None = None
        self._facts: dict[str, Any] = {}
        self.workers: Callable[[], list[dict[str, Any]]] = list  # gives what each worker does
        self._is_failing = False
        self._written_at = -float("inf")
        self._writing = threading.RLock()  # `progress` is called in the threads that wait for workers

    def open(self) -> None:
        """Report that this process runs."""
        self._write()

    def degraded(self, what: str, text: str) -> None:
        """Report that the condition `what` holds; a new text replaces the old one, `since` stays."""
        before = self.conditions.get(what, {})
        if before.get("text") == text:
            return
        if not before:
            log.warning("%s", text)
        self.conditions[what] = {"what": what, "since": before.get("since", self._clock()), "text": text}
        self._write()

    def well(self, what: str) -> None:
        """Report that the condition `what` is over, if it was reported."""
        if over := self.conditions.pop(what, None):
            log.info("%s: well again after %.0f s", what, max(self._clock() - over["since"], 0))
            self._write()

    def note(self, **facts: object) -> None:
        """Report JSON values such as `mode="polling"`. The file is written only if one has changed."""
        with self._writing:
            if any(name not in self._facts or self._facts[name] != fact for name, fact in facts.items()):
                self._facts.update(facts)
                self._write()

    def scanned(self, **inbox: int) -> None:
        """Report what a scan has left in the inbox. When it was stands in the next report."""
        self._scanned_at = self._clock()
        self.note(inbox=inbox)

    def progress(self) -> None:
        """Report progress and what the workers do, unless something was reported a moment ago.

        In any thread.
        """
        self._progress_at = self._clock()
        if not 0 <= self._progress_at - self._written_at < PROGRESS_S:
            with self._writing:
                self._facts["workers"] = self.workers()
                self._write()

    def _write(self) -> None:
        """Replace the file; an error is logged once, and the next change tries again."""
        with self._writing:
            self._written_at = self._clock()
            report = {
                "pid": os.getpid(),
                "started_at": self._started_at,
                "written_at": self._written_at,
                "progress_at": self._progress_at,
                "scanned_at": self._scanned_at,
                **self._facts,
                "conditions": list(self.conditions.values()),
            }
            self._replace(report)
            self.on_report(report)

    def _replace(self, report: dict[str, Any]) -> None:
        temporary = self.path.with_name(f"{self.path.name}.part")
        try:
            temporary.write_text(json.dumps(report))
            temporary.replace(self.path)
        except OSError as e:
            if not self._is_failing:
                log.warning("%s can't be written: %s", self.path, os_reason(e))
            self._is_failing = True
        else:
            self._is_failing = False


def read_health(path: Path) -> dict[str, Any] | None:
    """What an instance last reported, or None; whether it still runs is known from the lock."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None
