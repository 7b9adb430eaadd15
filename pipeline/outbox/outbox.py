"""The outbox: complete files or none.

A file is written whole, and read back before the store may record it (see `Files.write`). Where it can, a
worker does this beside the file's place, and the owner gives the file its name.
`manifest.json` is written last and removed first, so a folder with a manifest is complete and every
hash in the manifest is right.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from pipeline.fs.atomic import Written, replacing
from pipeline.fs.copying import FileChanged
from pipeline.fs.files import Entry, Files, is_in_bucket
from pipeline.fs.local import TMP_PREFIX, TMP_SUFFIX
from pipeline.fs.names import track_name

MANIFEST = "manifest.json"
EMBEDDING = "embedding.npz"  # of the source
VECTORS = "variations.npz"  # of the variations
PAGE = "index.html"  # of the gallery
VARIATIONS, REJECTED = "variations", "rejected"
KEPT = "kept"  # results of earlier plans that a person has kept; this program only adds to them
VECTORS_RECORD = "variation_embeddings"  # in the manifest, of the file VECTORS
MOVING_SUFFIX = ".move"  # of a complete, verified file that is between two names
SHORT_HASH = 8
READ_AT_ONCE = 16  # manifests
_FOLDERS, _SOUND = f"({VARIATIONS}|{REJECTED})", r"[0-9]{2,}-.+\.(wav|flac|mp3|opus)"
_FILES = r"manifest\.json|embedding\.npz|variations\.npz|index\.html"
_OWN = re.compile(rf"{_FILES}|{_FOLDERS}/{_SOUND}", re.DOTALL)
_TEMPORARY = re.compile(rf"(\.({_FILES})|({_FOLDERS}|{KEPT})/\.{_SOUND})\.(part|move)", re.DOTALL)
_TRACK_FOLDER = re.compile(r".+--[0-9a-f]{8}", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Published:
    """A published file."""

    file: str  # its path below the track's folder
    sha256: str
    bytes: int


class Outbox:
    """The outbox. `folder` is a track's folder in it, `file` a path below that folder."""

    def __init__(self, files: Files) -> None:
        self.files = files

    @property
    def root(self) -> Path:
        return self.files.root

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

    def place(self, folder: str, file: str) -> Path | None:
        """Where a worker can write what `publish` is given then; see `Files.place`."""
        return self.files.place(self.root / folder / file)

    def publish(self, folder: str, file: str, content: bytes | memoryview | Written) -> Published:
        """Write a file, whole or not at all, or rename what a worker has written at its `place`.

        A file of that name is replaced.

        Raises:
            OSError, FolderUnusable: see `Files.write`; then there is no new file.
            FileChanged: it is not whole any more, as the worker of an owner that was killed writes there too.
        """
        path = self.root / folder / file
        if not isinstance(content, Written):
            return Published(file, self.files.write(path, content), len(content))
        found = self.files.find(content.path)
        if found is None or found.size != content.bytes:
            raise FileChanged(f"{content.path} was changed before it had its name")
        with replacing(path, content.path):
            return Published(file, content.sha256, content.bytes)

    def read(self, folder: str, file: str) -> bytes:
        """The bytes of a published file.

        Raises:
            OSError: it can't be read.
        """
        return self.files.read(self.root / folder / file)

    def readable(self, folder: str, file: str) -> Path | bytes:
        """A published file for a worker: its path, or, raising as `read`, its bytes if it is in a bucket."""
        path = self.root / folder / file
        return self.read(folder, file) if is_in_bucket(path) else path

    def publish_manifest(self, folder: str, manifest: Mapping[str, Any]) -> None:
        """Complete a folder. A manifest that differs only in its date is kept.

        A run that was killed between the manifest and the commit leaves such a manifest, and readers
        may have seen it.

        Raises:
            LeaseLost: another instance has written one meanwhile.
        """
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        plain, path = json.loads(text), self.root / folder / MANIFEST
        self._flush_names(folder)
        known = self.files.find(path)
        existing = self.read_manifest(folder) if known else None
        if existing is not None and _undated(existing) == _undated(plain):
            return
        self.files.write_over(path, text.encode(), known)

    def set_source_names(self, folder: str, names: list[str]) -> None:
        """Write all names of a finished track's source files to its manifest."""
        manifest = self.read_manifest(folder)
        source = None if manifest is None else manifest.get("source")
        if manifest is not None and isinstance(source, dict) and source.get("names") != names:
            self.publish_manifest(folder, {**manifest, "source": {**source, "names": names}})

    def remove_manifest(self, folder: str) -> None:
        """Mark a folder as incomplete before anything in it changes."""
        path = self.root / folder / MANIFEST
        if self.files.find(path) is not None:
            self.files.delete(path)
            self.files.flush(path.parent)

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
                self.files.move(base / free[0], base / pending.pop(free[0]))
            else:  # the renames form a cycle
                old = next(iter(pending))
                between = (base / old).with_name(f"{TMP_PREFIX}{PurePath(old).name}{MOVING_SUFFIX}")
                self.files.move(base / old, between)
                pending[str(between.relative_to(base))] = pending.pop(old)
        for parent in parents:
            self.files.flush(parent)

    def set_aside(self, folder: str, hashes: Collection[str]) -> list[str]:
        """Copy the results with these hashes to KEPT, before others take their names; returns new copies."""
        if not hashes:
            return []
        copies = []
        for (sha256, _), (name, *_) in self._names_by_content(folder).items():
            old = PurePath(name)
            copy = f"{KEPT}/{old.stem}-{sha256[:SHORT_HASH]}{old.suffix}"
            if sha256 in hashes and self.files.find(self.root / folder / copy) is None:
                self.publish(folder, copy, self.read(folder, name))
                copies.append(copy)
        return copies

    def _flush_names(self, folder: str) -> None:
        """Flush the folders, so that all files that a manifest will name survive a power cut."""
        base = self.root / folder
        above = [parent for parent in base.parents if parent.is_relative_to(self.root)]
        for path in (base / VARIATIONS, base / REJECTED, base, *above):
            self.files.flush(path)

    def keep_only(self, folder: str, files: set[str]) -> None:
        """Remove temporary files and the variations of earlier plans that are not among `files`."""
        for name, entry in self.files_in(folder).items():
            if name not in files and name != MANIFEST:
                self.files.delete(entry.path)

    # -- reading ---------------------------------------------------------------------------------

    def is_intact(self, folder: str, published: Published) -> bool:
        """Whether a file is there with the bytes with which it was published."""
        try:
            found = self.files.find(self.root / folder / published.file)
            is_whole = found is not None and found.size == published.bytes
            return is_whole and self.files.sha256_of(self.root / folder / published.file) == published.sha256
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
        names: dict[tuple[str, int], list[str]] = {}
        for name, entry in self.files_in(folder).items():
            if not name.endswith(TMP_SUFFIX):  # those may not have been flushed
                with suppress(OSError):
                    content = self.files.sha256_of(entry.path), entry.size
                    names.setdefault(content, []).append(name)
        return names

    def read_manifest(self, folder: str) -> dict[str, Any] | None:
        """A finished track's manifest; None if there is none or it is damaged."""
        try:
            loaded: object = json.loads(self.files.read(self.root / folder / MANIFEST))
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
        try:
            found = self.files_in(folder)
            return files is not None and all(
                (entry := found.get(one.file) or self.files.find(self.root / folder / one.file)) is not None
                and entry.size == one.bytes
                for one in files
            )
        except OSError:
            return False

    def contents(self) -> Iterator[tuple[str, dict[str, Entry] | OSError]]:
        """Every folder that is named like a track's, also inside other folders, and its files.

        The files are as in `files_in`; an error instead of them says why the folder can't be read.
        """
        for path, found in self.files.folders(lambda name: _TRACK_FOLDER.fullmatch(name) is not None):
            files = found if isinstance(found, OSError) else _own(path, found)
            yield str(path.relative_to(self.root)), files

    def contents_and_manifests(
        self,
    ) -> Iterator[tuple[str, dict[str, Entry] | OSError, dict[str, Any] | None]]:
        """As `contents`, with each folder's manifest as in `read_manifest`.

        Several are read at the same time, since in a bucket each takes a round trip.
        """

        def read(
            found: tuple[str, dict[str, Entry] | OSError],
        ) -> tuple[str, dict[str, Entry] | OSError, dict[str, Any] | None]:
            folder, files = found
            try:
                has_one = not isinstance(files, OSError) and MANIFEST in files
                return folder, files, self.read_manifest(folder) if has_one else None
            except OSError as e:
                return folder, e, None

        contents = self.contents()
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            while batch := list(itertools.islice(contents, 4 * READ_AT_ONCE)):
                yield from pool.map(read, batch)

    def files_set_aside(self, folder: str) -> list[str]:
        """The files in KEPT, see `set_aside`."""
        names = (f"{KEPT}/{entry.path.name}" for entry in self.files.entries(self.root / folder / KEPT))
        return [name for name in names if not is_temporary(name)]

    def files_in(self, folder: str) -> dict[str, Entry]:
        """The files with names that this program gives, by their paths below a track's folder.

        Temporary files are among them; users may add files of other names.
        """
        return _own(self.root / folder, self.files.entries(self.root / folder))


def is_temporary(name: str) -> bool:
    """Whether a file of a track's folder has the name of one that was being written or moved."""
    return _TEMPORARY.fullmatch(name) is not None


def _own(folder: Path, entries: Iterable[Entry]) -> dict[str, Entry]:
    found = {str(entry.path.relative_to(folder)): entry for entry in entries}
    return {name: entry for name, entry in found.items() if _OWN.fullmatch(name) or is_temporary(name)}


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
        entries += [manifest[VECTORS_RECORD]] if VECTORS_RECORD in manifest else []
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
