"""Results that go on being made, in a thread, while the earlier ones are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from pipeline.engines.base import ProgressFn, StopFn

T_co = TypeVar("T_co", covariant=True)
STEP, RESULT, RAISED, DONE = "step", "result", "raised", "done"


class Make(Protocol[T_co]):
    """A task that is begun, see `Executor.run`."""

    def __call__(self, *, progress: ProgressFn, should_stop: StopFn) -> Iterator[T_co]: ...


@contextmanager
def made_ahead(make: Make[T_co], progress: ProgressFn, should_stop: StopFn) -> Iterator[Iterator[T_co]]:
    """The results of `make`, which are all made at once; at the end of the block it is stopped.

    `progress` is called in this thread, while it waits for a result.
    """
    made: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    is_unwanted = threading.Event()

    def work() -> None:
        try:
            for result in make(
                progress=lambda *step: made.put((STEP, step)),
                should_stop=lambda: is_unwanted.is_set() or should_stop(),
            ):
                made.put((RESULT, result))
            made.put((DONE, None))
        except BaseException as e:  # Stopped among them
            made.put((RAISED, e))

    def results() -> Iterator[T_co]:
        while True:
            kind, content = made.get()
            if kind == DONE:
                return
            if kind == RAISED:
                raise content
            if kind == STEP:
                progress(*content)
            else:
                yield content

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield results()
    finally:
        is_unwanted.set()
        thread.join()
