"""The record of everything: tracks, the files they came as, units of work, attempts. SQLite, WAL.

The only module that talks to the database; pipeline/schema.py has its tables. That the key of a unit
of work is found means that the work is done. Times are passed in, in seconds since the epoch.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlite_utils

from pipeline.errors import FolderUnusable, UnknownTrack
from pipeline.store.schema import (
    MIGRATIONS,
    TRACK_COLUMNS,
    Attempt,
    SourceFile,
    Track,
    file_of,
    migrations,
    row_of,
    track_of,
)
from pipeline.workspace import InputFolder

STATES = ("queued", "running", "done", "failed")
_OF_FOLDER = (
    " AND (:is_inbox OR EXISTS (SELECT 1 FROM files f WHERE f.sha256 = tracks.sha256 AND f.root = :root))"
)
BUSY_TIMEOUT_S = 15.0  # another process of this program (`retry`, `requeue`) may be writing a row


class Store:
    """One connection; every writing method is one transaction."""

    def __init__(
        self, path: Path, *, read_only: bool = False, busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> None:
        self._path, self._read_only, self._busy_timeout_s = path, read_only, busy_timeout_s
        self._db = self._connect()
        if not read_only:
            with self.together():  # two versions of the program must not both find the same one missing
                migrations.apply(self._db)
        elif self._is_readable() and migrations.pending(
            self._db
        ):  # of an older version, or a kill came before its first table
            Store(path, busy_timeout_s=busy_timeout_s).close()
        self._refuse_newer()

    def _refuse_newer(self) -> None:
        unknown = [one.name for one in migrations.applied(self._db) if one.name not in MIGRATIONS]
        if unknown:
            self.close()
            raise FolderUnusable(f"{self._path} was made by a newer version of this program ({unknown[-1]})")

    def _connect(self) -> sqlite_utils.Database:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        conn = sqlite3.connect(self._path, isolation_level=None, timeout=self._busy_timeout_s)
        try:
            if self._read_only:
                # Not `mode=ro`: a reader of a WAL database must be able to make the -shm file.
                conn.execute("PRAGMA query_only=ON")
            else:
                conn.execute("PRAGMA journal_mode=WAL")
                conn.execute("PRAGMA synchronous=FULL")
                conn.execute("PRAGMA foreign_keys=ON")
        except BaseException:
            conn.close()
            raise
        return sqlite_utils.Database(conn)

    def _is_readable(self) -> bool:
        """Whether it can be read beside a writer; if not (a full or closed disk), it is read as it lies."""
        try:
            self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            self._db.close()
            uri = f"file:{quote(str(self._path))}?mode=ro&immutable=1"
            self._db = sqlite_utils.Database(sqlite3.connect(uri, uri=True, isolation_level=None))
            return False
        return True

    def close(self) -> None:
        self._db.close()

    def reopen(self) -> None:
        """Connect anew: after a failed write the old connection may hold what never reached the disk."""
        fresh = self._connect()  # first: if the disk is still in the way, the old one is what there is
        with suppress(sqlite3.Error):
            self._db.close()
        self._db = fresh

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make all that is written inside one transaction: all of it or nothing, and one flush."""
        with self._writing():
            yield

    @contextmanager
    def _writing(self) -> Iterator[sqlite_utils.Database]:
        """A transaction that holds the write lock from its start, so it can't fail half-way as busy."""
        if self._db.conn.in_transaction:  # part of a larger one
            yield self._db
            return
        self._db.conn.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._roll_back()
            raise
        try:
            self._db.conn.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        if self._db.conn.in_transaction:  # SQLite has rolled back by itself after some errors
            with suppress(sqlite3.Error):
                self._db.conn.execute("ROLLBACK")

    # -- arrival ---------------------------------------------------------------------------------

    def add(self, file: SourceFile, *, name: str, folder: str, now: float) -> bool:
        """Record a file, and its track as queued if it is new. True if the track is new."""
        with self._writing() as db:
            new = bool(
                db.execute(
                    "INSERT INTO tracks (sha256, name, folder, state, bytes, queued_at)"
                    " VALUES (?, ?, ?, 'queued', ?, ?) ON CONFLICT DO NOTHING",
                    [file.sha256, name, folder, file.size, now],
                ).rowcount
            )
            db.execute(  # another file had this path; it is in the archive now, and is found there
                "UPDATE OR REPLACE files SET path = moved_to WHERE path = ? AND sha256 != ?"
                " AND moved_to IS NOT NULL",
                [os.fsencode(file.path), file.sha256],
            )
            db["files"].upsert(row_of(file, now), pk="path")
        return new

    def file_at(self, path: Path) -> SourceFile | None:
        rows = self._db.query("SELECT * FROM files WHERE path = ?", [os.fsencode(path)])
        return next(map(file_of, rows), None)

    def files_of(self, sha256: str) -> list[SourceFile]:
        rows = self._db.query("SELECT * FROM files WHERE sha256 = ? ORDER BY seen_at, path", [sha256])
        return [file_of(row) for row in rows]

    def files_below(self, root: Path) -> list[SourceFile]:
        rows = self._db.query("SELECT * FROM files WHERE root = ?", [os.fsencode(root)])
        return [file_of(row) for row in rows]

    def known(self, path: Path) -> tuple[SourceFile, Track] | None:
        """The file recorded at a path, with its track."""
        rows = self._known("f.path = ?", os.fsencode(path))
        return rows[0] if rows else None

    def unsettled_below(self, root: Path) -> list[tuple[SourceFile, Track]]:
        """Files of finished and failed tracks that may still have to be moved, with their tracks."""
        where = "f.root = ? AND f.state IN ('waiting', 'aside') AND t.state IN ('done', 'failed')"
        return self._known(where, os.fsencode(root))

    def _known(self, where: str, value: bytes) -> list[tuple[SourceFile, Track]]:
        columns = ", ".join(f"t.{name} AS t_{name}" for name in TRACK_COLUMNS)
        sql = f"SELECT f.*, {columns} FROM files f JOIN tracks t USING (sha256) WHERE {where}"
        return [
            (file_of(row), track_of({name: row[f"t_{name}"] for name in TRACK_COLUMNS}))
            for row in self._db.query(sql, [value])
        ]

    def settle_file(
        self, path: Path, *, state: str, moved_to: Path | None = None, inode: int | None = None
    ) -> None:
        """Note what became of a file; `inode`: it has another one since it was moved to another disk."""
        with self._writing() as db:
            db.execute(
                "UPDATE files SET state = ?, moved_to = ?, inode = coalesce(?, inode) WHERE path = ?",
                [state, None if moved_to is None else os.fsencode(moved_to), inode, os.fsencode(path)],
            )

    # -- the queue -------------------------------------------------------------------------------

    def due(self, limit: int, folder: InputFolder, *, now: float) -> list[Track]:
        """Up to `limit` queued tracks that may be claimed, oldest first.

        The inbox stands for the whole queue; of another folder, only its own tracks are returned. A
        track that may have killed the process is returned alone.
        """
        rows = self._db.query(
            f"SELECT * FROM tracks WHERE state = 'queued' AND not_before <= :now{_OF_FOLDER}"
            " ORDER BY queued_at, sha256 LIMIT :limit",
            {**_arguments(folder), "now": now, "limit": limit},
        )
        tracks = list(map(track_of, rows))
        if tracks and tracks[0].solo:
            return tracks[:1]
        return [track for track in tracks if not track.solo]

    def claim(self, tracks: Iterable[Track]) -> list[Track]:
        """Mark those of the tracks that are still queued as running, and return them in the same order."""
        wanted = [track.sha256 for track in tracks]
        with self._writing() as db:
            taken = db.query(
                "UPDATE tracks SET state = 'running' WHERE state = 'queued'"
                " AND sha256 IN (SELECT value FROM json_each(?)) RETURNING *",
                [json.dumps(wanted)],
            )
            return sorted(map(track_of, taken), key=lambda track: wanted.index(track.sha256))

    def next_due(self, folder: InputFolder) -> float | None:
        """When the next queued track of the folder may be claimed (see `due`); None if none is queued."""
        sql = f"SELECT min(not_before) FROM tracks WHERE state = 'queued'{_OF_FOLDER}"
        row = self._db.execute(sql, _arguments(folder)).fetchone()
        return None if row[0] is None else float(row[0])

    def end_waits(self, *, after: float) -> None:
        """Make queued tracks that wait for a time later than `after` due."""
        with self._writing() as db:
            db.execute("UPDATE tracks SET not_before = 0 WHERE state = 'queued' AND not_before > ?", [after])

    def finish(self, sha256: str, *, plan_key: str, source: Mapping[str, Any], now: float) -> None:
        with self._writing() as db:
            db["tracks"].update(
                sha256,
                {
                    "state": "done",
                    "finished_at": now,
                    "stage": None,
                    "error": None,
                    "plan_key": plan_key,
                    "source": json.dumps(source),
                },
            )

    def fail(self, sha256: str, *, stage: str, error: str, now: float, retry_at: float | None) -> None:
        """Count a failed attempt; queued again for `retry_at`, or failed for good if that is None."""
        with self._writing() as db:
            db.execute(
                "UPDATE tracks SET state = ?, attempts = attempts + 1, stage = ?, error = ?, not_before = ?,"
                " finished_at = ? WHERE sha256 = ?",
                [
                    "failed" if retry_at is None else "queued",
                    stage,
                    error,
                    0 if retry_at is None else retry_at,
                    now if retry_at is None else None,
                    sha256,
                ],
            )

    def release(self, sha256: str, *, not_before: float = 0.0) -> None:
        """Put a claimed track back; it was not an attempt."""
        with self._writing() as db:
            db.execute(
                "UPDATE tracks SET state = 'queued', not_before = ? WHERE sha256 = ? AND state = 'running'",
                [not_before, sha256],
            )

    def release_all(self, *, now: float) -> None:
        """Put everything that runs back; none of it was an attempt. Only for the instance that runs it."""
        with self._writing() as db:
            db.execute("UPDATE attempts SET ended_at = ?, outcome = 'stopped' WHERE ended_at IS NULL", [now])
            db.execute("UPDATE tracks SET state = 'queued' WHERE state = 'running'")

    def forget(self, sha256: str) -> None:
        """Drop a track that never came to anything: bytes that were only part of a file."""
        with self._writing() as db:
            for table in ("attempts", "units", "files", "tracks"):
                db.execute(f"DELETE FROM {table} WHERE sha256 = ?", [sha256])

    def requeue(self, sha256: str, *, now: float, stages: Iterable[str] = ()) -> bool:
        """Queue a finished or failed track again, with its attempts forgiven and `stages` forgotten.

        Returns:
            False if it is running: then nothing was done.
        """
        with self.holding(sha256) as track:
            if track is None or track.state == "running":
                return False
            db = self._db
            for stage in stages:
                db.execute("DELETE FROM units WHERE sha256 = ? AND stage = ?", [sha256, stage])
            db.execute(
                "UPDATE tracks SET state = 'queued', attempts = 0, not_before = 0, queued_at = ?,"
                " stage = NULL,"
                " error = NULL, plan_key = NULL, finished_at = NULL, solo = 0, collected_at = NULL"
                " WHERE sha256 = ?",
                [now, sha256],
            )
        return True

    def recover(self, *, now: float) -> list[tuple[Track, str]]:
        """Close what a killed instance left open. Only for the holder of the instance lock.

        Returns:
            The tracks that were in the middle of a stage, with that stage: whose attempt it was is
            for the caller to count, in the same transaction (`together`).
        """
        with self._writing() as db:
            rows = list(
                db.query(
                    "SELECT t.*, a.stage AS open_stage FROM attempts a JOIN tracks t USING (sha256)"
                    " WHERE a.ended_at IS NULL AND t.state = 'running' GROUP BY t.sha256"
                )
            )
            db.execute("UPDATE attempts SET ended_at = ?, outcome = 'crashed' WHERE ended_at IS NULL", [now])
            db.execute("UPDATE tracks SET state = 'queued' WHERE state = 'running'")
        return [
            (track_of({k: v for k, v in row.items() if k != "open_stage"}), row["open_stage"]) for row in rows
        ]

    def suspect(
        self, sha256: str, *, attempts: int, solo: bool, error: str, now: float, retry_at: float
    ) -> None:
        """Count a crash: queued again, behind all others."""
        with self._writing() as db:
            db.execute(
                "UPDATE tracks SET attempts = ?, solo = ?, error = ?, queued_at = ?, not_before = ?"
                " WHERE sha256 = ?",
                [attempts, solo, error, now, retry_at, sha256],
            )

    # -- retention -------------------------------------------------------------------------------

    @contextmanager
    def holding(self, sha256: str) -> Iterator[Track | None]:
        """The track, with nobody able to claim or queue it meanwhile."""
        with self._writing():
            yield self.track(sha256)

    def collect(self, sha256: str, move: Callable[[], None], *, now: float) -> bool:
        """Let `move` take a finished track's outputs out of the way (quick renames), and note it.

        Returns:
            False if the track is queued or running: then nothing was done.
        """
        with self.holding(sha256) as track:
            if track is None or track.state not in ("done", "failed"):
                return False
            move()
            self._db.execute("UPDATE tracks SET collected_at = ? WHERE sha256 = ?", [now, sha256])
        return True

    # -- work ------------------------------------------------------------------------------------

    def begin(self, sha256: str, stage: str, *, now: float) -> int:
        """Record the start of an attempt at a stage; returns its id."""
        with self._writing() as db:
            row = {"sha256": sha256, "stage": stage, "started_at": now}
            return int(db["attempts"].insert(row).last_pk)

    def end(
        self,
        attempt: int,
        *,
        outcome: str,
        now: float,
        error: str | None = None,
        traceback: str | None = None,
    ) -> None:
        with self._writing() as db:
            row = {"ended_at": now, "outcome": outcome, "error": error, "traceback": traceback}
            db["attempts"].update(attempt, row)

    def unit(self, key: str) -> dict[str, Any] | None:
        """The result of a finished unit of work, or None."""
        row = self._db.execute("SELECT result FROM units WHERE key = ?", [key]).fetchone()
        return None if row is None else json.loads(row[0])

    def finish_unit(
        self, key: str, *, sha256: str, stage: str, result: Mapping[str, Any], seconds: float, now: float
    ) -> None:
        """Record a finished unit of work; progress forgives the track's earlier attempts."""
        with self._writing() as db:
            db.execute(
                "UPDATE tracks SET attempts = 0, solo = 0 WHERE sha256 = ? AND state = 'running'"
                " AND (attempts OR solo)",
                [sha256],
            )
            db["units"].upsert(
                {
                    "key": key,
                    "sha256": sha256,
                    "stage": stage,
                    "result": json.dumps(result),
                    "seconds": seconds,
                    "finished_at": now,
                },
                pk="key",
            )

    def remember_config(self, sha256: str, config: str) -> None:
        with self._writing() as db:
            db.execute("INSERT INTO configs VALUES (?, ?) ON CONFLICT DO NOTHING", [sha256, config])

    def fact(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", [name]).fetchone()
        return None if row is None else str(row[0])

    def note_fact(self, name: str, value: str) -> None:
        with self._writing() as db:
            db["facts"].upsert({"name": name, "value": value}, pk="name")

    # -- questions -------------------------------------------------------------------------------

    def track(self, sha256: str) -> Track | None:
        rows = self._db.query("SELECT * FROM tracks WHERE sha256 = ?", [sha256])
        return next(map(track_of, rows), None)

    def tracks(self, state: str | None = None, *, limit: int = -1) -> list[Track]:
        """Tracks of a state, newest first for finished ones, in the queue's order for the others."""
        order = "finished_at DESC, sha256" if state in ("done", "failed") else "queued_at, sha256"
        where = "" if state is None else "WHERE state = :state "
        sql = f"SELECT * FROM tracks {where}ORDER BY {order} LIMIT :limit"
        return [track_of(row) for row in self._db.query(sql, {"state": state, "limit": limit})]

    def spooled_bytes(self, root: Path) -> int:
        """How much the working copies of a folder's queued and running tracks take, at most."""
        sql = (
            "SELECT coalesce(sum(bytes), 0) FROM tracks WHERE state IN ('queued', 'running')"
            " AND EXISTS (SELECT 1 FROM files f WHERE f.sha256 = tracks.sha256 AND f.root = ?)"
        )
        return int(self._db.execute(sql, [os.fsencode(root)]).fetchone()[0])

    def counts(self) -> dict[str, int]:
        found = dict(self._db.execute("SELECT state, count(*) FROM tracks GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def find(self, wanted: str) -> Track:
        """The one track of that name, file name or hash prefix.

        Raises:
            UnknownTrack: there is none, or more than one.
        """
        rows = self._db.query(
            "SELECT * FROM tracks WHERE name = :w"
            " OR (length(:w) >= 4 AND substr(sha256, 1, length(:w)) = lower(:w))"
            " OR folder IN (:w, :w || '--' || substr(sha256, 1, 8))"
            " OR sha256 IN (SELECT sha256 FROM files WHERE display = :w)",
            {"w": wanted},
        )
        found = [track_of(row) for row in rows]
        if not found:
            raise UnknownTrack(f"there is no track {wanted!r}: give its name or the start of its hash")
        if len(found) > 1:
            which = ", ".join(track.sha256[:8] for track in found[:5])
            raise UnknownTrack(f"{len(found)} tracks go by {wanted!r}: give the start of a hash ({which})")
        return found[0]

    def attempts(self, sha256: str) -> list[Attempt]:
        sql = (
            "SELECT sha256, stage, started_at, ended_at, outcome, error FROM attempts"
            " WHERE sha256 = ? ORDER BY id"
        )
        return [Attempt(**row) for row in self._db.query(sql, [sha256])]

    def open_attempts(self) -> list[Attempt]:
        sql = (
            "SELECT sha256, stage, started_at, ended_at, outcome, error FROM attempts"
            " WHERE ended_at IS NULL ORDER BY id"
        )
        return [Attempt(**row) for row in self._db.query(sql)]

    def units_of(self, sha256: str) -> list[dict[str, Any]]:
        """Finished units of a track: key, stage, result, seconds, finished_at."""
        rows = self._db.query("SELECT * FROM units WHERE sha256 = ? ORDER BY finished_at, key", [sha256])
        return [{**row, "result": json.loads(row["result"])} for row in rows]

    def check(self) -> list[str]:
        """What SQLite's own integrity check finds wrong: nothing, if all is well."""
        try:
            rows = [row[0] for row in self._db.execute("PRAGMA integrity_check").fetchall()]
        except sqlite3.DatabaseError as e:  # damaged so badly that the check itself can't go on
            return [str(e)]
        return [] if rows == ["ok"] else rows


def _arguments(folder: InputFolder) -> dict[str, Any]:
    return {"is_inbox": folder.is_inbox, "root": os.fsencode(folder.path)}
