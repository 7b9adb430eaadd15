"""What a running instance says of itself to `status`: one small file, rewritten in place.

The file has a fixed size. Its blocks are taken when it is opened and kept when it is closed, so that
on file systems that overwrite in place a full disk can't stop an instance from saying that the disk
is full. (Those that copy on write, such as Btrfs, give no such promise; then it stays in memory and in
the log.) One write may be seen half done by a reader: a checksum tells, and the reader looks again.

Used from one thread.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import os_reason

log = logging.getLogger("pipeline")

SIZE_BYTES = 4096
TEXT_LIMITS = (1000, 300, 100, 30)  # characters per text: the first with which all fits
REREAD_PAUSE_S = 0.02


@dataclass(frozen=True)
class Condition:
    """Something that keeps the instance from working as it should."""

    since: float  # seconds since 1970
    text: str  # a sentence for people


class Health:
    """Keeps `path` in step with what is noted. No method raises for a disk that is full or gone."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._conditions: dict[str, Condition] = {}
        self._facts: dict[str, Any] = {}
        self._file: int | None = None
        self._is_failing = False

    @property
    def conditions(self) -> dict[str, Condition]:
        """What is wrong now, by its short name."""
        return dict(self._conditions)

    def open(self) -> None:
        """Take the file's blocks and say that this process runs. Without room it goes on in memory."""
        self._write()

    def degraded(self, what: str, text: str) -> None:
        """The condition `what` holds; `since` is when it began, `text` the newest."""
        before = self._conditions.get(what)
        if before is not None and before.text == text:
            return
        if before is None:
            log.warning("%s", text)
        self._conditions[what] = Condition(self._clock() if before is None else before.since, text)
        self._write()

    def well(self, what: str) -> None:
        """The condition `what` is over, if it held."""
        if (over := self._conditions.pop(what, None)) is not None:
            log.info("%s: well again after %.0f s", what, max(self._clock() - over.since, 0))
            self._write()

    def note(self, **facts: object) -> None:
        """Facts as JSON has them, such as `mode="polling"`. Written only when one has changed."""
        if any(name not in self._facts or self._facts[name] != fact for name, fact in facts.items()):
            self._facts.update(facts)
            self._write()

    def close(self) -> None:
        """Say that nobody runs. The file stays, with its blocks, for the next instance."""
        self._conditions.clear()
        self._facts.clear()
        self._write(is_running=False)
        self._forget_file()

    def _write(self, *, is_running: bool = True) -> None:
        """Put all of it into the file; what fails is logged once and tried again at the next change."""
        who = {"pid": os.getpid() if is_running else None, "written_at": self._clock()}
        page = _page({**who, **self._facts}, self._conditions)
        try:
            if self._file is not None and os.fstat(self._file).st_nlink == 0:
                self._forget_file()  # somebody removed it
            if self._file is None:
                self._file = _reserved(self.path, page)
            else:
                os.pwrite(self._file, page, 0)
        except OSError as e:
            if not self._is_failing:
                log.warning("%s can't be written: %s", self.path, os_reason(e))
            self._is_failing = True
        else:
            self._is_failing = False

    def _forget_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_health(path: Path) -> dict[str, Any] | None:
    """What the instance last said; None without a whole file. `pid` is None after an orderly end.

    A killed instance leaves its last words: ask for the lock whether one runs.
    """
    for attempt in range(2):
        if attempt:
            time.sleep(REREAD_PAUSE_S)
        try:
            page = path.read_bytes()[:SIZE_BYTES]
        except FileNotFoundError:
            return None
        except OSError:
            continue
        if (said := _parsed(page)) is not None:
            return said
    return None


def _reserved(path: Path, page: bytes) -> int:
    """Open the file and put `page` on the disk. Raises OSError; then no descriptor is left open."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.pwrite(file, page, 0) != SIZE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(file, SIZE_BYTES)
        os.fsync(file)
    except OSError:
        os.close(file)
        raise
    return file


def _page(facts: dict[str, Any], conditions: dict[str, Condition]) -> bytes:
    """Exactly `SIZE_BYTES` of JSON; texts are cut, then conditions and facts left out, until it fits."""
    rows = [{"what": what, "since": c.since, "text": c.text} for what, c in conditions.items()]
    for limit in TEXT_LIMITS:
        page = _sealed(_cut({**facts, "conditions": rows}, limit))
        if len(page) <= SIZE_BYTES:
            return page.ljust(SIZE_BYTES)
    bare = {"pid": facts["pid"], "written_at": facts["written_at"]}
    while True:
        page = _sealed(_cut({**bare, "conditions": rows}, TEXT_LIMITS[-1]))
        if len(page) <= SIZE_BYTES:
            return page.ljust(SIZE_BYTES)
        rows = rows[: len(rows) // 2]


def _cut(value: Any, limit: int) -> Any:
    if isinstance(value, str) and len(value) > limit:
        return value[: limit - 1] + "…"
    if isinstance(value, dict):
        return {key: _cut(item, limit) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(item, limit) for item in value]
    return value


def _sealed(said: dict[str, Any]) -> bytes:
    return json.dumps({**said, "crc32": _checksum(said)}).encode("ascii")


def _checksum(said: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(said, sort_keys=True).encode("ascii"))


def _parsed(page: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(page)
    except ValueError:
        return None
    if not isinstance(said, dict) or said.pop("crc32", None) != _checksum(said):
        return None
    return said
