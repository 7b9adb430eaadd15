"""File names for display and for folders in the outbox. A name on disk may be any bytes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.fs.files import with_url

MAX_NAME_BYTES = 120  # of the part of a folder's name that comes from the file's
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069/\\:*?"<>|]+')


def printable(path: str | os.PathLike[str]) -> str:
    """One line of text for any path: control characters and bytes that are not UTF-8 as escapes.

    A path in a bucket is shown as a URL.
    """
    text = with_url(os.fsencode(path).decode("utf-8", errors="backslashreplace"))
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def file_safe(name: str) -> str:
    """The name with what some file systems refuse replaced: separators, control characters and `*:?"<>|`."""
    return _UNSAFE.sub("_", name).rstrip(" .")


def track_name(path: Path) -> str:
    """The file's name without its ending, as a folder name that is valid on any file system.

    Never empty, no separators or control characters, no leading dot or dash, at most
    `MAX_NAME_BYTES` of UTF-8.
    """
    text = os.fsencode(path.stem).decode("utf-8", errors="replace").replace("\ufffd", "_")
    text = file_safe(text).lstrip(" .-")
    cut = text.encode()[:MAX_NAME_BYTES].decode("utf-8", errors="ignore").rstrip(" .")
    return cut or "track"
