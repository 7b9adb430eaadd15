"""The tables, their versions, and their rows as values.

A track is the SHA-256 of its bytes; a file is one place where those bytes were seen; a unit of work
is one stage's result, under a key made of all that went into it. Times are seconds since the epoch.
Paths are kept as bytes, since a file's name need not be text.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite_utils
    from sqlite_utils.migrations import Migrations

MIGRATION_SET = "pipeline"


def m001_first(db: sqlite_utils.Database) -> None:
    for statement in (
        """CREATE TABLE tracks (
            sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, bytes INTEGER NOT NULL,
            queued_at REAL NOT NULL, not_before REAL NOT NULL DEFAULT 0, finished_at REAL,
            attempts INTEGER NOT NULL DEFAULT 0, stage TEXT, error TEXT,
            folder TEXT NOT NULL, plan_key TEXT, source TEXT
        ) STRICT""",
        "CREATE INDEX tracks_queue ON tracks (state, queued_at)",
        """CREATE TABLE files (
            path BLOB PRIMARY KEY, sha256 TEXT NOT NULL REFERENCES tracks, root BLOB NOT NULL,
            display TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
            state TEXT NOT NULL, moved_to BLOB, seen_at REAL NOT NULL
        ) STRICT""",
        "CREATE INDEX files_track ON files (sha256)",
        """CREATE TABLE units (
            key TEXT PRIMARY KEY, sha256 TEXT NOT NULL REFERENCES tracks, stage TEXT NOT NULL,
            result TEXT NOT NULL, seconds REAL NOT NULL, finished_at REAL NOT NULL
        ) STRICT""",
        "CREATE INDEX units_track ON units (sha256, stage)",
        """CREATE TABLE attempts (
            id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL REFERENCES tracks, stage TEXT NOT NULL,
            started_at REAL NOT NULL, ended_at REAL, outcome TEXT, error TEXT, traceback TEXT
        ) STRICT""",
        "CREATE INDEX attempts_track ON attempts (sha256)",
        "CREATE INDEX attempts_open ON attempts (sha256) WHERE ended_at IS NULL",
        "CREATE TABLE configs (sha256 TEXT PRIMARY KEY, config TEXT NOT NULL) STRICT",
    ):
        db.execute(statement)


def m002_suspects_and_retention(db: sqlite_utils.Database) -> None:
    for statement in (
        "ALTER TABLE tracks ADD COLUMN solo INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE tracks ADD COLUMN collected_at REAL",
        "CREATE INDEX tracks_due ON tracks (state, not_before)",
        "CREATE INDEX files_root ON files (root)",
        "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    ):
        db.execute(statement)


UNREADABLE = "intake"  # the stage of tracks that stand for a file that can't be read: there is no hash of it

MIGRATIONS = (m001_first, m002_suspects_and_retention)


@cache
def migrations() -> Migrations:
    """All migrations, for writing: reading does without sqlite_utils, whose import takes long."""
    from sqlite_utils.migrations import Migrations

    found = Migrations(MIGRATION_SET)
    for migration in MIGRATIONS:
        found()(migration)
    return found


def applied_migrations(conn: sqlite3.Connection) -> list[str]:
    """The names of the migrations that a database has, oldest first."""
    if not conn.execute("SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone():
        return []
    sql = "SELECT name FROM _sqlite_migrations WHERE migration_set = ? ORDER BY rowid"
    return [name for (name,) in conn.execute(sql, [MIGRATION_SET])]


class TrackState(StrEnum):
    """Where a track is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class FileState(StrEnum):
    """What became of a source file."""

    WAITING = "waiting"  # nothing yet: its track is not finished
    SETTLED = "settled"  # moved to the archive, deleted or left in place, as the configuration says
    FAILED = "aside"  # moved to the inbox's `failed` folder
    LOST = "lost"  # gone when it was to be moved


class AttemptOutcome(StrEnum):
    """How an attempt ended."""

    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"  # on request, or because of an environment error: not counted
    CRASHED = "crashed"  # the process was killed or crashed


@dataclass(frozen=True)
class Track:
    """One input, by content."""

    sha256: str
    name: str  # the first file's name, made printable
    state: TrackState
    bytes: int
    queued_at: float
    not_before: float  # it is not claimed earlier
    finished_at: float | None
    attempts: int  # failed and crashed ones since it was queued by arrival or a person, or made progress
    stage: str | None  # where it failed
    error: str | None
    folder: str  # its folder in the outbox
    plan_key: str | None  # what it was finished for: the key of all its units
    source: dict[str, Any] | None  # duration_s, sample_rate, channels, codec
    solo: bool = False  # may have killed the process: claimed alone, so that no other is blamed
    collected_at: float | None = None  # when `gc` removed its outputs, on purpose


@dataclass(frozen=True)
class SourceFile:
    """One place where a track's bytes were seen."""

    path: Path
    sha256: str
    root: Path  # the folder that was scanned: the inbox, or the DIR of `once DIR`
    display: str  # the path below root, made printable
    size: int
    mtime_ns: int
    inode: int
    state: FileState
    moved_to: Path | None = None


@dataclass(frozen=True)
class Attempt:
    """One try at one stage of one track."""

    sha256: str
    stage: str
    started_at: float
    ended_at: float | None
    outcome: AttemptOutcome | None  # None while it runs
    error: str | None


TRACK_COLUMNS = [field.name for field in fields(Track)]


def track_of(row: Mapping[str, Any]) -> Track:
    source = json.loads(row["source"]) if row["source"] else None
    return Track(**{**row, "state": TrackState(row["state"]), "source": source, "solo": bool(row["solo"])})


def file_of(row: Mapping[str, Any]) -> SourceFile:
    return SourceFile(
        path=Path(os.fsdecode(row["path"])),
        sha256=row["sha256"],
        root=Path(os.fsdecode(row["root"])),
        display=row["display"],
        size=row["size"],
        mtime_ns=row["mtime_ns"],
        inode=row["inode"],
        state=FileState(row["state"]),
        moved_to=Path(os.fsdecode(row["moved_to"])) if row["moved_to"] is not None else None,
    )


def row_of(file: SourceFile, now: float) -> dict[str, Any]:
    return {
        "path": os.fsencode(file.path),
        "sha256": file.sha256,
        "root": os.fsencode(file.root),
        "display": file.display,
        "size": file.size,
        "mtime_ns": file.mtime_ns,
        "inode": file.inode,
        "state": file.state,
        "moved_to": None if file.moved_to is None else os.fsencode(file.moved_to),
        "seen_at": now,
    }
