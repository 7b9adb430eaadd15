"""The database of tracks, source files, units of work and attempts (SQLite in WAL mode).

No other module talks to the database; the tables are in pipeline/store/schema.py. A unit of work is
done if its key is in the database. Times are passed in, in seconds since the epoch.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipeline.errors import DatabaseDamaged, DiskFull, FolderUnusable, UnknownTrack
from pipeline.fs.copying import FileIdentity
from pipeline.fs.names import printable
from pipeline.records import Stage
from pipeline.store.schema import (
    MIGRATIONS,
    RATING_COLUMNS,
    TRACK_COLUMNS,
    Attempt,
    AttemptOutcome,
    AttemptTotals,
    FileState,
    Rating,
    SourceFile,
    Track,
    TrackState,
    Unfinished,
    Work,
    file_of,
    row_of,
    track_of,
)
from pipeline.workspace import InputFolder

if TYPE_CHECKING:
    import sqlite_utils

_OF_FOLDER = (
    " AND (:is_inbox OR EXISTS (SELECT 1 FROM files f WHERE f.sha256 = tracks.sha256 AND f.root = :root))"
)
LISTED = 10  # candidates that are named if a part of a name is ambiguous
WORK_UNITS = 300  # the last units of work, from which the pace is taken
CRASH = "crash"  # the cause of an attempt's end with the process
BUSY_TIMEOUT_S = 15.0  # another process of this program (`retry`, `requeue`) may be writing a row


def _execute_all(statements: Iterable[str], db: sqlite_utils.Database) -> None:
    for statement in statements:
        db.execute(statement)


def _folded(name: str) -> str:
    """For a comparison that ignores case and how accents are encoded."""
    return unicodedata.normalize("NFC", name).casefold()


class Store:
    """One connection a thread; what a method writes is atomic, or part of an enclosing `transaction`."""

    def __init__(
        self, path: Path, *, read_only: bool = False, busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> None:
        """Open the database, and check it quickly if it is to be written.

        Raises:
            DatabaseDamaged, DiskFull, FolderUnusable: it can't be opened.
        """
        self._path, self._read_only, self._busy_timeout_s = path, read_only, busy_timeout_s
        self._of_thread = threading.local()
        self._refuse_lost_file()
        with self._named_errors(), ExitStack() as on_error:
            self._db = self._connect()
            on_error.callback(self.close)
            if not read_only:
                self._refuse_damage("quick_check(1)")
                self._migrate()
            elif self._is_readable() and MIGRATIONS.keys() - self._applied():
                # Made by an older version, or a kill came before its first table.
                Store(path, busy_timeout_s=busy_timeout_s).close()
            if unknown := self._applied() - MIGRATIONS.keys():
                raise FolderUnusable(f"{path} was made by a newer version of this program ({max(unknown)})")
            on_error.pop_all()

    def _refuse_lost_file(self) -> None:
        """SQLite would take an empty file for a new database and delete the write-ahead log beside it."""
        log = self._path.with_name(f"{self._path.name}-wal")
        if self._path.is_dir():
            raise DatabaseDamaged(self._path, "a folder is in its place")
        if self._path.exists() and not self._path.stat().st_size and log.exists() and log.stat().st_size:
            raise DatabaseDamaged(self._path, "it is empty, but its write-ahead log is not")

    def _refuse_damage(self, pragma: str) -> None:
        found = [row[0] for row in self._db.execute(f"PRAGMA {pragma}")]
        if found != ["ok"]:
            raise DatabaseDamaged(self._path, "; ".join(" ".join(text.split()) for text in found[:3]))

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Raise SQLite's errors as ones that name the file."""
        try:
            yield
        except sqlite3.Error as e:
            code = getattr(e, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the extended part
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise DatabaseDamaged(self._path, str(e)) from e
            kind = DiskFull if code == sqlite3.SQLITE_FULL else FolderUnusable
            raise kind(f"the database {self._path} can't be used: {e}") from e

    def _migrate(self) -> None:
        # Imported here: it takes a quarter of a second, which commands that only read must not pay for.
        from sqlite_utils import Database
        from sqlite_utils.migrations import Migrations

        migrations = Migrations("pipeline")
        for name, statements in MIGRATIONS.items():
            migrations(name=name)(partial(_execute_all, statements))
        with self.transaction():  # two processes must not apply the same migration
            migrations.apply(Database(self._db))

    def _applied(self) -> set[str]:
        """The names of the migrations that were applied."""
        found = "SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'"
        if self._db.execute(found).fetchone() is None:
            return set()
        return {row["name"] for row in self._db.execute("SELECT name FROM _sqlite_migrations")}

    def _connect(self) -> sqlite3.Connection:
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
        conn.row_factory = sqlite3.Row
        return conn

    def _is_readable(self) -> bool:
        """Whether the WAL can be read too; if not (full or read-only disk), open the file without its WAL."""
        try:
            self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            self._db.close()
            uri = f"file:{quote(str(self._path))}?mode=ro&immutable=1"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            return False
        return True

    @property
    def _db(self) -> sqlite3.Connection:
        """The connection of this thread."""
        connection: sqlite3.Connection | None = getattr(self._of_thread, "connection", None)
        if connection is None:
            connection = self._of_thread.connection = self._connect()
        return connection

    @_db.setter
    def _db(self, connection: sqlite3.Connection) -> None:
        self._of_thread.connection = connection

    def disconnect(self) -> None:
        """Close the connection of this thread, which does not use the database any more."""
        if connection := getattr(self._of_thread, "connection", None):
            connection.close()
            self._of_thread.connection = None

    def close(self) -> None:
        self._db.close()

    def reopen(self) -> None:
        """Connect again: after a failed write the old connection may hold what never reached the disk."""
        fresh = self._connect()  # first, so that the old connection is kept if this fails
        with suppress(sqlite3.Error):
            self._db.close()
        self._db = fresh

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write all that is written inside, or nothing of it, with one flush; transactions nest.

        The write lock is held from the start, so that no statement in the middle can fail as busy.
        """
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some errors
                self._db.execute("ROLLBACK")
            raise

    def _insert(self, table: str, row: Mapping[str, Any]) -> int:
        """Insert a complete row, in place of one with the same key; returns its rowid."""
        sql = f"INSERT OR REPLACE INTO {table} ({', '.join(row)}) VALUES (:{', :'.join(row)})"
        return int(self._db.execute(sql, row).lastrowid or 0)

    # -- arrival ---------------------------------------------------------------------------------

    def add_file(self, file: SourceFile, *, name: str, folder: str, now: float) -> bool:
        """Record a file, and its track as queued if the track is new. Returns whether it is new."""
        with self.transaction():
            new = bool(
                self._db.execute(
                    "INSERT INTO tracks (sha256, name, folder, state, bytes, queued_at)"
                    " VALUES (?, ?, ?, 'queued', ?, ?) ON CONFLICT DO NOTHING",
                    [file.sha256, name, folder, file.size, now],
                ).rowcount
            )
            self._db.execute(  # the file that had this path is in the archive now: record it there
                "UPDATE OR REPLACE files SET path = moved_to WHERE path = ? AND sha256 != ?"
                " AND moved_to IS NOT NULL",
                [os.fsencode(file.path), file.sha256],
            )
            self._insert("files", row_of(file, now))
        return new

    def rename_track(self, sha256: str, *, name: str, folder: str) -> bool:
        """Rename a queued track, unless an attempt was made at it; returns whether it was renamed."""
        sql = (
            "UPDATE tracks SET name = ?, folder = ? WHERE sha256 = ? AND state = 'queued'"
            " AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.sha256 = tracks.sha256)"
        )
        return bool(self._db.execute(sql, [name, folder, sha256]).rowcount)

    def file_at(self, path: Path) -> SourceFile | None:
        rows = self._db.execute("SELECT * FROM files WHERE path = ?", [os.fsencode(path)])
        return next(map(file_of, rows), None)

    def files_of(self, sha256: str) -> list[SourceFile]:
        rows = self._db.execute("SELECT * FROM files WHERE sha256 = ? ORDER BY seen_at, path", [sha256])
        return [file_of(row) for row in rows]

    def files_below(self, root: Path) -> list[SourceFile]:
        rows = self._db.execute("SELECT * FROM files WHERE root = ?", [os.fsencode(root)])
        return [file_of(row) for row in rows]

    def unarchived_below(self, root: Path) -> list[SourceFile]:
        """Files of finished and failed tracks that may still have to be archived."""
        rows = self._db.execute(
            "SELECT f.* FROM files f JOIN tracks t USING (sha256) WHERE f.root = ?"
            " AND f.state IN (?, ?) AND t.state IN ('done', 'failed')",
            [os.fsencode(root), FileState.WAITING, FileState.FAILED],
        )
        return [file_of(row) for row in rows]

    def set_file_state(
        self,
        path: Path,
        state: FileState,
        *,
        moved_to: Path | None = None,
        identity: FileIdentity | None = None,
    ) -> None:
        """Record what became of a file; `identity`: what it is after a move, if that may have changed it."""
        self._db.execute(
            "UPDATE files SET state = ?, moved_to = ?, inode = coalesce(?, inode), etag = coalesce(?, etag)"
            " WHERE path = ?",
            [
                state,
                None if moved_to is None else os.fsencode(moved_to),
                identity and identity.inode,
                identity and identity.etag,
                os.fsencode(path),
            ],
        )

    # -- the queue -------------------------------------------------------------------------------

    def due(self, limit: int, folder: InputFolder, *, now: float) -> list[Track]:
        """Up to `limit` queued tracks that may be claimed, oldest first.

        The inbox stands for the whole queue; of another folder, only its own tracks are returned. A
        track that may have killed the process is returned alone.
        """
        rows = self._db.execute(
            # With a "+" SQLite does not choose the index of this column: tracks_queue has the order.
            f"SELECT * FROM tracks WHERE state = 'queued' AND +not_before <= :now{_OF_FOLDER}"
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
        with self.transaction():
            taken = self._db.execute(
                "UPDATE tracks SET state = 'running' WHERE +state = 'queued'"  # found by sha256
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
        self._db.execute(
            "UPDATE tracks SET not_before = 0 WHERE state = 'queued' AND not_before > ?", [after]
        )

    def finish(
        self, sha256: str, *, plan_key: str, recipe_key: str, source: Mapping[str, Any], now: float
    ) -> None:
        self._db.execute(
            "UPDATE tracks SET state = 'done', finished_at = ?, stage = NULL, error = NULL, plan_key = ?,"
            " recipe_key = ?, source = ? WHERE sha256 = ?",
            [now, plan_key, recipe_key, json.dumps(source), sha256],
        )

    def note_recipe(self, sha256: str, recipe_key: str) -> None:
        """Record that a recipe gives the plan for which a track was finished."""
        self._db.execute("UPDATE tracks SET recipe_key = ? WHERE sha256 = ?", [recipe_key, sha256])

    def restore(
        self, track: Track, units: Mapping[str, tuple[Stage, Mapping[str, Any]]], *, now: float
    ) -> bool:
        """Record a finished track and its units of work, by key: their stages and results.

        Returns:
            False if the track is known already; then nothing is changed.
        """
        columns = ("sha256", "name", "folder", "state", "bytes", "finished_at", "plan_key")
        row = {name: getattr(track, name) for name in columns}
        with self.transaction():
            if self.track(track.sha256) is not None:
                return False
            self._insert("tracks", {**row, "queued_at": now, "source": json.dumps(track.source)})
            for key, (stage, result) in units.items():
                self.finish_unit(key, sha256=track.sha256, stage=stage, result=result, seconds=0.0, now=now)
        return True

    def fail(self, sha256: str, *, stage: str, error: str, now: float, retry_at: float | None) -> None:
        """Count a failed attempt; the track is queued again for `retry_at`, or failed if that is None."""
        state, not_before, finished_at = (
            (TrackState.FAILED, 0.0, now) if retry_at is None else (TrackState.QUEUED, retry_at, None)
        )
        self._db.execute(
            "UPDATE tracks SET state = ?, attempts = attempts + 1, stage = ?, error = ?, not_before = ?,"
            " finished_at = ? WHERE sha256 = ?",
            [state, stage, error, not_before, finished_at, sha256],
        )

    def release(self, sha256: str, *, not_before: float = 0.0) -> None:
        """Queue a claimed track again without counting an attempt."""
        self._db.execute(
            "UPDATE tracks SET state = 'queued', not_before = ? WHERE sha256 = ? AND state = 'running'",
            [not_before, sha256],
        )

    def release_all(self, *, now: float, outcome: AttemptOutcome = AttemptOutcome.STOPPED) -> None:
        """Queue all running tracks again, uncounted. Only for the holder of the instance lock."""
        with self.transaction():
            cause = CRASH if outcome == AttemptOutcome.CRASHED else None
            sql = "UPDATE attempts SET ended_at = ?, outcome = ?, cause = ? WHERE ended_at IS NULL"
            self._db.execute(sql, [now, outcome, cause])
            self._db.execute("UPDATE tracks SET state = 'queued' WHERE state = 'running'")

    def forget(self, sha256: str) -> None:
        """Delete all rows of a track, such as one made of bytes that were only part of a file."""
        with self.transaction():
            for table in ("attempts", "units", "files", "tracks"):
                self._db.execute(f"DELETE FROM {table} WHERE sha256 = ?", [sha256])

    def requeue(self, sha256: str, *, now: float, stages: Iterable[str] = ()) -> bool:
        """Queue a track again with no attempts counted, without its units of work of `stages`.

        Returns:
            False if the track is running; then nothing is changed.
        """
        with self.locked_track(sha256) as track:
            if track is None or track.state == TrackState.RUNNING:
                return False
            for stage in stages:
                self._db.execute("DELETE FROM units WHERE sha256 = ? AND stage = ?", [sha256, stage])
            self._db.execute(
                "UPDATE tracks SET state = 'queued', attempts = 0, not_before = 0, queued_at = ?,"
                " stage = NULL, error = NULL, plan_key = NULL, recipe_key = NULL, finished_at = NULL,"
                " solo = 0, collected_at = NULL WHERE sha256 = ?",
                [now, sha256],
            )
        return True

    def recover(self, *, now: float) -> list[tuple[Track, str]]:
        """Close the attempts of a killed instance. Only for the holder of the instance lock.

        Returns:
            The tracks that were in the middle of a stage, with that stage. The caller counts the
            attempt, in the same transaction.
        """
        with self.transaction():
            rows = self._db.execute(
                "SELECT t.*, a.stage AS open_stage FROM attempts a JOIN tracks t USING (sha256)"
                " WHERE a.ended_at IS NULL AND t.state = 'running' GROUP BY t.sha256"
            ).fetchall()
            self.release_all(now=now, outcome=AttemptOutcome.CRASHED)
        return [(track_of({name: row[name] for name in TRACK_COLUMNS}), row["open_stage"]) for row in rows]

    def record_crash(
        self, sha256: str, *, attempts: int, solo: bool, error: str, now: float, retry_at: float
    ) -> None:
        """Count a crash and queue the track again, behind all others."""
        sql = (
            "UPDATE tracks SET attempts = ?, solo = ?, error = ?, queued_at = ?, not_before = ?"
            " WHERE sha256 = ?"
        )
        self._db.execute(sql, [attempts, solo, error, now, retry_at, sha256])

    # -- retention -------------------------------------------------------------------------------

    @contextmanager
    def locked_track(self, sha256: str) -> Iterator[Track | None]:
        """The track; no other process can claim it or queue it before the end."""
        with self.transaction():
            yield self.track(sha256)

    def set_collected(self, sha256: str, *, now: float) -> None:
        """Record that the track's outputs were removed on purpose."""
        self._db.execute("UPDATE tracks SET collected_at = ? WHERE sha256 = ?", [now, sha256])

    # -- work ------------------------------------------------------------------------------------

    def begin_attempt(self, sha256: str, stage: str, *, now: float, worker: str | None = None) -> int:
        """Record the start of an attempt at a stage; returns its id."""
        row = {"sha256": sha256, "stage": stage, "started_at": now, "worker": worker}
        return self._insert("attempts", row)

    def end_attempt(
        self,
        attempt: int,
        *,
        outcome: AttemptOutcome,
        now: float,
        error: str | None = None,
        cause: str | None = None,
        traceback: str | None = None,
        sound_s: float = 0.0,
        worker: str | None = None,
    ) -> None:
        """Record the end of an attempt; `cause`: a word for its kind of error; `sound_s`: of all takes."""
        sql = (
            "UPDATE attempts SET ended_at = ?, outcome = ?, error = ?, cause = ?, traceback = ?, sound_s = ?,"
            " worker = coalesce(?, worker) WHERE id = ?"
        )
        self._db.execute(sql, [now, outcome, error, cause, traceback, sound_s, worker, attempt])

    def unit(self, key: str) -> dict[str, Any] | None:
        """The result of a finished unit of work, or None."""
        row = self._db.execute("SELECT result FROM units WHERE key = ?", [key]).fetchone()
        return None if row is None else json.loads(row[0])

    def finish_unit(
        self, key: str, *, sha256: str, stage: str, result: Mapping[str, Any], seconds: float, now: float
    ) -> None:
        """Record a finished unit of work. As this is progress, earlier failed attempts no longer count."""
        with self.transaction():
            self._db.execute(
                "UPDATE tracks SET attempts = 0, solo = 0 WHERE sha256 = ? AND state = 'running'"
                " AND (attempts OR solo)",
                [sha256],
            )
            unit = {"key": key, "sha256": sha256, "stage": stage, "result": json.dumps(result)}
            self._insert("units", {**unit, "seconds": seconds, "finished_at": now})

    def remember_config(self, sha256: str, config: str) -> None:
        self._db.execute("INSERT INTO configs VALUES (?, ?) ON CONFLICT DO NOTHING", [sha256, config])

    def fact(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", [name]).fetchone()
        return None if row is None else str(row[0])

    def set_fact(self, name: str, value: str) -> None:
        self._insert("facts", {"name": name, "value": value})

    def rate(self, ratings: Iterable[Rating], *, now: float) -> None:
        """Record ratings in the place of earlier ones of the same files; one that says nothing removes it."""
        with self.transaction():
            for rating in ratings:
                self._insert("ratings", {**vars(rating), "rated_at": now})
            self._db.execute("DELETE FROM ratings WHERE stars IS NULL AND kept IS NULL AND note = ''")

    # -- queries -------------------------------------------------------------------------------

    def work(self, generator: str, model: str | None) -> list[Work]:
        """What the last tracks took to make so far, of those of which this generator and model made takes."""
        rows = self._db.execute(
            """WITH recent AS (
                SELECT sha256, stage, seconds, json_extract(result, '$.duration_s') AS length_s,
                    json_extract(result, '$.file') IS NOT NULL AS is_published
                FROM units WHERE sha256 IN (SELECT sha256 FROM units ORDER BY rowid DESC LIMIT :limit)
                AND (stage != 'generate' OR (json_extract(result, '$.engine') = :generator
                    AND json_extract(result, '$.model') IS :model))
            )
            SELECT t.name, t.bytes,
                max(length_s) FILTER (WHERE recent.stage = 'normalize') AS source_s,
                total(seconds) FILTER (WHERE recent.stage = 'normalize') AS normalize_s,
                total(seconds) FILTER (WHERE recent.stage = 'embed') AS embed_s,
                total(seconds) FILTER (WHERE recent.stage = 'generate') AS generate_s,
                min(seconds) FILTER (WHERE recent.stage = 'generate' AND seconds > 0) AS shortest_take_s,
                count(*) FILTER (WHERE recent.stage = 'generate' AND seconds > 0) AS takes,
                total(length_s) FILTER (WHERE recent.stage = 'generate' AND seconds > 0) AS takes_s,
                count(*) FILTER (WHERE recent.stage = 'generate' AND is_published) AS results
            FROM recent JOIN tracks t USING (sha256) GROUP BY sha256
            HAVING source_s > 0 AND results > 0 AND (takes > 1 OR (takes AND t.state = 'done'))""",
            {"generator": generator, "model": model, "limit": WORK_UNITS},
        )
        return [Work(**row) for row in rows]

    def sound_since(self, when: float) -> float:
        """Length of the results that were published since then, of the last WORK_UNITS; in seconds."""
        sql = (
            "SELECT total(json_extract(result, '$.duration_s')) FROM"
            " (SELECT * FROM units ORDER BY rowid DESC LIMIT ?) WHERE stage = 'generate' AND seconds > 0"
            " AND finished_at >= ?"
        )
        return float(self._db.execute(sql, [WORK_UNITS, when]).fetchone()[0])

    def attempt_totals(self, bounds_s: Sequence[float]) -> list[AttemptTotals]:
        """All ended attempts, counted by stage, outcome and cause."""
        took = "max(ended_at - started_at, 0)"
        within = "".join(f", sum({took} <= {bound:f})" for bound in bounds_s)
        rows = self._db.execute(
            f"SELECT stage, outcome, coalesce(cause, ''), count(*), sum({took}), total(sound_s){within}"
            " FROM attempts WHERE ended_at IS NOT NULL GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        )
        return [
            AttemptTotals(stage, outcome, cause, n, seconds, sound_s, tuple(counts))
            for stage, outcome, cause, n, seconds, sound_s, *counts in rows
        ]

    def oldest_queued(self) -> float | None:
        """When the first of the queued tracks was queued."""
        found = self._db.execute("SELECT min(queued_at) FROM tracks WHERE state = 'queued'").fetchone()[0]
        return None if found is None else float(found)

    def n_ended_since(self, when: float) -> int:
        """How many tracks were finished or have failed since then."""
        sql = "SELECT count(*) FROM tracks WHERE state IN ('done', 'failed') AND finished_at >= ?"
        return int(self._db.execute(sql, [when]).fetchone()[0])

    def waiting(self, *, after: float, until: float, limit: int) -> list[Track]:
        """The first queued tracks that wait for a time in between."""
        sql = (
            "SELECT * FROM tracks WHERE state = 'queued' AND not_before > ? AND not_before <= ?"
            " ORDER BY queued_at, sha256 LIMIT ?"
        )
        return [track_of(row) for row in self._db.execute(sql, [after, until, limit])]

    def unfinished(self, state: TrackState, *, limit: int) -> list[Unfinished]:
        """What of the first running or queued tracks is done since they were queued."""
        rows = self._db.execute(
            """SELECT name, bytes,
                (SELECT json_extract(result, '$.duration_s') FROM units u WHERE u.sha256 = t.sha256
                    AND u.stage = 'normalize' AND u.finished_at >= t.queued_at) AS source_s,
                EXISTS (SELECT 1 FROM units u WHERE u.sha256 = t.sha256 AND u.stage = 'embed') AS is_embedded,
                (SELECT stage FROM attempts a WHERE a.sha256 = t.sha256 AND a.ended_at IS NULL) AS stage
            FROM tracks t WHERE state = ? ORDER BY queued_at, sha256 LIMIT ?""",
            [state, limit],
        )
        return [Unfinished(**{**row, "is_embedded": bool(row["is_embedded"])}) for row in rows]

    def track(self, sha256: str) -> Track | None:
        rows = self._db.execute("SELECT * FROM tracks WHERE sha256 = ?", [sha256])
        return next(map(track_of, rows), None)

    def tracks(self, state: TrackState | None = None, *, limit: int = -1) -> list[Track]:
        """Tracks of a state: finished and failed ones newest first, others in the order of the queue."""
        newest_first = state in (TrackState.DONE, TrackState.FAILED)
        order = "finished_at DESC, sha256" if newest_first else "queued_at, sha256"
        where = "" if state is None else "WHERE state = :state "
        sql = f"SELECT * FROM tracks {where}ORDER BY {order} LIMIT :limit"
        return [track_of(row) for row in self._db.execute(sql, {"state": state, "limit": limit})]

    def ended_stamp(self) -> tuple[float, float, float]:
        """Numbers that change whenever a track is done, has failed, or is queued again or collected."""
        sql = """SELECT count(*), total(finished_at), total(collected_at) FROM tracks
            WHERE state IN ('done', 'failed')"""
        n, ended, collected = self._db.execute(sql).fetchone()
        return float(n), float(ended), float(collected)

    def finished(self) -> dict[str, tuple[str, float]]:
        """The tracks with results by hash: their folders in the outbox, and when they were finished."""
        rows = self._db.execute(
            "SELECT sha256, folder, finished_at FROM tracks WHERE state = 'done' AND collected_at IS NULL"
        )
        return {sha256: (folder, finished_at) for sha256, folder, finished_at in rows}

    def spooled_bytes(self, root: Path) -> int:
        """Size of the working copies of a folder's queued and running tracks, at most."""
        sql = f"SELECT coalesce(sum(bytes), 0) FROM tracks WHERE state IN ('queued', 'running'){_OF_FOLDER}"
        values = {"is_inbox": False, "root": os.fsencode(root)}
        return int(self._db.execute(sql, values).fetchone()[0])

    def counts(self) -> dict[str, int]:
        """The number of tracks per state; every state is there."""
        found = dict(self._db.execute("SELECT state, count(*) FROM tracks GROUP BY state").fetchall())
        return {state.value: found.get(state, 0) for state in TrackState}

    def find(self, wanted: str) -> Track:
        """The track with that name, file name or hash prefix; otherwise the one with that part in its name.

        Raises:
            UnknownTrack: there is none, or more than one.
        """
        wanted = printable(wanted)  # as names are recorded
        rows = self._db.execute(
            "SELECT * FROM tracks WHERE name = :w"
            " OR (length(:w) >= 4 AND substr(sha256, 1, length(:w)) = lower(:w))"
            " OR folder IN (:w, :w || '--' || substr(sha256, 1, 8))"
            " OR sha256 IN (SELECT sha256 FROM files WHERE display = :w)",
            {"w": wanted},
        )
        found = [track_of(row) for row in rows]
        if wanted and not found:
            found = [track for track in self.tracks() if _folded(wanted) in _folded(track.name)]
        if not found:
            raise UnknownTrack(
                f"there is no track {wanted!r}: give a part of its name or the start of its hash"
            )
        if len(found) > 1:
            which = ", ".join(f"{track.name} ({track.sha256[:8]})" for track in found[:LISTED])
            more = ", ..." if len(found) > LISTED else ""
            raise UnknownTrack(
                f"{len(found)} tracks match {wanted!r}: give more of the name or the start of a hash:"
                f" {which}{more}"
            )
        return found[0]

    def attempts(self, sha256: str | None = None) -> list[Attempt]:
        """The attempts at a track; without one, those at any track that have not ended."""
        where = "ended_at IS NULL" if sha256 is None else "sha256 = :sha256"
        columns = "sha256, stage, started_at, ended_at, outcome, error, worker"
        sql = f"SELECT {columns} FROM attempts WHERE {where} ORDER BY id"
        return [Attempt(**row) for row in self._db.execute(sql, {"sha256": sha256})]

    def units_of(self, sha256: str) -> list[dict[str, Any]]:
        """Finished units of a track: key, stage, result, seconds, finished_at."""
        rows = self._db.execute("SELECT * FROM units WHERE sha256 = ? ORDER BY finished_at, key", [sha256])
        return [{**row, "result": json.loads(row["result"])} for row in rows]

    def ratings(self, track: str | None = None) -> list[Rating]:
        """The ratings of a track, or all, in the order in which they were given."""
        where, values = ("", []) if track is None else (" WHERE track = ?", [track])
        columns = ", ".join(RATING_COLUMNS)
        rows = self._db.execute(f"SELECT {columns} FROM ratings{where} ORDER BY rated_at, rowid", values)
        return [Rating(**{**row, "kept": None if row["kept"] is None else bool(row["kept"])}) for row in rows]

    def results_of(self, sha256: str) -> dict[str, dict[str, Any]]:
        """The records of a track's published variations and takes, by the hashes of their files."""
        results = [unit["result"] for unit in self.units_of(sha256) if unit["stage"] == Stage.GENERATE]
        found = [one for result in results for one in (*result.get("takes", ()), result)]
        return {one["sha256"]: one for one in found if "sha256" in one}

    def check(self) -> None:
        """Run SQLite's integrity check, which reads the whole file.

        Raises:
            DatabaseDamaged: it found something.
        """
        with self._named_errors():
            self._refuse_damage("integrity_check")


def _arguments(folder: InputFolder) -> dict[str, Any]:
    return {"is_inbox": folder.is_inbox, "root": os.fsencode(folder.path)}
