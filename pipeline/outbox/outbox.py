"""The outbox: complete files or none.

A file is written under a temporary name in its own folder, flushed to the disk, read back and compared,
renamed, and the folder is flushed. Only then may the store record it.
`manifest.json` is written last and removed first, so a folder with a manifest is complete and every
hash in the manifest is right.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from pipeline.fs import atomic
from pipeline.fs.copying import hash_file
from pipeline.fs.names import track_name

MANIFEST = "manifest.json"
EMBEDDING = "embedding.npz"
VARIATIONS, REJECTED = "variations", "rejected"
TMP_PREFIX, TMP_SUFFIX = ".", ".part"  # of a file that is being written and not verified yet
MOVING_SUFFIX = ".move"  # of a complete, verified file that is between two names
SHORT_HASH = 8
_FOLDERS, _SOUND = f"({VARIATIONS}|{REJECTED})", r"[0-9]{2,}-.+\.(wav|flac|mp3|opus)"
_OWN = re.compile(rf"manifest\.json|embedding\.npz|{_FOLDERS}/{_SOUND}", re.DOTALL)
_TEMPORARY = re.compile(rf"(\.manifest\.json|\.embedding\.npz|{_FOLDERS}/\.{_SOUND})\.(part|move)", re.DOTALL)
_TRACK_FOLDER = re.compile(r".+--[0-9a-f]{8}", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Published:
    """A published file."""

    file: str  # its path below the track's folder
    sha256: str
    bytes: int


class Outbox:
    """The outbox. `folder` is a track's folder in it, `file` a path below that folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def folder_name(source: Path, sha256: str, *, below: PurePath | None = None) -> str:
        """The name of a track's folder, below the relative folders `below` with valid names.

        Those never look like a track's folder, so that no track's folder lies in another one's.
        """
        above = []
        for part in () if below is None else below.parts:
            safe = track_name(Path(f"{part}.x"))  # with an ending, as track_name drops one
            above.append(f"{safe}_" if _TRACK_FOLDER.fullmatch(safe) else safe)
        return "/".join([*above, f"{track_name(source)}--{sha256[:SHORT_HASH]}"])

    # -- writing ---------------------------------------------------------------------------------

    def publish(self, folder: str, file: str, content: bytes) -> Published:
        """Write a file atomically; an existing one is replaced.

        Raises:
            OSError: see `atomic.write_atomically`; then there is no new file.
        """
        path = self.root / folder / file
        sha256 = atomic.write_atomically(path, _beside(path, TMP_SUFFIX), content)
        return Published(file, sha256, len(content))

    def read(self, folder: str, file: str) -> bytes:
        """The bytes of a published file.

        Raises:
            OSError: it can't be read.
        """
        return (self.root / folder / file).read_bytes()

    def publish_manifest(self, folder: str, manifest: Mapping[str, Any]) -> None:
        """Complete a folder. A manifest that differs only in its date is kept.

        A run that was killed between the manifest and the commit leaves such a manifest, and readers
        may have seen it.
        """
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        plain = json.loads(text)
        self._flush_names(folder)
        existing = self.read_manifest(folder)
        if existing is not None and _undated(existing) == _undated(plain):
            return
        self.publish(folder, MANIFEST, text.encode())

    def set_source_names(self, folder: str, names: list[str]) -> None:
        """Write all names of a finished track's source files to its manifest."""
        manifest = self.read_manifest(folder)
        source = None if manifest is None else manifest.get("source")
        if manifest is not None and isinstance(source, dict) and source.get("names") != names:
            self.publish_manifest(folder, {**manifest, "source": {**source, "names": names}})

    def remove_manifest(self, folder: str) -> None:
        """Mark a folder as incomplete before anything in it changes."""
        path = self.root / folder / MANIFEST
        if path.exists():
            path.unlink()
            atomic.sync_folder(path.parent)

    def rename(self, folder: str, moves: Mapping[str, str]) -> None:
        """Rename files from old to new names, which may overlap.

        A kill in the middle loses nothing: `find_intact` finds a file by its content.
        """
        base = self.root / folder
        pending = {old: new for old, new in moves.items() if old != new}
        parents = {(base / new).parent for new in pending.values()}
        while pending:
            free = [old for old, new in pending.items() if new not in pending]
            if free:
                (base / free[0]).replace(base / pending.pop(free[0]))
            else:  # the renames form a cycle
                old = next(iter(pending))
                between = _beside(base / old, MOVING_SUFFIX)
                (base / old).replace(between)
                pending[str(between.relative_to(base))] = pending.pop(old)
        for parent in parents:
            atomic.sync_folder(parent)

    def _flush_names(self, folder: str) -> None:
        """Flush the folders, so that all files that a manifest will name survive a power cut."""
        base = self.root / folder
        above = [parent for parent in base.parents if parent.is_relative_to(self.root)]
        for path in (base / VARIATIONS, base / REJECTED, base, *above):
            with suppress(FileNotFoundError):
                atomic.sync_folder(path)

    def keep_only(self, folder: str, files: set[str]) -> None:
        """Remove temporary files and the variations of earlier plans that are not among `files`."""
        base = self.root / folder
        for path in [*self.own_files(folder), *self.temporary_files(folder)]:
            name = str(path.relative_to(base))
            if name not in files and name != MANIFEST:
                path.unlink()

    # -- reading ---------------------------------------------------------------------------------

    def is_intact(self, folder: str, published: Published) -> bool:
        """Whether a file is there with the bytes with which it was published."""
        try:
            path = self.root / folder / published.file
            return path.stat().st_size == published.bytes and hash_file(path) == published.sha256
        except OSError:
            return False

    def find_intact(self, folder: str, wanted: Mapping[str, Published]) -> dict[str, Published]:
        """The wanted files that are there, by the same keys, with the names that they have now.

        A run may have been killed while it renamed variations, so a file is found by its content; if
        there are several, the one under the recorded name. No file is returned for two keys.
        """
        found = {}
        names_of = self._names_by_content(folder)
        for key, published in wanted.items():
            if names := names_of.get((published.sha256, published.bytes)):
                name = published.file if published.file in names else names[0]
                names.remove(name)
                found[key] = replace(published, file=name)
        return found

    def _names_by_content(self, folder: str) -> dict[tuple[str, int], list[str]]:
        """The names of a folder's files by their SHA-256 and size."""
        base = self.root / folder
        names: dict[tuple[str, int], list[str]] = {}
        for path in sorted([*self.own_files(folder), *self.temporary_files(folder)]):
            if path.suffix != TMP_SUFFIX:  # those may not have been flushed
                with suppress(OSError):
                    content = hash_file(path), path.stat().st_size
                    names.setdefault(content, []).append(str(path.relative_to(base)))
        return names

    def read_manifest(self, folder: str) -> dict[str, Any] | None:
        """A finished track's manifest; None if there is none or it is damaged."""
        try:
            loaded: object = json.loads((self.root / folder / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        return loaded if isinstance(loaded, dict) else None

    def manifest_lists(self, folder: str, published: Sequence[Published]) -> bool:
        """Whether there is a manifest that names exactly these files with these hashes."""
        files = listed_files(self.read_manifest(folder))
        return files is not None and Counter(files) == Counter(published)

    def is_complete(self, folder: str) -> bool:
        """Whether there is a manifest, and all files that it lists have their size."""
        files = listed_files(self.read_manifest(folder))
        base = self.root / folder
        try:
            return files is not None and all((base / one.file).stat().st_size == one.bytes for one in files)
        except OSError:
            return False

    def track_folders(self) -> Iterator[str]:
        """Every folder that is named like a track's, also inside other folders; links are not followed."""

        def raise_if_root(error: OSError) -> None:
            # Another folder vanished or can't be read, which must not hide the others.
            if error.filename == str(self.root) and not isinstance(error, FileNotFoundError):
                raise error

        for above, names, _ in os.walk(self.root, onerror=raise_if_root):
            names[:] = [name for name in sorted(names, key=os.fsencode) if not name.startswith(".")]
            found = [name for name in names if _TRACK_FOLDER.fullmatch(name)]
            names[:] = [name for name in names if name not in found]
            folders = (Path(above, name) for name in found)
            yield from (str(path.relative_to(self.root)) for path in folders if not path.is_symlink())

    def own_files(self, folder: str) -> list[Path]:
        """The files in a track's folder with names that this program gives; users may add others."""
        return self._files(folder, _OWN)

    def temporary_files(self, folder: str) -> list[Path]:
        """The files in a track's folder that have a temporary name."""
        return self._files(folder, _TEMPORARY)

    def _files(self, folder: str, names: re.Pattern[str]) -> list[Path]:
        base = self.root / folder
        files = [*_files_in(base), *_files_in(base / VARIATIONS), *_files_in(base / REJECTED)]
        return [path for path in files if names.fullmatch(str(path.relative_to(base)))]


def files_of(record: Mapping[str, Any]) -> list[Published]:
    """The file of a recorded result, and those of its takes that are published as rejected.

    Raises:
        KeyError: it is no such record.
    """
    takes = [take for take in record.get("takes", ()) if "sha256" in take]
    return [Published(one["file"], one["sha256"], one["bytes"]) for one in (record, *takes)]


def listed_files(manifest: Any) -> list[Published] | None:
    """The files that a manifest names; None if it is none, or not a valid one."""
    try:
        entries = [manifest["embedding"], *manifest["variations"]]
        found = list(dict.fromkeys(one for entry in entries for one in files_of(entry)))
    except (AttributeError, KeyError, TypeError):
        return None
    valid = all(
        isinstance(one.file, str) and isinstance(one.sha256, str) and isinstance(one.bytes, int)
        for one in found
    )
    return found if valid else None


def _undated(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key != "created_at"}


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{TMP_PREFIX}{path.name}{suffix}")


def _files_in(folder: Path) -> list[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(entry.path) for entry in entries if entry.is_file(follow_symlinks=False)]
