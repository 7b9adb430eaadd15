"""The working folders, and the files that each track needs while it is processed."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from pipeline.config import Folders
from pipeline.errors import AlreadyRunning, FolderUnusable, os_reason
from pipeline.fs.arrays import map_array, write_array
from pipeline.fs.atomic import replacing, write_atomically
from pipeline.fs.bucket import BucketFiles
from pipeline.fs.disk import environment_error
from pipeline.fs.files import Files, bucket_path, is_in_bucket
from pipeline.fs.lease import Lease
from pipeline.fs.local import LocalFiles
from pipeline.fs.names import printable
from pipeline.records import Audio

ENGINES_FOLDER = "engines"  # in the state folder: where engines store files
DONE, FAILED = "done", "failed"  # the archive's folders in the inbox, which are never scanned


def expand_user(path: str) -> str:
    """Expand a leading "~"; the name of an unknown user stays, while Path.expanduser would raise."""
    return os.path.expanduser(path)  # noqa: PTH111


@dataclass(frozen=True)
class InputFolder:
    """The folder that a command takes tracks from: the inbox, or the DIR of `once DIR`."""

    path: Path
    is_inbox: bool  # files are moved to the archive afterwards; those of another folder stay in place


@dataclass(frozen=True)
class Workspace:
    """The three working folders, as absolute paths. The inbox and the outbox may be in buckets."""

    home: Path
    inbox: Path
    outbox: Path
    state: Path

    @classmethod
    def of(cls, home: Path, folders: Folders) -> Workspace:
        """Resolve the configured folders in `home`.

        Raises:
            FolderUnusable: the outbox or the state is inside the inbox, so its files would become input.
        """
        home = Path(os.path.realpath(home))  # unlike Path.resolve, it does not raise for a loop of links
        inbox, outbox, state = (
            bucket_path(folder) or Path(os.path.realpath(home / expand_user(folder)))
            for folder in (folders.inbox, folders.outbox, folders.state)
        )
        for name, folder in (("outbox", outbox), ("state", state)):
            if folder.is_relative_to(inbox) or inbox.is_relative_to(folder):
                raise FolderUnusable(
                    f"folders.{name} ({printable(folder)}) and folders.inbox ({printable(inbox)}) lie in"
                    " one another"
                )
        return cls(home, inbox, outbox, state)

    @property
    def input_folder(self) -> InputFolder:
        """The inbox, as the folder that a command takes tracks from."""
        return InputFolder(self.inbox, is_inbox=True)

    @cached_property
    def inbox_files(self) -> Files:
        return _files(self.inbox)

    @cached_property
    def outbox_files(self) -> Files:
        return _files(self.outbox)

    def files_at(self, root: Path) -> Files:
        """The files of the inbox, or of another folder."""
        return self.inbox_files if root == self.inbox else _files(root)

    @property
    def disks(self) -> list[Path]:
        """The folders on disks of this machine that results are written to."""
        return [folder for folder in (self.outbox, self.state) if not is_in_bucket(folder)]

    def drop_normalized(self) -> None:
        """Remove all normalized audio and unfinished copies: they are made again when needed."""
        for path in [*self.state.glob("work/*/normalized*"), *self.state.glob("work/.incoming-*")]:
            path.unlink(missing_ok=True)

    @property
    def database(self) -> Path:
        return self.state / "pipeline.db"

    @property
    def unfinished_in_bucket(self) -> Path | None:
        """Where engines store unfinished work that don't reach the state folder; None without a bucket."""
        return self.outbox / f".{ENGINES_FOLDER}" if is_in_bucket(self.outbox) else None

    @property
    def vectors(self) -> Path:
        return self.state / "vectors"

    @property
    def log(self) -> Path:
        return self.state / "pipeline.log"

    def prepare(self) -> None:
        """Make the folders and check that they can be used.

        Raises:
            FolderUnusable: one of them can't be made or written.
        """
        state: Files = LocalFiles(self.state)
        for name, files in (("inbox", self.inbox_files), ("outbox", self.outbox_files), ("state", state)):
            try:
                files.prepare()
            except OSError as e:
                kind = type(environment_error(e) or FolderUnusable())
                is_file = isinstance(e, FileExistsError | NotADirectoryError)
                reason = "it is not a folder" if is_file else os_reason(e)
                raise kind(f"the {name} {files.root} (folders.{name}) can't be used: {reason}") from e

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the only instance on this state folder; the system drops it with the process.

        Raises:
            AlreadyRunning: another instance holds it.
        """
        path = self.state / "lock"
        with path.open("a+") as file:
            if not _take(file):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise AlreadyRunning(f"another instance (process {holder}) uses {self.state}")
            with suppress(OSError):  # the number is information only, so a full disk does not matter
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            yield

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Hold the leases on the buckets; for the holder of the lock.

        Raises:
            AlreadyRunning: another instance holds one.
        """
        with ExitStack() as leases:
            for files in (self.inbox_files, self.outbox_files):
                if isinstance(files, BucketFiles):
                    leases.enter_context(Lease(files, self._owner()).held())
            yield

    def _owner(self) -> str:
        """A name for this state folder, made when it is first needed; a copy of it has another one."""
        path = self.state / "owner"
        if not path.exists():
            write_atomically(path, path.with_name("owner.part"), uuid.uuid4().hex.encode())
        return f"{path.read_text()}-{path.stat().st_ino}"

    def is_locked(self) -> bool:
        """Whether an instance holds the lock."""
        try:
            with (self.state / "lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @property
    def health(self) -> Path:
        return self.state / "health.json"

    def incoming(self) -> Path:
        """The file that this thread copies a source to while its hash is still being computed."""
        folder = self.state / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f".incoming-{os.getpid()}-{threading.get_ident()}"

    def scratch(self, sha256: str) -> Scratch:
        return Scratch(self.state / "work" / sha256)


def _files(root: Path) -> Files:
    return BucketFiles(root) if is_in_bucket(root) else LocalFiles(root)


def _take(file: IO[str]) -> bool:
    """Lock, trying for half a second, since `is_locked` of another process holds the lock for a moment."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


@dataclass(frozen=True)
class Scratch:
    """One track's folder below `state/work`: the working copy, the normalized audio and undecided takes."""

    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "source"

    def adopt(self, copy: Path) -> None:
        """Make a copy of the track's bytes the working copy."""
        self.folder.mkdir(parents=True, exist_ok=True)
        copy.replace(self.source)

    def save(self, kind: str, key: str, audio: Audio) -> None:
        """Store audio under its unit's key, whole or not at all; kind: "normalized" or "take"."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{kind}.part"
        with replacing(self._path(kind, key), temporary), temporary.open("wb") as file:
            write_array(file, audio.samples)
            file.flush()
            os.fsync(file.fileno())

    def load(self, kind: str, key: str, sample_rate: int) -> Audio | None:
        """The audio of `save`, mapped into memory and read-only; None if there is none."""
        try:
            samples = map_array(self._path(kind, key))
        except FileNotFoundError:
            return None
        return Audio(samples, sample_rate)

    def remove(self, kind: str, key: str) -> None:
        self._path(kind, key).unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key[:16]}.npy"
