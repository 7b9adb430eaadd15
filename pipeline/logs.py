"""The log: a rotating file in the state folder, and short lines on the terminal."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from rich.console import Console

LOG_BYTES, LOG_FILES = 5_000_000, 3


@contextmanager
def logging_to(path: Path, console: Console) -> Iterator[None]:
    """Log everything, with tracebacks, to a file of limited size, and what people need to the terminal."""
    log, watchdog = logging.getLogger("pipeline"), logging.getLogger("watchdog")
    log.setLevel(logging.DEBUG)
    log.propagate = watchdog.propagate = False
    handler = FileHandler(
        path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    added = [(log, handler), (log, ConsoleHandler(console)), (watchdog, handler)]
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

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console
        form = "%(message)s" if console.is_terminal else "%(asctime)s %(levelname)s %(message)s"
        self.setFormatter(logging.Formatter(form))

    def emit(self, record: logging.LogRecord) -> None:
        record.exc_text = None
        plain = logging.makeLogRecord({**record.__dict__, "exc_info": None})
        self._console.print(self.format(plain), markup=False, highlight=False, soft_wrap=True)


def _is_at(path: str, file: IO[str]) -> bool:
    """Whether the open file is the one that has this path now."""
    try:
        return os.path.samestat(Path(path).stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
