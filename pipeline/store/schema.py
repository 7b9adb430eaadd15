"""The tables, their migrations, and their rows as values.

A track is identified by the SHA-256 of its bytes. A file is one path at which those bytes were found.
A unit of work is one stage's result under a key made of all its inputs. Times are seconds since the
epoch. Paths are stored as bytes, since a file name need not be valid text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.fs.copying import FileIdentity

UNREADABLE = "intake"  # the stage of a track that stands for a file that can't be read and has no hash

MIGRATIONS = {  # statements by name, in their order
    "m001_first": (
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
    ),
    "m002_suspects_and_retention": (
        "ALTER TABLE tracks ADD COLUMN solo INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE tracks ADD COLUMN collected_at REAL",
        "CREATE INDEX tracks_due ON tracks (state, not_before)",
        "CREATE INDEX files_root ON files (root)",
        "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    ),
    "m003_objects": ("ALTER TABLE files ADD COLUMN etag TEXT NOT NULL DEFAULT ''",),
    "m004_recipes": ("ALTER TABLE tracks ADD COLUMN recipe_key TEXT",),
    "m005_newest": ("CREATE INDEX tracks_newest ON tracks (state, finished_at)",),
    "m006_ratings": (
        """CREATE TABLE ratings (
            sha256 TEXT PRIMARY KEY, track TEXT NOT NULL, file TEXT NOT NULL, stars INTEGER, kept INTEGER,
            note TEXT NOT NULL, rated_at REAL NOT NULL
        ) STRICT""",
    ),
    "m007_attempts": (
        "ALTER TABLE attempts ADD COLUMN worker TEXT",
        "ALTER TABLE attempts ADD COLUMN cause TEXT",
        "ALTER TABLE attempts ADD COLUMN sound_s REAL NOT NULL DEFAULT 0",
    ),
    # Has all that tells whether results have changed, so that the rows themselves need not be read.
    "m008_results": ("CREATE INDEX tracks_results ON tracks (state, collected_at, finished_at)",),
    # Many tracks can have been queued at one time.
    "m009_queue": (
        "DROP INDEX tracks_queue",
        "CREATE INDEX tracks_queue ON tracks (state, queued_at, sha256)",
    ),
}


class TrackState(StrEnum):
    """The state of a track."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class FileState(StrEnum):
    """What became of a source file."""

    WAITING = "waiting"  # its track is not finished
    SETTLED = "settled"  # its track is finished: moved to `done`, deleted or kept, as the configuration says
    FAILED = "aside"  # its track failed: moved to `failed`
    LOST = "lost"  # it was gone when it should have been moved


class AttemptOutcome(StrEnum):
    """How an attempt ended."""

    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"  # on request, or because of an environment error: not counted
    CRASHED = "crashed"  # the process was killed or crashed


@dataclass(frozen=True)
class Track:
    """One input, identified by its content."""

    sha256: str
    name: str  # the plainest of its file names before the first attempt, printable
    state: TrackState
    bytes: int
    queued_at: float
    not_before: float  # it is not claimed earlier
    finished_at: float | None
    attempts: int  # failed and crashed ones since it arrived, was queued again by a user, or made progress
    stage: str | None  # the stage at which it failed
    error: str | None
    folder: str  # its folder in the outbox
    plan_key: str | None  # the key of the plan for which it was finished
    source: dict[str, Any] | None  # duration_s, sample_rate, channels, codec
    solo: bool = False  # it may have killed the process, so it is claimed alone
    collected_at: float | None = None  # when `gc` removed its outputs
    recipe_key: str | None = None  # the key of a recipe that is known to give the plan of `plan_key`


@dataclass(frozen=True)
class SourceFile:
    """One path at which a track's bytes were found."""

    path: Path
    sha256: str
    root: Path  # the folder that was scanned: the inbox, or the DIR of `once DIR`
    display: str  # the path below root, printable
    size: int
    mtime_ns: int
    inode: int
    state: FileState
    moved_to: Path | None = None
    etag: str = ""

    @property
    def current_path(self) -> Path:
        return self.moved_to or self.path

    @property
    def identity(self) -> FileIdentity:
        return FileIdentity(self.size, self.mtime_ns, self.inode, self.etag)


@dataclass(frozen=True)
class Attempt:
    """One try at one stage of one track."""

    sha256: str
    stage: str
    started_at: float
    ended_at: float | None
    outcome: AttemptOutcome | None  # None while it runs
    error: str | None
    worker: str | None = None  # where its tasks ran


@dataclass(frozen=True)
class Rating:
    """What a person thinks of one published file."""

    sha256: str  # of the file, so that one that is made anew has no rating
    track: str  # SHA-256 of its source
    file: str  # its name when it was rated, below the track's folder
    stars: int | None  # 1 to 5
    kept: bool | None  # False: dropped; None: undecided
    note: str


@dataclass(frozen=True)
class AttemptTotals:
    """Ended attempts at a stage with the same outcome and cause."""

    stage: str
    outcome: AttemptOutcome
    cause: str  # of a failure: see `error_cause`
    n: int
    seconds: float
    sound_s: float  # length of the takes made
    within: tuple[int, ...]  # how many took no longer than each of the asked bounds


@dataclass(frozen=True)
class Work:
    """What a track took to make, or has taken so far, in seconds of work."""

    name: str
    bytes: int
    source_s: float  # length of its normalized audio
    normalize_s: float
    embed_s: float
    generate_s: float  # all its takes, those that were not kept included
    shortest_take_s: float
    takes: int
    takes_s: float  # length of all takes together
    results: int


@dataclass(frozen=True)
class Unfinished:
    """What of a queued or running track is known to be done."""

    name: str
    bytes: int
    source_s: float | None  # length of its normalized audio; None: it is not normalized yet
    is_embedded: bool
    stage: str | None  # of the attempt that runs


TRACK_COLUMNS = [field.name for field in fields(Track)]
FILE_COLUMNS = [field.name for field in fields(SourceFile)]
RATING_COLUMNS = [field.name for field in fields(Rating)]
PATH_COLUMNS = ("path", "root", "moved_to")


def track_of(row: Mapping[str, Any]) -> Track:
    source = json.loads(row["source"]) if row["source"] else None
    return Track(**{**row, "state": TrackState(row["state"]), "source": source, "solo": bool(row["solo"])})


def file_of(row: Mapping[str, Any]) -> SourceFile:
    values = {name: row[name] for name in FILE_COLUMNS}
    paths = {name: Path(os.fsdecode(values[name])) for name in PATH_COLUMNS if values[name] is not None}
    return SourceFile(**{**values, **paths, "state": FileState(row["state"])})


def row_of(file: SourceFile, now: float) -> dict[str, Any]:
    values = {name: getattr(file, name) for name in FILE_COLUMNS}
    paths = {name: os.fsencode(values[name]) for name in PATH_COLUMNS if values[name] is not None}
    return {**values, **paths, "seen_at": now}
