"""A clock for tests, which stands where it is set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SetClock:
    """Called for the time, in seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now
