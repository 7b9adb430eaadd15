"""The vectors of a library: one float32 matrix for each engine, model, revision and version.

A cache of what the outbox has. `<engine>-<digest>.npy` is the matrix and `.rows.npy` says what each row is
of; both are mapped into memory. The .npz of the same name says from which finished tracks they were made.
Before a search the tracks that were finished, queued again or collected since are found in the database, and
only their files are read. The .npz is removed before the others change and written after them, so that after
a kill in between they count as lost; then everything is read again. A lock keeps processes from doing this at
once.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import FolderUnusable
from pipeline.fs.arrays import map_array, read_arrays
from pipeline.fs.atomic import replacing, write_atomically
from pipeline.fs.names import printable
from pipeline.outbox.outbox import READ_AT_ONCE, VECTORS_RECORD, Outbox
from pipeline.plan import digest, engine_identity
from pipeline.records import Samples
from pipeline.search.large import index_path, open_index
from pipeline.store.store import Store

log = logging.getLogger("pipeline")

BLOCK_ROWS = 1 << 14  # copied at once
SAID_FROM = 100  # tracks to be read, about which a person who waits is told

Identity = list[str | None]  # of an engine: see `engine_identity`
Row = tuple[str, str, str]  # the track's SHA-256, the file below its folder, the variation's name
Found = list[tuple[Row, Samples]]
_TRACK = np.dtype([("sha256", "S64"), ("at", "f8")])


@dataclass(frozen=True, eq=False)
class Vectors:
    """The vectors of one engine."""

    matrix: Samples  # (n, d), float32, unit length; read-only
    # (n,), with UTF-8 in three fields: `track` is the SHA-256 of the source; `file`, below its folder in the
    # outbox, and `name` are those of a variation, and empty for the source itself.
    rows: NDArray[Any]
    index: Any = None  # of many vectors: see `large`

    @property
    def sources(self) -> NDArray[np.intp]:
        """The rows of sources."""
        return np.flatnonzero(self.rows["file"] == b"")

    def find(self, sha256: str, file: str = "") -> int | None:
        """The row of a track's source, or of one of its variations; None if there is none."""
        of_track = np.flatnonzero(self.rows["track"] == sha256.encode())
        found = of_track[self.rows["file"][of_track] == file.encode()]
        return int(found[0]) if len(found) else None

    def row(self, n: int) -> Row:
        track, file, name = (self.rows[n][field].decode() for field in ("track", "file", "name"))
        return track, file, name


@dataclass(frozen=True, eq=False)
class _Cache:
    """What the cache has."""

    vectors: Vectors
    tracks: NDArray[Any]  # (n,), those that were read: `sha256`, and when they were finished, `at`
    stamp: tuple[float, ...]  # the `Store.ended_stamp` of then; empty if some could not be read


def load_vectors(
    folder: Path,
    identity: Identity,
    store: Store,
    outbox: Outbox,
    say: Callable[[str], None] = lambda text: None,
) -> Vectors:
    """The vectors of all finished tracks by the engine of that identity.

    What can't be read is logged and left out. `say` gets a sentence before much is read.

    Raises:
        OSError, FolderUnusable: the folder or the outbox can't be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, identity)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache, stamp = _read(path), store.ended_stamp()
        if cache is None or cache.stamp != stamp:
            if outbox.files.is_away():
                raise FolderUnusable(f"the outbox {printable(outbox.root)} is missing")
            _update(
                path,
                cache or _Cache(_nothing(), np.zeros(0, _TRACK), ()),
                partial(_vectors_of, outbox, identity),
                store,
                say,
            )
            cache = _read(path)
            assert cache is not None
        vectors = cache.vectors
        return replace(vectors, index=open_index(path, vectors.matrix, say))


def _update(
    path: Path,
    cache: _Cache,
    read: Callable[[tuple[str, str]], Found | None],
    store: Store,
    say: Callable[[str], None],
) -> None:
    """Bring the cache up to date; `read`: see `_vectors_of`."""
    stamp, finished = store.ended_stamp(), store.finished()
    known = zip(cache.tracks["sha256"].astype(str).tolist(), cache.tracks["at"].tolist(), strict=True)
    tracks = {sha256: at for sha256, at in known if finished.get(sha256, ("", None))[1] == at}
    to_read = [(sha256, folder) for sha256, (folder, _) in finished.items() if sha256 not in tracks]
    keeps = np.isin(cache.vectors.rows["track"], np.array([*tracks], "S64"))
    if len(to_read) >= SAID_FROM:
        say(f"reading the vectors of {len(to_read)} tracks")
    new: Found = []
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        for (sha256, _), found in zip(to_read, pool.map(read, to_read), strict=True):
            if found is not None:
                tracks[sha256] = finished[sha256][1]
                new += found
    is_whole = len(tracks) == len(finished)  # otherwise the others are tried again
    only_adds = keeps.all() and len(keeps) > 0
    if new or not only_adds:
        path.with_suffix(".npz").unlink(missing_ok=True)
        if not only_adds:
            index_path(path).unlink(missing_ok=True)
        _write_matrix(path, cache.vectors.matrix, keeps, [vector for _, vector in new])
        _write_rows(path, np.concatenate([cache.vectors.rows[keeps], _as_rows([row for row, _ in new])]))
    _write_about(path, tracks, stamp if is_whole else ())


# -- the files of the cache ------------------------------------------------------------------------


def _path(folder: Path, identity: Identity) -> Path:
    """Of the matrix."""
    return folder / f"{identity[0]}-{digest(identity)[:12]}.npy"


def _rows_path(path: Path) -> Path:
    return path.with_suffix(".rows.npy")


def _nothing() -> Vectors:
    return Vectors(np.zeros((0, 1), np.float32), _as_rows([]))


def _read(path: Path) -> _Cache | None:
    """The cache; None if there is none or it is damaged."""
    try:
        about = io.BytesIO(path.with_suffix(".npz").read_bytes())
        loaded = read_arrays(about)
        tracks, stamp = loaded["tracks"], tuple(loaded["stamp"].tolist())
        matrix, rows = map_array(path), map_array(_rows_path(path))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return _Cache(Vectors(matrix, rows), tracks, stamp) if len(matrix) == len(rows) else None


def _write_about(path: Path, tracks: Mapping[str, float], stamp: tuple[float, ...]) -> None:
    content = io.BytesIO()
    known = np.array([*tracks.items()], _TRACK)
    np.savez(content, allow_pickle=False, tracks=known, stamp=np.array(stamp, np.float64))
    write_atomically(path.with_suffix(".npz"), path.with_suffix(".part"), content.getvalue())


def _write_rows(path: Path, rows: NDArray[Any]) -> None:
    content = io.BytesIO()
    np.save(content, rows, allow_pickle=False)
    write_atomically(_rows_path(path), path.with_suffix(".part"), content.getbuffer())


def _write_matrix(path: Path, old: Samples, keeps: NDArray[np.bool_], new: Sequence[Samples]) -> None:
    """Block by block, since it may be large."""
    shape = (int(keeps.sum()) + len(new), new[0].size if new else old.shape[1])
    temporary = path.with_suffix(".part")
    with replacing(path, temporary), temporary.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(old), BLOCK_ROWS):
            file.write(old[start : start + BLOCK_ROWS][keeps[start : start + BLOCK_ROWS]].tobytes())
        for vector in new:
            file.write(vector.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _as_rows(rows: Sequence[Row]) -> NDArray[Any]:
    names = ("track", "file", "name")
    columns = [np.array([row[n].encode() for row in rows], "S") for n in range(len(names))]
    found = np.empty(len(rows), [(name, column.dtype) for name, column in zip(names, columns, strict=True)])
    for name, column in zip(names, columns, strict=True):
        found[name] = column
    return found


# -- the files of the outbox -----------------------------------------------------------------------


def _vectors_of(outbox: Outbox, identity: Identity, track: tuple[str, str]) -> Found | None:
    """The vectors of a track, given by its hash and folder; None if they can't be read now."""
    (sha256, folder), found = track, Found()
    try:
        manifest = outbox.read_manifest(folder)
        if manifest is None:
            raise ValueError("manifest.json is missing or damaged")
        variations = [(one["file"], one["name"]) for one in manifest["variations"]]
        for record, array, names in (
            (manifest["embedding"], "track", [("", "")]),
            (manifest.get(VECTORS_RECORD), "variations", variations),
        ):
            if record is not None and _identity_of(record) == identity:
                vectors = np.atleast_2d(_array(outbox, folder, record, array))
                found += [((sha256, *name), one) for name, one in zip(names, vectors, strict=True)]
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as e:
        log.warning("%s: its vectors can't be read (`doctor` says more): %s", printable(folder), e)
        return None
    return found


def _array(outbox: Outbox, folder: str, record: Mapping[str, Any], name: str) -> Samples:
    content = outbox.read(folder, record["file"])
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"{record['file']} is altered")
    return np.asarray(read_arrays(io.BytesIO(content))[name], np.float32)


def _identity_of(record: Mapping[str, Any]) -> Identity:
    return engine_identity(record["engine"], record["version"], record["model"], record["revision"])
