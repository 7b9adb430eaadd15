"""The worker process: runs one task after the other for the process that has started it.

It is started by `process` with a socket to the owner, and ends when the owner closes the socket or dies.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from pipeline.engines.loading import LoadedEngines
from pipeline.executors.base import Tools, portable
from pipeline.executors.judge import ScoringJudge
from pipeline.executors.process import (
    CLOSE,
    DONE,
    ENGINES,
    LOADED,
    LOG,
    NEXT,
    PROGRESS,
    RAISED,
    RUN,
    STOP,
    YIELDED,
)

log = logging.getLogger("pipeline")


@dataclass
class Worker:
    """Receives orders in a thread of its own, so that a stop is seen while a task runs."""

    owner: Connection
    _orders: queue.SimpleQueue[tuple[str, Any]] = field(default_factory=queue.SimpleQueue)
    _stop: threading.Event = field(default_factory=threading.Event)
    _sending: threading.Lock = field(default_factory=threading.Lock)
    _engines: LoadedEngines | None = None
    _kept: dict[str, Any] = field(default_factory=dict)

    def serve(self) -> None:
        """Work until the owner is gone."""
        threading.Thread(target=self._receive, daemon=True).start()
        while True:
            order, content = self._orders.get()
            if order == ENGINES:
                embedder, generator, rater = content
                tell = partial(self.send, LOADED)
                self._engines = LoadedEngines(embedder, generator, rater, on_change=tell)
            elif order == RUN:
                self._run(*content)

    def send(self, kind: str, content: Any = None) -> None:
        with self._sending:
            self.owner.send((kind, content))

    def _receive(self) -> None:
        try:
            while True:
                order, content = self.owner.recv()
                if order == STOP:
                    self._stop.set()
                    continue
                if order == RUN:
                    self._stop.clear()
                self._orders.put((order, content))
        except (EOFError, OSError):
            os._exit(0)  # at once, whatever a task does
        except BaseException:  # an order that can't be read, for which the owner would wait
            traceback.print_exc()
            os._exit(1)

    def _run(self, task: Any, arguments: tuple[Any, ...]) -> None:
        assert self._engines is not None
        tools = Tools(
            engines=self._engines,
            judge=ScoringJudge(self._engines, self._stop.is_set),
            progress=lambda *step: self.send(PROGRESS, step),
            should_stop=self._stop.is_set,
            kept=self._kept,
        )
        try:
            self._yield_all(task(tools, *arguments))
        except BaseException as e:  # Stopped among them
            self.send(RAISED, portable(e))
        else:
            self.send(DONE)

    def _yield_all(self, results: Iterator[Any]) -> None:
        """Send one result whenever the owner asks for it; another task may be run between two."""
        while True:
            order, content = self._orders.get()
            if order == RUN:
                self._run(*content)
            elif order == NEXT:
                try:
                    result = next(results)
                except StopIteration:
                    return
                self.send(YIELDED, result)
            else:
                assert order == CLOSE
                results.close()  # type: ignore[attr-defined]
                return


class _ToOwner(logging.Handler):
    """Sends log records to the owner, as the text that they stand for."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        self._worker.send(LOG, (record.levelno, record.getMessage()))


def main(socket: int) -> None:
    """Serve the owner at the other end of a socket, given by its file descriptor."""
    worker = Worker(Connection(socket))
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(_ToOwner(worker))
    worker.serve()
