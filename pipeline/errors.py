"""Errors named by cause.

Every message is one sentence for the person who runs the program: it names what is wrong and,
where there is something to do, what to do. `permanent` says whether trying the same bytes again
can help.
"""


class PipelineError(Exception):
    """Base of all errors this program raises on purpose."""

    permanent = True


class BadAudio(PipelineError):
    """The input can't be processed: not audio, cut off, silent, too short, too long, not finite."""


class SourceGone(BadAudio):
    """Neither the working copy nor any file with the track's bytes is there any more."""


class SourceAway(PipelineError):
    """The source can't be had because the whole inbox isn't there; it passes when the inbox is back."""

    permanent = False


class ConfigError(PipelineError):
    """The configuration is wrong; the message names the file, the key path and what is allowed."""


class MissingPackage(PipelineError):
    """A package is not installed; the message has the command that installs it."""


class MissingWeights(PipelineError):
    """A model's weights are not on this machine and can't be fetched now."""


class BadCheckpoint(PipelineError):
    """A model folder is there but can't be used: a file is missing, unsafe or of another model."""


class EngineFailure(PipelineError):
    """An engine could not make what was asked: it raised, or made silence or NaN."""

    permanent = False


class FolderUnusable(PipelineError):
    """A working folder or the database can't be read or written: the machine's fault, not a track's."""

    permanent = False


class DiskFull(FolderUnusable):
    """There is no space left, or too little to begin; it passes by itself when there is some again."""


class AlreadyRunning(PipelineError):
    """Another instance holds the lock."""


class UnknownTrack(PipelineError):
    """No track, or more than one, goes by that name or hash prefix."""


class Stopped(PipelineError):
    """The work was asked to stop; it is not an attempt and is queued again."""

    permanent = False


def os_reason(error: OSError) -> str:
    """The operating system's own words for an error, as the end of a sentence: "no space left on device"."""
    return (error.strerror or str(error)).lower()
