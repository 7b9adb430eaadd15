"""Publication: whole files or none.

A file is written under a temporary name in its own folder, flushed to the disk, renamed, and the
folder flushed; only then may the store call it done. `manifest.json` is written last and removed
first, so a folder with a manifest is complete and every hash in it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.names import track_name

MANIFEST = "manifest.json"
EMBEDDING = "embedding.npz"
TMP_PREFIX, TMP_SUFFIX = ".", ".part"
SHORT_HASH = 8
_NUMBERED = re.compile(r"[0-9]{2,}-.+\.wav", re.DOTALL)


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
    def folder_name(source: Path, sha256: str) -> str:
        return f"{track_name(source)}--{sha256[:SHORT_HASH]}"

    def publish(self, folder: str, file: str, write: Callable[[BinaryIO], object]) -> Published:
        """Write a file whole, replacing what was there.

        Raises:
            OSError: it couldn't be written; nothing of it is left.
        """
        path = self.root / folder / file
        made = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in made:
            _sync_folder(parent.parent)
        temporary = path.with_name(f"{TMP_PREFIX}{path.name}{TMP_SUFFIX}")
        try:
            with temporary.open("w+b") as out:
                write(out)
                out.flush()
                os.fsync(out.fileno())
                out.seek(0)
                sha256 = hashlib.file_digest(out, "sha256").hexdigest()
                size = out.tell()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
        return Published(file, sha256, size)

    def holds(self, folder: str, published: Published) -> bool:
        """Whether a published file is still there with the bytes it was published with."""
        path = self.root / folder / published.file
        try:
            if path.stat().st_size != published.bytes:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == published.sha256
        except OSError:
            return False

    def publish_manifest(self, folder: str, manifest: Mapping[str, Any]) -> None:
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.publish(folder, MANIFEST, lambda out: out.write(text.encode()))

    def manifest(self, folder: str) -> dict[str, Any] | None:
        """A finished track's manifest; None if there is none, or one that is no JSON any more."""
        try:
            loaded: object = json.loads((self.root / folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return loaded if isinstance(loaded, dict) else None

    def add_names(self, folder: str, names: list[str]) -> None:
        """Note in a finished track's manifest under which other names its bytes have come."""
        manifest = self.manifest(folder)
        if manifest is not None and manifest["source"]["names"] != names:
            source = {**manifest["source"], "names": names}
            self.publish_manifest(folder, {**manifest, "source": source})

    def open_for_work(self, folder: str) -> None:
        """Take the manifest away: until there is a new one, the folder is not complete."""
        path = self.root / folder / MANIFEST
        if path.exists():
            path.unlink()
            _sync_folder(path.parent)

    def rename(self, folder: str, moves: Mapping[str, str]) -> None:
        """Give files new names, also where they trade names; `moves` is from old to new."""
        base = self.root / folder
        moves = {old: new for old, new in moves.items() if old != new}
        waiting = {
            new: (base / new).with_name(f"{TMP_PREFIX}{Path(new).name}{TMP_SUFFIX}") for new in moves.values()
        }
        for old, new in moves.items():
            (base / old).replace(waiting[new])
        for new, temporary in waiting.items():
            temporary.replace(base / new)
        for parent in {(base / new).parent for new in moves.values()}:
            _sync_folder(parent)

    def keep_only(self, folder: str, files: set[str]) -> None:
        """Remove what earlier runs left beside `files`: variations nobody asks for now, temporary files."""
        base = self.root / folder
        for path in sorted(base.rglob("*")):
            if path.is_file() and str(path.relative_to(base)) not in files and _is_ours(path, base):
                path.unlink()


def _is_ours(path: Path, base: Path) -> bool:
    """Only names this program gives: a person may keep notes in the folder."""
    temporary = path.name.startswith(TMP_PREFIX) and path.name.endswith(TMP_SUFFIX)
    numbered = path.parent == base / "variations" and _NUMBERED.fullmatch(path.name) is not None
    return temporary or numbered or path.relative_to(base) == Path(EMBEDDING)


def _sync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
