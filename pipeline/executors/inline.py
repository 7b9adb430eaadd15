"""Tasks in this process, for debugging and small tests: an engine that crashes ends the program."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.engines.base import ProgressFn, StopFn
from pipeline.engines.loading import Engines
from pipeline.executors.base import Task, Tools
from pipeline.executors.judge import Judge


@dataclass
class InlineExecutor:
    """An `Executor`: see `pipeline.executors.base`."""

    engines: Engines
    judge: Judge
    _kept: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"process {os.getpid()}"

    @property
    def loaded(self) -> Sequence[str]:
        return self.engines.loaded

    @property
    def shares_disk(self) -> bool:
        return True

    def run(self, task: Task, *args: Any, progress: ProgressFn, should_stop: StopFn) -> Iterator[Any]:
        return task(Tools(self.engines, self.judge, progress, should_stop, self._kept), *args)

    def release_if_idle(self) -> None:
        """Nothing: the memory of loaded libraries would stay with this process anyway."""

    def close(self) -> None:
        """Nothing runs beside this process."""
