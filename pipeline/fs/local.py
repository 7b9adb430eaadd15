"""Files below a folder on a disk; see `Files`."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.fs import atomic, copying
from pipeline.fs.copying import FileIdentity
from pipeline.fs.files import Entry

TMP_PREFIX, TMP_SUFFIX = ".", ".part"  # of a file that is being written and not verified yet


@dataclass(frozen=True)
class LocalFiles:
    """A folder of this machine, or one that is mounted on it."""

    root: Path

    def prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root) as probe:  # it has no name, so a kill leaves no file
            probe.write(b"x")

    def is_away(self) -> bool:
        return not self.root.is_dir()

    def find(self, path: Path) -> Entry | None:
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _entry(path, found) if stat.S_ISREG(found.st_mode) else None

    def is_link(self, path: Path) -> bool:
        return path.is_symlink()

    def entries(self, folder: Path, *, without: Collection[str] = ()) -> Iterator[Entry]:
        try:
            found = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return
        for one in found:
            if one.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    yield _entry(Path(one.path), one.stat(follow_symlinks=False))
            elif one.is_dir(follow_symlinks=False) and one.name not in without:
                yield from self.entries(Path(one.path))

    def folders(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[Path, list[Entry] | OSError]]:
        def raise_if_root(error: OSError) -> None:
            # Another folder vanished or can't be read, which must not hide the others.
            if error.filename == str(self.root) and not isinstance(error, FileNotFoundError):
                raise error

        for above, names, _ in os.walk(self.root, onerror=raise_if_root):
            names[:] = [name for name in sorted(names, key=os.fsencode) if not name.startswith(".")]
            wanted = [Path(above, name) for name in names if is_wanted(name)]
            names[:] = [name for name in names if not is_wanted(name)]
            for folder in wanted:
                if not folder.is_symlink():
                    try:
                        yield folder, list(self.entries(folder))
                    except OSError as e:
                        yield folder, e

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def sha256_of(self, path: Path) -> str:
        return copying.hash_file(path)

    def copy_in(
        self,
        path: Path,
        target: Path,
        *,
        expected: FileIdentity | None = None,
        follow: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> str | None:
        return copying.copy_in(path, target, expected=expected, follow=follow, should_stop=should_stop)

    def place(self, path: Path) -> Path:
        return path.with_name(f"{TMP_PREFIX}{path.name}{TMP_SUFFIX}")

    def write(self, path: Path, content: bytes | memoryview) -> str:
        return atomic.write_atomically(path, self.place(path), content)

    def write_over(self, path: Path, content: bytes, known: Entry | None) -> None:
        self.write(path, content)

    def note(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")

    def move(self, path: Path, target: Path) -> None:
        path.replace(target)

    def move_to_free_name(self, path: Path, target: Path, *, sha256: str) -> Path:
        return copying.move_to_free_name(path, target)

    def delete(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def flush(self, folder: Path) -> None:
        with suppress(FileNotFoundError):
            atomic.sync_folder(folder)

    def prune(self, folder: Path, top: Path) -> None:
        with suppress(OSError):  # it is not empty
            while folder != top and folder.is_relative_to(top):
                if folder.exists():
                    folder.rmdir()
                folder = folder.parent


def _entry(path: Path, found: os.stat_result) -> Entry:
    return Entry(path, FileIdentity.of(found), found.st_mtime, found.st_ctime)
