"""Writes the gallery: a page in each track's folder of the outbox, and index.html and tracks.js above them.

A page holds all that it needs but the sounds, so that a folder can be given away alone. tracks.js has what
the index and the pages know of all tracks; browsers load it from a disk, where they don't load other data.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from pipeline.errors import FolderUnusable
from pipeline.fs.files import is_in_bucket, with_url
from pipeline.gallery.map import places
from pipeline.gallery.page import best_first, index_page, pictures_of, take_files, track_page
from pipeline.gallery.pictures import Picture
from pipeline.intake.archive import path_in_inbox
from pipeline.outbox.outbox import PAGE, Outbox
from pipeline.search.vectors import Vectors
from pipeline.store.schema import SourceFile, Track, TrackState
from pipeline.store.store import Store
from pipeline.workspace import DONE

log = logging.getLogger("pipeline")

INDEX, TRACKS = "index.html", "tracks.js"
MOST_TRACKS = 2000  # in the index: the newest ones
PAUSE_SHARE = 20  # the list is written at most for one part in so many of the time
OPENING, CLOSING = "const TRACKS = ", ";\n"
DAMAGES = (AttributeError, LookupError, TypeError, ValueError)  # what a damaged manifest or list leads to

Row = dict[str, Any]  # a track in the list
Point = list[Any]  # on the map: x, y, name, URL, whether it is a source
# Gives the pictures of files or of their bytes; none at all if one can't be decoded.
Draw = Callable[[Path | None, list[Path | bytes]], list[Picture]]


@dataclass
class Gallery:
    """The pages of one outbox. Only the holder of the instance lock writes them."""

    store: Store
    outbox: Outbox
    program: Sequence[str]  # the words of a command line before the verb
    vectors: Callable[[], Vectors]  # of all sources and variations, for the map
    clock: Callable[[], float] = time.monotonic
    _rows: dict[str, Row] | None = None  # by hash; None: not read yet
    _stamp: tuple[float, ...] = ()  # the `Store.ended_stamp` of the list
    _written: dict[str, bytes] = field(default_factory=dict)  # what is known to be published above the pages
    _next_at: float = -float("inf")  # when the list may be written again
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, track: Track, manifest: Mapping[str, Any], source: Path | None, draw: Draw) -> None:
        """Write the page of a track.

        Args:
            source: the source file if it is at hand; without it there are no pictures of it, unless the
                page that is there has them.
            draw: makes the missing pictures.
        """
        folder = self.outbox.root / track.folder
        urls = list(dict.fromkeys(source_urls(self.store.files_of(track.sha256), folder)))
        pictures = self._pictures(track, manifest, source, draw)
        top = "../" * len(Path(track.folder).parts)
        page = track_page(
            manifest,
            pictures,
            sources=urls,
            remake=[*self.program, "reproduce", with_url(str(folder))],
            top=top,
        )
        self.outbox.files.write(folder / PAGE, page.encode())

    def refresh(self, *, force: bool = False) -> None:
        """Bring the list of tracks up to date, if it isn't.

        Without `force`, nothing is done where it would take more than a small share of the time.
        """
        with self._lock:
            began = self.clock()
            if not force and began < self._next_at:
                return
            stamp = self.store.ended_stamp()
            if stamp == self._stamp:
                return
            self._write_list()
            self._stamp = stamp
            self._next_at = self.clock() + PAUSE_SHARE * (self.clock() - began)

    def write_all(self, draw: Draw) -> Iterator[tuple[Track, bool]]:
        """Write all pages and the list anew; yields each finished track, and whether it has a page."""
        self._written, self._rows, self._stamp = {}, {}, ()
        for track in self.store.tracks(TrackState.DONE):
            manifest = None if track.collected_at is not None else self.outbox.read_manifest(track.folder)
            if manifest is not None:
                here = [file.current_path for file in self.store.files_of(track.sha256)]
                try:
                    self.add(track, manifest, next(filter(os.path.isfile, here), None), draw)
                except DAMAGES as e:
                    log.warning("%s has no page: its manifest is damaged: %r", track.name, e)
                    manifest = None
            yield track, manifest is not None
        self.refresh(force=True)

    # -- pages -----------------------------------------------------------------------------------

    def _pictures(
        self, track: Track, manifest: Mapping[str, Any], source: Path | None, draw: Draw
    ) -> dict[str, Picture]:
        """The pictures of all sounds of a track; those in an earlier page are taken over."""
        files = self.outbox.files
        page = self.outbox.root / track.folder / PAGE
        known = pictures_of(files.read(page).decode(errors="replace")) if files.find(page) else {}
        missing = dict[str, Path | bytes]()
        for file, sha256 in take_files(manifest):
            path = self.outbox.root / track.folder / file
            if sha256 not in known and files.find(path):  # people delete what they don't like
                missing[sha256] = self.outbox.readable(track.folder, file)
        new = None if track.sha256 in known else source
        if (new or missing) and (drawn := draw(new, list(missing.values()))):
            known |= zip([*([track.sha256] if new else []), *missing], drawn, strict=True)
        wanted = [track.sha256, *(sha256 for _, sha256 in take_files(manifest))]
        return {sha256: known[sha256] for sha256 in wanted if sha256 in known}

    # -- the list --------------------------------------------------------------------------------

    def _write_list(self) -> None:
        if self._rows is None:
            self._rows = {row["sha256"]: row for row in self._published_rows()}
        done = (
            one for one in self.store.tracks(TrackState.DONE, limit=MOST_TRACKS) if one.collected_at is None
        )
        failed = self.store.tracks(TrackState.FAILED, limit=MOST_TRACKS)
        tracks = sorted([*done, *failed], key=lambda one: -(one.finished_at or 0.0))[:MOST_TRACKS]
        known = self._rows
        self._rows = {one.sha256: known.get(one.sha256, {}) for one in tracks}
        for one in tracks:
            if self._rows[one.sha256].get("finished_at") != one.finished_at:
                self._rows[one.sha256] = self._row(one)
        counts = self.store.counts()
        older = max(counts[TrackState.DONE] + counts[TrackState.FAILED] - MOST_TRACKS, 0)
        content = {"rows": list(self._rows.values()), "points": self._points(self._rows), "older": older}
        text = OPENING + json.dumps(content, separators=(",", ":"), ensure_ascii=False) + CLOSING
        self._publish(TRACKS, text.encode())
        self._publish(INDEX, index_page().encode())

    def _points(self, rows: Mapping[str, Row]) -> list[Point]:
        """The places of the listed tracks' sources and takes on the map; none if vectors can't be read."""
        try:
            vectors = self.vectors()
        except (OSError, FolderUnusable) as e:
            log.warning("the gallery has no map: %s", e)
            return []
        listed = np.array([*rows], "S64")
        known = np.flatnonzero(np.isin(vectors.rows["track"], listed)).tolist()
        found: list[Point] = []
        for n, (x, y) in zip(known, places(vectors.matrix[known]).tolist(), strict=True):
            sha256, file, name = vectors.row(n)
            row = rows[sha256]
            what = f"{row['name']}: {name}" if file else row["name"]
            url = f"{row['folder']}/{quote(file)}" if file else row["source"]
            found.append([round(x, 1), round(y, 1), what, url, not file])
        return found

    def _publish(self, name: str, content: bytes) -> None:
        path, files = self.outbox.root / name, self.outbox.files
        if name not in self._written and files.find(path):
            self._written[name] = files.read(path)
        if self._written.get(name) != content:
            files.write(path, content)
            self._written[name] = content

    def _published_rows(self) -> list[Row]:
        """The rows of the list that is there; none if there is no list, or another version's."""
        path = self.outbox.root / TRACKS
        if self.outbox.files.find(path) is None:
            return []
        text = self.outbox.files.read(path).decode(errors="replace")
        try:
            rows: list[Row] = json.loads(text.removeprefix(OPENING).removesuffix(CLOSING))["rows"]
            return [row for row in rows if row.keys() == self._empty_row().keys()]
        except DAMAGES:
            return []

    @staticmethod
    def _empty_row() -> Row:
        names = ("sha256", "name", "state", "error", "finished_at", "made_at", "folder", "page", "source")
        return dict.fromkeys((*names, "best", "score", "tempo_bpm", "key", "engine", "takes"))

    def _row(self, track: Track) -> Row:
        row = self._empty_row() | {
            "sha256": track.sha256,
            "name": track.name,
            "state": track.state,
            "error": track.error,
            "finished_at": track.finished_at,
            "made_at": None if track.finished_at is None else round(1000 * track.finished_at),
        }
        manifest = self.outbox.read_manifest(track.folder) if track.state == TrackState.DONE else None
        try:
            return row | (self._results(track, manifest) if manifest and manifest["variations"] else {})
        except DAMAGES as e:
            log.warning("%s: its manifest is damaged: %r", track.name, e)
            return row

    def _results(self, track: Track, manifest: Mapping[str, Any]) -> Row:
        """What a finished track's row says of its results."""
        best = best_first(manifest["variations"])[0]
        has_page = self.outbox.files.find(self.outbox.root / track.folder / PAGE) is not None
        folder = quote(track.folder)
        return {
            "folder": folder,
            "page": f"{folder}/{PAGE}" if has_page else None,
            "source": self._source_url(track),
            "best": f"{folder}/{quote(best['file'])}",
            "score": best["scores"].get("rank"),
            "tempo_bpm": best["tempo_bpm"],
            "key": best["key"],
            "engine": best["engine"],
            "takes": len(manifest["variations"]),
        }

    def _source_url(self, track: Track) -> str | None:
        """Where the source is now, relative to the list; None if it isn't on a disk like the list."""
        root = self.outbox.root
        for file in self.store.files_of(track.sha256):
            if not is_in_bucket(root) and file.current_path.is_file():
                return _url_from(root, file.current_path)
        return None


def source_urls(files: Iterable[SourceFile], page_folder: Path) -> Iterator[str]:
    """Where a track's source is or will be once it is archived, as URLs relative to a page."""
    for file in islice(files, 3):
        for path in (file.root / DONE / path_in_inbox(file), file.path, file.current_path):
            if is_in_bucket(path) == is_in_bucket(page_folder):
                yield _url_from(page_folder, path)


def _url_from(folder: Path, path: Path) -> str:
    """The URL of a file, whose name may be any bytes, relative to a folder."""
    return quote(os.fsencode(os.path.relpath(path, folder)))
