"""From a folder to ready, hashed files. A scan is the truth; events only say when to look.

Ready means that nobody has written to a file for `settle_s`: its size, times and inode have not
changed for that long, by the file's own times (mtime and ctime, so a copy that sets mtime back
doesn't look old) or, where those lie in the future, by looking twice.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from pipeline import audio
from pipeline.errors import BadAudio
from pipeline.names import printable

log = logging.getLogger("pipeline")

DONE, FAILED = "done", "failed"  # reserved in the inbox, never scanned
READ_BYTES = 1 << 20
SNIFF_BYTES = 64
MAX_NAME_BYTES = 255  # of one file name, on the usual file systems


@dataclass(frozen=True)
class Sighting:
    """A regular file as a scan saw it."""

    path: Path
    display: str  # below the scanned folder, printable
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int
    inode: int

    @property
    def changed_s(self) -> float:
        """When it was last written to or renamed, as far as its times tell."""
        return max(self.mtime_ns, self.ctime_ns) / 1e9

    def same_as(self, other: Sighting) -> bool:
        return (self.size, self.mtime_ns, self.inode) == (other.size, other.mtime_ns, other.inode)


@dataclass
class Settling:
    """Remembers what was seen when, for files whose own times can't be trusted."""

    settle_s: float
    _seen: dict[Path, tuple[Sighting, float]] = field(default_factory=dict)

    def is_settled(self, sighting: Sighting, now: float) -> bool:
        if sighting.changed_s <= now - self.settle_s:
            self._seen.pop(sighting.path, None)
            return True
        before = self._seen.get(sighting.path)
        if before is None or not before[0].same_as(sighting):
            self._seen[sighting.path] = (sighting, now)
            return self.settle_s == 0
        return sighting.changed_s > now and now - before[1] >= self.settle_s

    def keep_only(self, paths: set[Path]) -> None:
        for gone in self._seen.keys() - paths:
            del self._seen[gone]


def scan(root: Path, *, ignore: Sequence[str], is_inbox: bool) -> Iterator[Sighting]:
    """Every regular file below `root` that may be a track, in the order of the names.

    Symbolic links, dotfiles, dot-folders and what matches `ignore` are left out; of the inbox also
    its `done` and `failed`; of any other folder what neither begins nor ends like audio.

    Raises:
        OSError: `root` itself can't be listed. Folders below it that vanish meanwhile are skipped.
    """
    reserved = {DONE, FAILED} if is_inbox else set()
    for entry in sorted(os.scandir(root), key=lambda entry: os.fsencode(entry.name)):
        if entry.name not in reserved:
            yield from _below(Path(entry.path), root, ignore, is_inbox)


def _below(path: Path, root: Path, ignore: Sequence[str], is_inbox: bool) -> Iterator[Sighting]:
    if path.name.startswith(".") or any(fnmatch(path.name.lower(), pattern.lower()) for pattern in ignore):
        return
    try:
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            for child in sorted(path.iterdir(), key=os.fsencode):
                yield from _below(child, root, ignore, is_inbox)
            return
    except FileNotFoundError:
        return
    except OSError as e:  # one closed folder must not hide the others
        reason = (e.strerror or str(e)).lower()
        log.warning("%s: can't be read: %s", printable(path.relative_to(root)), reason)
        return
    if stat.S_ISREG(found.st_mode) and (is_inbox or _may_be_audio(path)):
        display = printable(path.relative_to(root))
        yield Sighting(path, display, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _may_be_audio(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(SNIFF_BYTES)
    except OSError:
        head = b""  # its name decides; reading it will say what is wrong
    return audio.looks_like_audio(head, path.name)


def hash_file(
    path: Path, *, copy_to: Path | None = None, should_stop: Callable[[], bool] = bool
) -> str | None:
    """SHA-256 of a file's bytes, copied on the way if asked; None if it was told to stop.

    Raises:
        BadAudio: the file can't be read, which is nothing that trying again mends.
        OSError: anything else, such as a full disk.
    """
    sha = hashlib.sha256()
    try:
        source = path.open("rb")
    except (PermissionError, FileNotFoundError, IsADirectoryError) as e:
        raise BadAudio(f"can't be read: {(e.strerror or 'unreadable').lower()}") from e
    with source:
        target = copy_to.open("wb") if copy_to is not None else None
        try:
            while block := source.read(READ_BYTES):
                if should_stop():
                    return None
                sha.update(block)
                if target is not None:
                    target.write(block)
            if target is not None:
                target.flush()
                os.fsync(target.fileno())
        finally:
            if target is not None:
                target.close()
    return sha.hexdigest()


def move_aside(path: Path, target: Path) -> Path:
    """Move a file, never over another one; returns where it is now."""
    target = free_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)
    return target


def error_file(path: Path) -> Path:
    """Where it stands why a file failed: `<name>.error.txt` beside it."""
    suffix = b".error.txt"
    return path.with_name(os.fsdecode(os.fsencode(path.name)[: MAX_NAME_BYTES - len(suffix)] + suffix))


def write_error(path: Path, error: str) -> None:
    """Say beside a failed file why it failed, in one sentence."""
    error_file(path).write_text(f"{error}\n", encoding="utf-8", errors="backslashreplace")


def free_name(path: Path) -> Path:
    """`path`, or the first of `name (2).ext`, `name (3).ext`, … that nobody has."""
    candidate, n = path, 1
    while os.path.lexists(candidate):
        n += 1
        ending = os.fsencode(f" ({n}){path.suffix}")
        stem = os.fsencode(path.stem)[: MAX_NAME_BYTES - len(ending)]
        candidate = path.with_name(os.fsdecode(stem + ending))
    return candidate
