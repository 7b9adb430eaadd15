"""The files below one root, which is a folder on a disk or a prefix in a bucket.

The inbox and the outbox work with either by the same few operations. Paths are absolute; those in a bucket
begin with the scheme of its URL: `s3://bucket/prefix/name` is the path `s3:/bucket/prefix/name`, which no
path on a disk can be mistaken for, and is recorded in the database like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.fs.copying import FileIdentity

SCHEMES = ("s3", "gs", "az")
_URL = re.compile(rf"({'|'.join(SCHEMES)})://([^/]+)(/.*)?", re.DOTALL)
_PATH = re.compile(rf"({'|'.join(SCHEMES)}):/(?!/)")


def bucket_path(text: str) -> Path | None:
    """The path for the URL of a bucket, with or without a prefix; None if it is no such URL."""
    match = _URL.fullmatch(text)
    return match and Path(f"{match[1]}:/{match[2]}{match[3] or ''}")


def is_in_bucket(path: Path) -> bool:
    return _PATH.match(str(path)) is not None


def with_url(text: str) -> str:
    """A path as text, as a URL if it is in a bucket."""
    return _PATH.sub(r"\1://", text, count=1)


@dataclass(frozen=True)
class Entry:
    """A file that is there."""

    path: Path
    identity: FileIdentity
    modified_s: float  # when its content was written, seconds since the epoch, by the clock of its storage
    changed_s: float  # the same, or later: when it was moved to where it is

    @property
    def size(self) -> int:
        return self.identity.size


class Files(Protocol):
    """What is done with files of the inbox and the outbox.

    Every method may raise an OSError about a single file. Whatever else is wrong with a bucket is
    FolderUnusable.
    """

    @property
    def root(self) -> Path: ...

    def prepare(self) -> None:
        """Make the root if need be, and check that it can be used."""

    def is_away(self) -> bool:
        """Whether the whole root is missing, so that nothing can be said about its files."""

    # -- reading ---------------------------------------------------------------------------------

    def find(self, path: Path) -> Entry | None:
        """The file at a path; None if there is none. Links are followed."""

    def is_link(self, path: Path) -> bool: ...

    def entries(self, folder: Path, *, without: Collection[str] = ()) -> Iterator[Entry]:
        """All files below a folder, without links and without its folders of the names `without`."""

    def folders(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[Path, list[Entry] | OSError]]:
        """The folders with a wanted name, also inside other ones, and their files, or why they can't be read.

        Folders whose name begins with a dot, and those inside a wanted one, don't count.
        """

    def read(self, path: Path) -> bytes: ...

    def sha256_of(self, path: Path) -> str:
        """SHA-256 of a file's content."""

    def copy_in(
        self,
        path: Path,
        target: Path,
        *,
        expected: FileIdentity | None = None,
        follow: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> str | None:
        """Copy a file to a path on this machine's disk; see `copying.copy_in`."""

    # -- writing ---------------------------------------------------------------------------------

    def place(self, path: Path) -> Path | None:
        """Where a worker can write a file that is moved to `path` then; None: nowhere, in a bucket."""

    def write(self, path: Path, content: bytes | memoryview) -> str:
        """Write a file, whole or not at all, and read back what was written; returns its SHA-256."""

    def write_over(self, path: Path, content: bytes, known: Entry | None) -> None:
        """Write a file only over the one that is known, or only if there is none.

        On a disk this is `write`, as only the holder of the instance lock writes.

        Raises:
            LeaseLost: another instance has written the file.
        """

    def note(self, path: Path, text: str) -> None:
        """Write a short text for people."""

    def move(self, path: Path, target: Path) -> None:
        """Move a file, over another one if there is one."""

    def move_to_free_name(self, path: Path, target: Path, *, sha256: str) -> Path:
        """Move a file of that content to `target`, or to a free name like it; returns the new path."""

    def delete(self, path: Path) -> None:
        """Remove a file, if there is one."""

    def flush(self, folder: Path) -> None:
        """See to it that the names in a folder survive a power cut."""

    def prune(self, folder: Path, top: Path) -> None:
        """Remove a folder and those above it, below `top`, as far as they are empty."""


def holds(files: Files, entry: Entry, identity: FileIdentity, sha256: str) -> bool:
    """Whether a file is the one with that identity before it was moved or copied, judged by its content.

    A copy in a bucket has another ETag if the original was uploaded in parts.
    """
    if entry.identity == identity:
        return True
    return bool(identity.etag) and entry.size == identity.size and files.sha256_of(entry.path) == sha256
