"""Names that are not tracks: copies and downloads under way, and what sync tools, NAS and systems leave.

Sources: the exclude lists and documentation of Nextcloud, Syncthing, Resilio, Dropbox, rclone,
rsync, WinSCP, Synology DSM and QNAP QTS, and the browsers' own temporary names. Most of what they
make begins with a dot, which is ignored whatever follows.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fnmatch import translate

PREFIXES = (
    ".",  # dotfiles; AppleDouble (._*), rsync (.name.XXXXXX), .syncthing.*, .stversions, .dropbox.cache, …
    "~$",  # Session's owner files
    "~syncthing~",  # Syncthing on Windows
)
SUFFIXES = (
    "~",  # editors' backups
    ".part",  # Firefox, KDE, Nextcloud, yt-dlp
    ".partial",  # rclone, Internet Explorer
    ".filepart",  # WinSCP
    ".crdownload",  # Chrome, Edge
    ".download",  # Safari: a folder
    ".opdownload",  # Opera
    ".fdmdownload",  # Free Download Manager
    ".aria2",
    ".lftp-pget-status",
    ".ytdl",
    ".tmp",
    ".temp",
    ".!sync", ".bts", ".syncpart", ".synctemp",  # Resilio, BitTorrent Sync
    ".!qb", ".!ut", ".bc!",  # qBittorrent, µTorrent, BitComet
    ".xltd", ".td",  # Thunder
    ".kate-swp",
)  # fmt: skip
NAMES = frozenset(
    {
        "@eadir", "@synoresource", "@tmp", "@sharebin", "#recycle", "#snapshot",  # Synology
        "@recycle", "@recently-snapshot", "@__thumb",  # QNAP
        "~snapshot",  # NetApp
        "$recycle.bin", "recycler", "system volume information", "found.000",  # Windows
        "lost+found", "__macosx", "network trash folder", "temporary items", "icon\r",  # Unix, macOS
    }
)  # fmt: skip

# Some tools write into the file itself, with a file of their own beside it until it is whole.
IN_PLACE_SUFFIXES = (".aria2", ".lftp-pget-status")
PLACEHOLDER_SUFFIX = ".part"  # Firefox keeps the final name with an empty file meanwhile


class Ignore:
    """What is left alone: the names above, whatever the case, and the user's own patterns.

    A pattern is matched against the name of a file or folder, or, if there is a slash in it,
    against the path below the scanned folder. `*` matches anything, slashes too.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        folded = [_folded(pattern).rstrip("/") for pattern in patterns]
        self._name = _any_of([pattern for pattern in folded if "/" not in pattern])
        self._path = _any_of([pattern.lstrip("/") for pattern in folded if "/" in pattern])

    def matches(self, path: str) -> bool:
        """Whether the last part of `path`, relative to the scanned folder, is to be left alone."""
        path = _folded(path)
        name = path.rpartition("/")[2]
        return (
            name.startswith(PREFIXES)
            or name.endswith(SUFFIXES)
            or name in NAMES
            or self._name.match(name) is not None
            or self._path.match(path) is not None
        )


def still_downloading(name: str, size: int, names: frozenset[str]) -> str | None:
    """The file among `names`, its folder's, that says `name` isn't whole yet; None if there is none."""
    if size == 0 and name + PLACEHOLDER_SUFFIX in names:
        return name + PLACEHOLDER_SUFFIX
    return next((name + suffix for suffix in IN_PLACE_SUFFIXES if name + suffix in names), None)


def _folded(text: str) -> str:
    """The same for `É` as one character or two (macOS), large or small."""
    return unicodedata.normalize("NFC", text).lower()


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")
