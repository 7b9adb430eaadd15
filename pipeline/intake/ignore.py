"""Names that are not tracks: unfinished copies and downloads, and files of sync tools, NAS and systems.

Sources: the exclude lists and documentation of Nextcloud, Syncthing, Resilio, Dropbox, rclone,
rsync, WinSCP, Synology DSM and QNAP QTS, and the browsers' temporary names. Most of these names begin
with a dot, and every such name is ignored.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fnmatch import translate

# Some tools write into the final file, with another file beside it until it is complete.
IN_PLACE_SUFFIXES = (".aria2", ".lftp-pget-status")
PLACEHOLDER_SUFFIX = ".part"  # Firefox keeps an empty file under the final name meanwhile

PREFIXES = (
    ".",  # dotfiles; AppleDouble (._*), rsync (.name.XXXXXX), .syncthing.*, .stversions, .dropbox.cache, …
    "~$",  # Microsoft Office's lock files
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
    *IN_PLACE_SUFFIXES,
    ".ytdl",
    ".tmp",  # Syncthing on Windows too: ~syncthing~name.tmp
    ".temp",
    ".!sync", ".bts", ".syncpart", ".synctemp",  # Resilio, BitTorrent Sync
    ".!qb", ".!ut", ".bc!",  # qBittorrent, µTorrent, BitComet
    ".xltd", ".td",  # Thunder
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


class Ignore:
    """Ignores the names above, whatever their case, and those that match the user's patterns.

    A pattern is matched against the name of a file or folder, or, if there is a slash in it,
    against the path below the scanned folder. `*` matches anything, slashes too.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        folded = [_folded(pattern).rstrip("/") for pattern in patterns]
        self._name = _any_of([pattern for pattern in folded if "/" not in pattern])
        self._path = _any_of([pattern.lstrip("/") for pattern in folded if "/" in pattern])

    def matches(self, path: str) -> bool:
        """Whether the last part of `path`, relative to the scanned folder, is ignored."""
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
    """The name among `names`, those in its folder, that shows that `name` is incomplete, or None."""
    if size == 0 and name + PLACEHOLDER_SUFFIX in names:
        return name + PLACEHOLDER_SUFFIX
    return next((name + suffix for suffix in IN_PLACE_SUFFIXES if name + suffix in names), None)


def _folded(text: str) -> str:
    """Equal for names that differ in case or in how `é` is composed (one character, or two on macOS)."""
    return unicodedata.normalize("NFC", text).lower()


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")
