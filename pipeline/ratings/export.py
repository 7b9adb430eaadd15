"""Copies of the results that were kept, with names that say in a file browser what they are."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Literal

from pipeline.errors import PipelineError
from pipeline.fs.atomic import write_atomically
from pipeline.fs.copying import hash_file
from pipeline.fs.names import file_safe, track_name
from pipeline.outbox.manifest import short_key
from pipeline.outbox.outbox import Outbox
from pipeline.reproduce.recorded import Recorded, of_manifest, of_sound
from pipeline.store.schema import Rating
from pipeline.store.store import Store

MAX_STEM_BYTES = 200  # of UTF-8, so that a name with its ending fits on any file system


@dataclass(frozen=True)
class Copy:
    """What became of one kept result."""

    file: str  # its name in the folder, or that in the outbox if there is no copy
    state: Literal["copied", "there already", "missing", "in the way"]


def export_kept(store: Store, outbox: Outbox, folder: Path) -> Iterator[Copy]:
    """Copy every result that was kept and is still in the outbox; nothing in `folder` is overwritten.

    Raises:
        OSError: the folder can't be written.
    """
    takes: dict[str, dict[str, Recorded]] = {}  # of each track, by the hashes of their files
    taken: set[str] = set()
    for rating in sorted(store.ratings(), key=lambda one: (one.track, one.file, one.sha256)):
        if rating.kept:
            if rating.track not in takes:
                takes[rating.track] = _takes_of(store, outbox, rating.track)
            take = takes[rating.track].get(rating.sha256)
            content = take.read() if take else None
            if take is None or content is None or hashlib.sha256(content).hexdigest() != rating.sha256:
                yield Copy(rating.file, "missing")
            else:
                yield _copy(folder, take, content, rating, taken)


def _takes_of(store: Store, outbox: Outbox, track: str) -> dict[str, Recorded]:
    """The takes of a track that its manifest lists, or that were set aside, by the hashes of their files."""
    known = store.track(track)
    if known is None:
        return {}

    def read(folder: str, file: str) -> bytes | None:
        with suppress(OSError):
            return outbox.read(folder, file)
        return None

    takes: dict[str, Recorded] = {}
    with suppress(OSError):
        for file in outbox.files_set_aside(known.folder):
            with suppress(OSError, PipelineError):
                content = outbox.read(known.folder, file)
                found_there = of_sound(content, file)
                takes[hashlib.sha256(content).hexdigest()] = replace(
                    found_there, read=partial(read, known.folder, file)
                )
    with suppress(PipelineError):
        manifest = outbox.read_manifest(known.folder)
        found = of_manifest(manifest, lambda file: file, partial(read, known.folder))
        takes |= {one.listed: one for one in found if one.listed}
    return takes


def _copy(folder: Path, take: Recorded, content: bytes, rating: Rating, taken: set[str]) -> Copy:
    stem, ending = exported_stem(take), PurePath(take.file).suffix
    for name in (f"{stem}{ending}", f"{stem} [{rating.sha256[:8]}]{ending}"):
        path, folded = folder / name, unicodedata.normalize("NFC", name).casefold()
        is_there = path.exists()
        if folded in taken or (is_there and hash_file(path) != rating.sha256):
            continue
        taken.add(folded)
        if not is_there:
            write_atomically(path, path.with_name(f".{rating.sha256[:8]}.part"), content)
        return Copy(name, "there already" if is_there else "copied")
    return Copy(rating.file, "in the way")


def exported_stem(take: Recorded) -> str:
    """A name such as `Slow Song - 03 bold 126bpm Am`, without what is not known; valid on any system."""
    number = PurePath(take.file).name.partition("-")[0]
    tempo, key = take.facts.get("tempo_bpm"), take.facts.get("key")
    parts = [number, file_safe(take.name), f"{tempo:.0f}bpm" if tempo else "", short_key(key) if key else ""]
    stem = f"{track_name(Path(take.source_name))} - {' '.join(filter(None, parts))}"
    return stem.encode()[:MAX_STEM_BYTES].decode(errors="ignore").rstrip(" .")
