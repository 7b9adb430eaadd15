"""Tasks for tests, in a module that a worker process can import by its name."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.engines.base import check_stop
from pipeline.errors import BadAudio
from pipeline.executors.base import Tools


def echo(tools: Tools, *values: Any) -> Iterator[Any]:
    """Each value, with a step of progress before it."""
    for n, value in enumerate(values, 1):
        tools.progress("echo", n, len(values))
        yield value


def process_id(tools: Tools) -> Iterator[int]:
    yield os.getpid()


def variables(tools: Tools) -> Iterator[dict[str, str]]:
    yield dict(os.environ)


def embedder_of(tools: Tools) -> Iterator[tuple[str, int]]:
    engine = tools.engines.embedder()
    yield engine.name, id(engine)


def refuse(tools: Tools, sentence: str) -> Iterator[None]:
    yield None
    raise BadAudio(sentence)


class Unpicklable(Exception):
    """It can be pickled, but not be read again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_unpicklable(tools: Tools) -> Iterator[None]:
    raise Unpicklable(1, 2)
    yield


def wait_for_stop(tools: Tools) -> Iterator[str]:
    yield "begun"
    while True:
        check_stop(tools.should_stop)
        time.sleep(0.01)


def die(tools: Tools, number: int) -> Iterator[str]:
    yield "begun"
    os.kill(os.getpid(), number)
    time.sleep(60)


def note_its_end(tools: Tools, file: Path) -> Iterator[int]:
    try:
        yield from range(10)
    finally:
        file.write_text("ended")


def sleep(tools: Tools, file: Path) -> Iterator[None]:
    file.write_text(str(os.getpid()))
    time.sleep(60)
    yield


def say(tools: Tools, sentence: str) -> Iterator[None]:
    import logging

    logging.getLogger("pipeline").warning("%s", sentence)
    yield


def variable(tools: Tools, name: str) -> Iterator[str]:
    yield os.environ[name]


def describe(tools: Tools, *arrays: Any) -> Iterator[tuple[list[Any], str | None]]:
    for array in arrays:
        yield array.tolist(), getattr(array, "filename", None)


def leave(tools: Tools) -> Iterator[None]:
    raise SystemExit(0)
    yield


def read(tools: Tools, file: Path) -> Iterator[tuple[Path, str]]:
    yield file, file.read_text()


def blas_threads(_: Tools) -> Iterator[list[int]]:
    """The number of threads of each library of linear algebra that is loaded."""
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_info

    yield [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
