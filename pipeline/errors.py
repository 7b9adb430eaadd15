"""Errors named by cause.

Every message is one sentence for the person who runs the program: it says what is wrong and,
where something can be done, what to do.
"""

from __future__ import annotations

from pathlib import Path


class PipelineError(Exception):
    """Base of all errors that this program raises on purpose."""

    permanent = True  # processing the same bytes again can't help


class BadAudio(PipelineError):
    """The input can't be processed: not audio, cut off, silent, too short, too long, not finite."""


class SourceGone(BadAudio):
    """Neither the working copy nor any file with the track's bytes exists any more."""


class SourceAway(PipelineError):
    """The source can't be read because the whole inbox is missing; it can be once the inbox is back."""

    permanent = False


class ConfigError(PipelineError):
    """The configuration is wrong; the message names the file, the key path and what is allowed."""


class EngineUnusable(PipelineError):
    """An engine can't be loaded or run at all: the machine's or the configuration's fault, not a track's."""

    permanent = False


class MissingPackage(EngineUnusable):
    """A package is not installed; the message has the command that installs it."""


class MissingWeights(EngineUnusable):
    """A model's weights are not on this machine and can't be fetched now."""


class BadCheckpoint(EngineUnusable):
    """A model's folder exists but can't be used: a file is missing, unsafe or of another model."""


class EngineFailure(PipelineError):
    """An engine could not make what was asked: it raised, or made silence or NaN."""

    permanent = False


class NoResult(EngineFailure):
    """An engine can't make what was asked, and neither can another try: results depend on requests alone."""

    permanent = True


class FolderUnusable(PipelineError):
    """A working folder or the database can't be read or written: the machine's fault, not a track's."""

    permanent = False


class DiskFull(FolderUnusable):
    """The disk has no space left, or too little to begin; the work goes on once there is space again."""


class BucketAway(FolderUnusable):
    """A bucket does not answer or asks to wait; the work goes on once it answers again."""


class DatabaseDamaged(FolderUnusable):
    """SQLite can't read the database file any more."""

    def __init__(self, database: Path, damage: str) -> None:
        super().__init__(
            f"the database {database} is damaged ({damage}): stop the program, then restore the file from a"
            f" backup, or move it away together with {database.name}-wal and {database.name}-shm and"
            " run `rebuild`, which records the finished tracks of the outbox in a new one"
        )


class AlreadyRunning(PipelineError):
    """Another instance holds the lock."""


class LeaseLost(FolderUnusable, AlreadyRunning):
    """Another instance has taken over a bucket from this one, which must not write to it any more."""


class UnknownTrack(PipelineError):
    """No track, or more than one, has that name or hash prefix."""


class Stopped(BaseException):
    """The work was asked to stop; that does not count as an attempt, and the track is queued again.

    Like `KeyboardInterrupt` it is no `Exception`, so that what handles errors lets it pass.
    """


def os_reason(error: OSError) -> str:
    """The operating system's own words for an error, as the end of a sentence: "no space left on device"."""
    return (error.strerror or str(error)).lower()
