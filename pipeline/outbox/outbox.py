"""Publication: whole files or none.

A file is made whole, written under a temporary name in its own folder, flushed to the disk, read
back from there and verified, renamed, and the folder flushed; only then may the store call it
done. `manifest.json` is written last and removed first, so a folder with a manifest is complete
and every hash in it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from pipeline.fs import atomic
from pipeline.fs.names import track_name
from pipeline.outbox import verify as verifiers

MANIFEST = "manifest.json"
EMBEDDING = "embedding.npz"
VARIATIONS = "variations"
TMP_PREFIX, TMP_SUFFIX = ".", ".part"  # being written: worth nothing without its rename
MOVING_SUFFIX = ".move"  # a whole, verified file that is between two names
SHORT_HASH = 8
_NUMBERED = re.compile(r"[0-9]{2,}-.+\.wav", re.DOTALL)
_TRACK_FOLDER = re.compile(r".+--[0-9a-f]{8}", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Published:
    """A file that is on the disk."""

    file: str  # below the track's folder
    sha256: str
    bytes: int


class Outbox:
    """The outbox folder; every path given to it is below a track's own folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def folder_name(source: Path, sha256: str, *, below: PurePath | None = None) -> str:
        """The track's folder; `below`: relative folders that it lies in, made fit for any file system.

        What lies above a track's folder never looks like one, so no track's folder is in another's.
        """
        above = []
        for part in () if below is None else below.parts:
            safe = track_name(Path(f"{part}.x"))  # it drops an ending, which a folder's name hasn't
            above.append(f"{safe}_" if _TRACK_FOLDER.fullmatch(safe) else safe)
        return "/".join([*above, f"{track_name(source)}--{sha256[:SHORT_HASH]}"])

    # -- writing ---------------------------------------------------------------------------------

    def publish(
        self,
        folder: str,
        file: str,
        write: Callable[[BinaryIO], object],
        *,
        verify: Callable[[BinaryIO], None],
    ) -> Published:
        """Write a file whole, replacing what was there.

        `write` makes the content in memory; `verify` is given what came back from the disk.

        Raises:
            OSError: it couldn't be written, or the disk returned other bytes than were written (EIO).
            Exception: what `write` or `verify` raised. Nothing of it is left, whatever it was.
        """
        path = self.root / folder / file
        sha256, size = atomic.write_whole(path, _beside(path, TMP_SUFFIX), write, verify=verify)
        return Published(file, sha256, size)

    def publish_manifest(self, folder: str, manifest: Mapping[str, Any]) -> None:
        """Complete a folder. A manifest that says the same already, but for its date, is kept.

        A run that was killed between the manifest and the commit leaves such a one, and readers may
        have seen it.
        """
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        plain = json.loads(text)
        self._flush_names(folder)
        there = self.manifest(folder)
        if there is not None and _undated(there) == _undated(plain):
            return
        self.publish(
            folder,
            MANIFEST,
            lambda out: out.write(text.encode()),
            verify=verifiers.manifest(plain),
        )

    def add_names(self, folder: str, names: list[str]) -> None:
        """Note in a finished track's manifest under which other names its bytes have come."""
        manifest = self.manifest(folder)
        source = None if manifest is None else manifest.get("source")
        if manifest is not None and isinstance(source, dict) and source.get("names") != names:
            self.publish_manifest(folder, {**manifest, "source": {**source, "names": names}})

    def open_for_work(self, folder: str) -> None:
        """Take the manifest away: until there is a new one, the folder is not complete."""
        path = self.root / folder / MANIFEST
        if path.exists():
            path.unlink()
            atomic.sync_folder(path.parent)

    def rename(self, folder: str, moves: Mapping[str, str]) -> None:
        """Give files new names, also where they trade names; `moves` is from old to new.

        A kill in the middle loses nothing: `held` finds a file by its content under any of its names.
        """
        base = self.root / folder
        pending = {old: new for old, new in moves.items() if old != new}
        parents = {(base / new).parent for new in pending.values()}
        while pending:
            free = [old for old, new in pending.items() if new not in pending]
            if free:
                (base / free[0]).replace(base / pending.pop(free[0]))
            else:  # they go round in a circle
                old = next(iter(pending))
                between = _beside(base / old, MOVING_SUFFIX)
                (base / old).replace(between)
                pending[str(between.relative_to(base))] = pending.pop(old)
        for parent in parents:
            atomic.sync_folder(parent)

    def _flush_names(self, folder: str) -> None:
        """What a manifest says must hold after a power cut, even where a kill came before the flush."""
        base = self.root / folder
        above = [parent for parent in base.parents if parent.is_relative_to(self.root)]
        for path in (base / VARIATIONS, base, *above):
            with suppress(FileNotFoundError):
                atomic.sync_folder(path)

    def keep_only(self, folder: str, files: set[str]) -> None:
        """Remove what earlier runs left beside `files`: variations nobody asks for now, temporary files."""
        base = self.root / folder
        for path in [*self.results(folder), *self.leftovers(folder)]:
            name = str(path.relative_to(base))
            if name not in files and name != MANIFEST:
                path.unlink()

    # -- reading ---------------------------------------------------------------------------------

    def holds(self, folder: str, published: Published) -> bool:
        """Whether a published file is still there with the bytes it was published with."""
        return _is(self.root / folder / published.file, published)

    def held(self, folder: str, wanted: Mapping[str, Published]) -> dict[str, Published]:
        """Which of the wanted files are there, by the same keys and with the names they have now.

        A variation that isn't under its recorded name is looked for by its content among the others,
        since a run may have been killed while it gave them new names. No file is given to two keys.
        """
        found: dict[str, Published] = {}
        for key, published in wanted.items():
            taken = {one.file for one in found.values()}
            if published.file not in taken and self.holds(folder, published):
                found[key] = published
        lost = {key: published for key, published in wanted.items() if key not in found}
        base = self.root / folder
        others = [*self.results(folder), *self.leftovers(folder, (MOVING_SUFFIX,))] if lost else []
        names = {str(path.relative_to(base)) for path in others if path.parent != base}
        for key, published in lost.items():
            taken = {one.file for one in found.values()}
            for name in sorted(names - taken):
                if self.holds(folder, replace(published, file=name)):
                    found[key] = replace(published, file=name)
                    break
        return {key: found[key] for key in wanted if key in found}

    def manifest(self, folder: str) -> dict[str, Any] | None:
        """A finished track's manifest; None if there is none, or one that is no JSON any more."""
        try:
            loaded: object = json.loads((self.root / folder / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        return loaded if isinstance(loaded, dict) else None

    def manifest_lists(self, folder: str, published: Sequence[Published]) -> bool:
        """Whether there is a manifest that names exactly these files with these hashes."""
        manifest = self.manifest(folder)
        there = None if manifest is None else listed(manifest)
        return there is not None and sorted(there, key=_by_name) == sorted(published, key=_by_name)

    def is_whole(self, folder: str) -> bool:
        """Whether there is a manifest, and all files it lists have the size they should."""
        manifest = self.manifest(folder)
        there = None if manifest is None else listed(manifest)
        return there is not None and all(_size(self.root / folder / one.file) == one.bytes for one in there)

    def folders(self) -> Iterator[str]:
        """Every folder that is named like a track's, in albums too; links are not followed."""
        yield from _track_folders(self.root, "")

    def results(self, folder: str) -> list[Path]:
        """The files below a track's folder that have this program's names: a person may keep notes there."""
        base = self.root / folder
        own = [path for path in _files_in(base) if path.name in (MANIFEST, EMBEDDING)]
        return own + [path for path in _files_in(base / VARIATIONS) if _NUMBERED.fullmatch(path.name)]

    def leftovers(self, folder: str, suffixes: tuple[str, ...] = (TMP_SUFFIX, MOVING_SUFFIX)) -> list[Path]:
        """Files below a track's folder under this program's temporary names."""
        base = self.root / folder
        own = [path for path in _files_in(base) if _meant(path, suffixes) in (MANIFEST, EMBEDDING)]
        in_variations = _files_in(base / VARIATIONS)
        return own + [path for path in in_variations if _NUMBERED.fullmatch(_meant(path, suffixes))]


def listed(manifest: Mapping[str, Any]) -> list[Published] | None:
    """The files a manifest names; None if it isn't a manifest as this program writes them."""
    try:
        entries = [manifest["embedding"], *manifest["variations"]]
        found = [Published(entry["file"], entry["sha256"], entry["bytes"]) for entry in entries]
    except (KeyError, TypeError):
        return None
    sound = all(
        isinstance(one.file, str) and isinstance(one.sha256, str) and isinstance(one.bytes, int)
        for one in found
    )
    return found if sound else None


def _by_name(published: Published) -> str:
    return published.file


def _undated(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key != "created_at"}


def _is(path: Path, published: Published) -> bool:
    try:
        if path.stat().st_size != published.bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == published.sha256
    except OSError:
        return False


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{TMP_PREFIX}{path.name}{suffix}")


def _meant(path: Path, suffixes: tuple[str, ...]) -> str:
    """The name that a file with a temporary one was to get; empty for any other file."""
    name = path.name
    if not name.startswith(TMP_PREFIX) or not name.endswith(suffixes):
        return ""
    return name[len(TMP_PREFIX) : name.rindex(".")]


def _files_in(folder: Path) -> list[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [Path(entry.path) for entry in entries if entry.is_file(follow_symlinks=False)]


def _track_folders(folder: Path, prefix: str) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as e:
        if not prefix and not isinstance(e, FileNotFoundError):
            raise
        return  # gone meanwhile, or a closed folder of somebody's: it must not hide the others
    for entry in entries:
        if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue
        if _TRACK_FOLDER.fullmatch(entry.name):
            yield prefix + entry.name
        else:
            yield from _track_folders(Path(entry.path), f"{prefix}{entry.name}/")
