"""What a running instance reports to `status`: a small JSON file, replaced as a whole at every change.

On a full disk the file keeps its last state, and the log says so. Used from one thread.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import os_reason

log = logging.getLogger("pipeline")


class Health:
    """Keeps the file at `path` up to date. No method raises when the file can't be written."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self.conditions: dict[str, dict[str, Any]] = {}  # what is wrong now, by its short name
        self._facts: dict[str, Any] = {}
        self._is_failing = False

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
        if any(name not in self._facts or self._facts[name] != fact for name, fact in facts.items()):
            self._facts.update(facts)
            self._write()

    def _write(self) -> None:
        """Replace the file; an error is logged once, and the next change tries again."""
        report = {
            "pid": os.getpid(),
            "written_at": self._clock(),
            **self._facts,
            "conditions": list(self.conditions.values()),
        }
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
