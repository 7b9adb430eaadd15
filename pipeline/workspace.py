"""Where things lie: the working folders, and what each track needs while it is worked on."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO

from pipeline.config import Folders
from pipeline.errors import AlreadyRunning, FolderUnusable, os_reason
from pipeline.fs.disk import environment_error
from pipeline.records import Audio

ENGINES_FOLDER = "engines"  # in the state folder: what engines keep


@dataclass(frozen=True)
class InputFolder:
    """The folder that a command takes tracks from: the inbox, or the DIR of `once DIR`."""

    path: Path
    is_inbox: bool  # files are moved to the archive afterwards; those of another folder stay in place


@dataclass(frozen=True)
class Workspace:
    """The three folders, absolute."""

    home: Path
    inbox: Path
    outbox: Path
    state: Path

    @classmethod
    def of(cls, home: Path, folders: Folders) -> Workspace:
        """Resolve the configured folders in `home`.

        Raises:
            FolderUnusable: the outbox or the state lies in the inbox, where it would be taken for input.
        """
        home = home.resolve()
        inbox, outbox, state = (
            (home / Path(folder).expanduser()).resolve()
            for folder in (folders.inbox, folders.outbox, folders.state)
        )
        for name, folder in (("outbox", outbox), ("state", state)):
            if folder.is_relative_to(inbox) or inbox.is_relative_to(folder):
                raise FolderUnusable(
                    f"folders.{name} ({folder}) and folders.inbox ({inbox}) lie in one another"
                )
        return cls(home, inbox, outbox, state)

    @property
    def input_folder(self) -> InputFolder:
        """The inbox, as the folder that a command takes tracks from."""
        return InputFolder(self.inbox, is_inbox=True)

    def drop_normalized(self) -> None:
        """Remove all normalized audio, and copies that were cut off: they are made again when needed."""
        for path in [*self.state.glob("work/*/normalized*"), *self.state.glob("work/.incoming-*")]:
            path.unlink(missing_ok=True)

    @property
    def database(self) -> Path:
        return self.state / "pipeline.db"

    @property
    def log(self) -> Path:
        return self.state / "pipeline.log"

    def prepare(self) -> None:
        """Make the folders and see that they can be written.

        Raises:
            FolderUnusable: one can't.
        """
        for name, folder in (("inbox", self.inbox), ("outbox", self.outbox), ("state", self.state)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as probe:  # without a name: a kill leaves nothing
                    probe.write(b"x")
            except OSError as e:
                kind = type(environment_error(e) or FolderUnusable())
                raise kind(f"the {name} {folder} can't be used: {os_reason(e)}") from e

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only instance on this state folder, by a lock the system drops with the process.

        Raises:
            AlreadyRunning: another one is.
        """
        path = self.state / "lock"
        with path.open("a+") as file:
            if not _take(file):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise AlreadyRunning(f"another instance (process {holder}) works on {self.state}")
            with suppress(OSError):  # the number is for people; a full disk must not keep us from the lock
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            yield

    def is_locked(self) -> bool:
        """Whether an instance is at work."""
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
        """Where bytes are copied to while nobody knows their hash yet."""
        folder = self.state / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f".incoming-{os.getpid()}"

    def scratch(self, sha256: str) -> Scratch:
        return Scratch(self.state / "work" / sha256)


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _take(file: IO[str]) -> bool:
    """Lock, trying for half a second: `is_locked` of another process holds it for a moment."""
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
    """One track's folder below `state/work`: the working copy and the normalized audio."""

    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "source"

    def adopt(self, copy: Path) -> None:
        """Take a copy of the track's bytes as the working copy."""
        self.folder.mkdir(parents=True, exist_ok=True)
        copy.replace(self.source)

    def save_normalized(self, key: str, audio: Audio) -> None:
        """Keep normalized audio under its unit's key; whole or not at all."""
        import numpy as np

        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "normalized.part"
        with _removed_on_error(temporary), temporary.open("wb") as file:
            # By way of `write`: what numpy writes to a real file by itself fails without saying why.
            np.save(SimpleNamespace(write=file.write), audio.samples)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._normalized(key))

    def load_normalized(self, key: str, sample_rate: int) -> Audio | None:
        """Map it into memory, read-only; None if it isn't there."""
        import numpy as np

        try:
            samples = np.load(self._normalized(key), mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return None
        return Audio(samples, sample_rate)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _normalized(self, key: str) -> Path:
        return self.folder / f"normalized-{key[:16]}.npy"
