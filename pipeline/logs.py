"""The log: a rotating file in the state folder, and short lines on the terminal.

For systemd's journal and other collectors these lines are JSON objects: `time` (ISO 8601, UTC), `level`,
`message` and, where they are known, `track`, `stage`, `attempt` (the first is 1), `seconds` and `worker`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from rich.console import Console

LOG_BYTES, LOG_FILES = 5_000_000, 3
FACTS = ("track", "stage", "attempt", "seconds", "worker")  # of a line, where they are known

Fact = str | Callable[[], str]  # a function is called when a line is written

_KNOWN: ContextVar[Mapping[str, Fact]] = ContextVar("facts of log lines")


@contextmanager
def log_facts(**facts: Fact) -> Iterator[None]:
    """The lines logged within, in this thread, have these facts unless they bring their own; see FACTS."""
    before = _KNOWN.set({**_KNOWN.get({}), **facts})
    try:
        yield
    finally:
        _KNOWN.reset(before)


def is_journal(env: Mapping[str, str] = os.environ) -> bool:
    """Whether standard error goes to systemd's journal.

    JOURNAL_STREAM has the device and inode of the journal's socket. Programs that a service starts inherit
    the variable, so it says nothing where they write elsewhere (systemd.exec(5)).
    """
    try:
        stream = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return env.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


@contextmanager
def logging_to(path: Path, console: Console, *, as_json: bool = False) -> Iterator[None]:
    """Log everything, with tracebacks, to a file of limited size, and what people need to the terminal.

    `as_json`: the latter as JSON objects.
    """
    log, watchdog = logging.getLogger("pipeline"), logging.getLogger("watchdog")
    log.setLevel(logging.DEBUG)
    log.propagate = watchdog.propagate = False
    handler = FileHandler(
        path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    added = [(log, handler), (log, ConsoleHandler(console, as_json=as_json)), (watchdog, handler)]
    for logger, one in added:
        logger.addHandler(one)
    try:
        yield
    finally:
        for logger, one in added:
            logger.removeHandler(one)
            with suppress(OSError):
                one.close()


class FileHandler(RotatingFileHandler):
    """Rotates by size, and opens the file anew when somebody has moved or removed it."""

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802  (logging's own name)
        if self.stream is not None and not _is_at(self.baseFilename, self.stream):
            self.stream.close()
            self.stream = self._open()
        return bool(super().shouldRollover(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's own name)
        """Ignore a line that can't be written, to a full disk for example: the terminal still shows it."""


class ConsoleHandler(logging.Handler):
    """Prints through the console that draws the progress bars, so that lines and bars do not mix."""

    def __init__(self, console: Console, *, as_json: bool) -> None:
        super().__init__(logging.INFO)
        self._console = console
        form = "%(message)s" if console.is_terminal else "%(asctime)s %(levelname)s %(message)s"
        self.setFormatter(JsonFormatter() if as_json else logging.Formatter(form))

    def emit(self, record: logging.LogRecord) -> None:
        record.exc_text = None
        plain = logging.makeLogRecord({**record.__dict__, "exc_info": None})
        self._console.out(self.format(plain), highlight=False)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, see the module's description."""

    def format(self, record: logging.LogRecord) -> str:
        known = {name: fact() if callable(fact) else fact for name, fact in _KNOWN.get({}).items()}
        own = {name: getattr(record, name) for name in FACTS if hasattr(record, name)}
        if "seconds" in own:
            own["seconds"] = round(own["seconds"], 3)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            **known,
            **own,
        }
        return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace").decode()


def _is_at(path: str, file: IO[str]) -> bool:
    """Whether the open file is the one that has this path now."""
    try:
        return os.path.samestat(Path(path).stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
