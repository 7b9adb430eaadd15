"""Memory that outlives its process: files of a file system that is itself in memory, mapped.

A killed run's tokens are on the disk. To go on from them the model needs the keys and values of all
of them, and to calculate those again takes a third of the time that making the tokens took. So they
are kept in files below /dev/shm (tmpfs): the pages are the system's, and a kill leaves them as they
are. The next run maps them again. An orderly end, that of an error or a stop as well, removes the
files: memory isn't held for nobody. A stop that doesn't come to its next step in time is no orderly end.

What the files hold is written in them as well, see `keys_values.Held`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import stat
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen import memory_budget

log = logging.getLogger("pipeline")

ROOT = Path("/dev/shm")
MOUNTS = Path("/proc/mounts")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
FACTS = "facts.json"
SHARE_OF_FREE = 1 / 3  # of the system's memory: more isn't put where a kill would leave it taken
LOCK_TRIES, LOCK_PAUSE_S = 5, 0.05
FORGOTTEN_S = 86400.0  # what a killed run of another home left is removed after so long


class Pages:
    """Memory that is the system's until it is written to; of the process, or of a file."""

    def __init__(self, n_bytes: int, file: int | None = None) -> None:
        """`file`: a descriptor, closed with the last use of the memory; the file is made long enough."""
        self.n_bytes, self._file = n_bytes, file
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if file is not None:
            weakref.finalize(self, os.close, file)
            flags = mmap.MAP_SHARED
            if os.fstat(file).st_size < n_bytes:
                os.ftruncate(file, n_bytes)
        self._memory = mmap.mmap(-1 if file is None else file, max(n_bytes, 1), flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system that has none
                self._memory.madvise(mmap.MADV_HUGEPAGE)

    def array(self, kind: type) -> NDArray[Any]:
        return np.frombuffer(self._memory, np.uint8, self.n_bytes).view(kind)

    def reserve(self, first: int, last: int) -> None:
        """See that bytes `first` to `last` of a file can be written: without room, writing would be a SIGBUS.

        Raises:
            MemoryError: there is no room.
        """
        if self._file is not None and last > first:
            try:
                os.posix_fallocate(self._file, first, last - first)
            except OSError as error:
                raise MemoryError(f"{ROOT} has no room for keys and values: {error.strerror}") from error

    def release(self, first: int, last: int) -> None:
        """Give back bytes `first` to `last`, as far as they are whole pages."""
        first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        how = getattr(mmap, "MADV_DONTNEED" if self._file is None else "MADV_REMOVE", None)
        if last > first and how is not None:
            with suppress(OSError):  # a system that can't
                self._memory.madvise(how, first, last - first)


@dataclass(frozen=True)
class Sizes:
    """Of a memory; steps in whole units."""

    rows: int
    steps: int
    prefixes: int
    prefix_steps: int


@dataclass(frozen=True)
class Files:
    """One batch's memory in files: each slot's bytes stand together, so that files can grow."""

    folder: Path
    facts: Mapping[str, Any]  # what keys and values depend on, JSON values
    _mapped: dict[str, list[int]] = field(default_factory=dict, compare=False)  # inode and bytes by name

    def fit(self, wanted: Sizes) -> Sizes:
        """The sizes to use, so that what a killed run left can be used: as many slots as either has.

        What can't be used, because it isn't whole, is of other facts or has slots of another length, is
        removed.
        """
        left = self._left()
        if left is None or (left.steps, left.prefix_steps) != (wanted.steps, wanted.prefix_steps):
            _empty(self.folder)
            return wanted
        return replace(wanted, rows=max(left.rows, wanted.rows), prefixes=max(left.prefixes, wanted.prefixes))

    def pages(self, name: str, n_bytes: int) -> Pages:
        """What is in the file of that name, and zeros after it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        if n_bytes == 0:  # an empty file can't be mapped
            return Pages(0)
        file = os.open(self.folder / name, flags, 0o600)
        self._mapped[name] = [os.fstat(file).st_ino, n_bytes]
        return Pages(n_bytes, file)

    def describe(self, sizes: Sizes) -> None:
        """Write down what is there, once all files are: from now on they can be taken over."""
        temporary = self.folder / f"{FACTS}.tmp"
        told = {"facts": self.facts, "sizes": asdict(sizes), "files": self._mapped}
        temporary.write_text(json.dumps(told))
        temporary.replace(self.folder / FACTS)

    def give_up(self, error: Exception) -> None:
        """They can't be used."""
        log.warning(
            "musicgen: %s can't be used (%s): keys and values won't outlive a kill", self.folder, error
        )
        with suppress(OSError):  # it may be what is wrong
            _empty(self.folder)

    def _left(self) -> Sizes | None:
        """The sizes of what a killed run left, if it is whole and of the same facts."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            told = json.loads((self.folder / FACTS).read_bytes())
            if told["facts"] == json.loads(json.dumps(self.facts)):
                for name, (inode, n_bytes) in told["files"].items():
                    found = (self.folder / name).stat()
                    if found.st_ino != inode or found.st_size < n_bytes:
                        return None
                return Sizes(**told["sizes"])
        return None


@dataclass(frozen=True)
class Shelf:
    """Where one home's keys and values outlive a kill, if they do."""

    folder: Path | None  # below `ROOT`; None: they are the process's own
    mode: str = "auto"  # "auto": where they take less than a third of what is free; "shm": always
    _told: list[str] = field(default_factory=list, compare=False)

    @property
    def held_bytes(self) -> int:
        """What a killed run left behind."""
        return 0 if self.folder is None else _bytes_in(self.folder)

    @contextmanager
    def open(self, facts: Mapping[str, Any], n_bytes: int) -> Iterator[Files | None]:
        """Files for a memory of so many bytes, removed at the end; None: the process's own is to be used."""
        with ExitStack() as stack:
            fits = self.folder is not None and self._begin(self.folder, n_bytes, stack)
            yield Files(self.folder, {**facts, "boot": _boot_id()}) if self.folder and fits else None

    def _begin(self, folder: Path, n_bytes: int, stack: ExitStack) -> bool:
        """Take the folder, made if need be, for this batch alone; whether it can be used."""
        try:
            _make(folder)
            stack.enter_context(_locked(folder))
            stack.callback(_remove, folder)
            _sweep(folder)
            fits = self._fits(folder, n_bytes)
            if not fits:
                _empty(folder)
        except OSError as error:
            self._tell(f"{folder} can't be used ({error})")
            return False
        return fits

    def _fits(self, folder: Path, n_bytes: int) -> bool:
        """Whether so much may be held; what is held already is part of it."""
        held, system = _bytes_in(folder), os.statvfs(folder)
        if n_bytes > held + system.f_bavail * system.f_frsize:
            self._tell(f"{ROOT} has no room for {n_bytes / 1e9:.1f} GB")
            return False
        if self.mode == "auto" and n_bytes > SHARE_OF_FREE * (held + memory_budget.available_bytes()):
            self._tell(f"{n_bytes / 1e9:.1f} GB are more than a third of the free memory")
            return False
        return True

    def _tell(self, why: str) -> None:
        """Once; it is no fault unless it was asked for."""
        if why not in self._told:
            log.log(
                logging.INFO if self.mode == "auto" else logging.WARNING,
                "musicgen: keys and values are not kept over a kill, they would be calculated again: %s",
                why,
            )
            self._told.append(why)


def shelf(state: Path | None, mode: str) -> Shelf:
    """Of the home whose engine keeps its things in `state`; mode as `generate.kv_cache`.

    Where it isn't used, what a killed run left there is removed.
    """
    if state is None:
        return Shelf(None)
    if mode == "private" or not _is_memory(ROOT):
        if mode == "shm":
            log.warning("generate.kv_cache: %s is no file system in memory here; private is used", ROOT)
        clear_up(state)
        return Shelf(None)
    return Shelf(folder_of(state), mode)


def leftovers(state: Path) -> list[Path]:
    """What a killed run of this home left in memory, unless another one has it now."""
    with suppress(OSError), _locked(folder_of(state)):
        return [folder_of(state)]
    return []


def clear_up(state: Path) -> None:
    """Remove it."""
    folder = folder_of(state)
    with suppress(OSError), _locked(folder):
        _remove(folder)


def folder_of(state: Path) -> Path:
    """One per user and home."""
    digest = hashlib.sha256(os.fsencode(state.resolve())).hexdigest()[:16]
    return ROOT / f"{_prefix()}{digest}"


def _prefix() -> str:
    return f"variations-{os.geteuid()}-"


def _is_memory(root: Path) -> bool:
    with suppress(OSError, ValueError):
        lines = (line.split() for line in MOUNTS.read_text().splitlines())
        kinds = [kind for _, where, kind, *_ in lines if where == str(root)]
        return kinds[-1:] == ["tmpfs"] and os.access(root, os.W_OK)
    return False


def _boot_id() -> str:
    with suppress(OSError):
        return BOOT_ID.read_text().strip()
    return ""


def _make(folder: Path) -> None:
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)  # whatever the umask is


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A folder that nobody else uses meanwhile.

    Raises:
        OSError: somebody does, or it isn't a folder of this user's alone, or there is none.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _is_ours(os.fstat(handle)):
            raise PermissionError("it is not this user's alone")
        _flock(handle)
        if folder.lstat().st_ino != os.fstat(handle).st_ino:
            raise FileNotFoundError("another run has just removed it")
        yield
    finally:
        os.close(handle)


def _flock(handle: int) -> None:
    """Lock, trying for a moment: `leftovers` of another process holds it for one."""
    for _ in range(LOCK_TRIES - 1):
        with suppress(BlockingIOError):
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(LOCK_PAUSE_S)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_ours(found: os.stat_result) -> bool:
    """Whether it is a folder of this user's alone: everybody can make one in `ROOT`."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _sweep(own: Path) -> None:
    """Remove what killed runs of other homes left long ago."""
    for folder in own.parent.glob(f"{_prefix()}*"):
        with suppress(OSError):
            if folder != own and time.time() - folder.lstat().st_mtime > FORGOTTEN_S:
                with _locked(folder):
                    _remove(folder)


def _remove(folder: Path) -> None:
    with suppress(OSError):
        _empty(folder)
        folder.rmdir()


def _empty(folder: Path) -> None:
    """The facts go first: without them nobody takes the rest for anything."""
    (folder / FACTS).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _bytes_in(folder: Path) -> int:
    with suppress(OSError):
        if _is_ours(folder.lstat()):
            return sum(512 * path.lstat().st_blocks for path in folder.iterdir())
    return 0
