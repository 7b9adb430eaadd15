"""How file managers, browsers and sync tools name copies of a file.

Sources: the documentation of Dropbox, Nextcloud, Syncthing, Seafile and Synology Drive, and the names
that Windows, macOS, GNOME, KDE and the browsers give. Names in other languages count where these
programs translate them.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePath

_CONFLICTED = (
    r"conflicted copy|conflict copy|sfconflict|in konflikt stehende kopie|copie en conflit"
    r"|copia en conflicto|copia in conflitto|cópia em conflito"
)
_COPY = r"copy|kopie|copie|copia|cópia"
_CONFLICT_ENDING = re.compile(
    rf" ?\([^()]*(?:{_CONFLICTED})[^()]*(?:\(\d+\))?\)"  # Dropbox, Nextcloud, Seafile
    r"|\.sync-conflict-\d{8}-\d{6}(?:-\w+)?"  # Syncthing
    r"|_conflict-\d{8}-\d{6}"  # ownCloud
    r"|_[^_]+_\w{3}-\d{2}-\d+-\d{4}_(?:case)?conflict(?:\(\d+\))?"  # Synology Drive
)
_COPY_ENDING = re.compile(
    r" ?\(\d+\)"  # browsers, Google Drive
    rf"|(?: -)? (?:{_COPY})(?: ?\d+| \(\d+\))?"  # macOS, Windows
    rf"| \((?:\w+ )?(?:{_COPY})(?: \d+)?\)"  # GNOME, KDE
)
_COPY_BEGINNING = re.compile(rf"(?:{_COPY})(?: \(\d+\))? (?:of|von|de|di) ")  # Windows, Google Drive


def is_conflict_copy(name: str) -> bool:
    """Whether a sync tool gave the file this name because two machines had changed it."""
    return _without_ending(_stem(name), _CONFLICT_ENDING) is not None


def is_plainer(name: str, other: str) -> bool:
    """Whether, of two files with equal content, `name` is rather the original's name than `other`."""
    mine, theirs = _stem(name), _stem(other)
    n_mine, n_theirs = _n_copied(mine), _n_copied(theirs)
    return n_mine < n_theirs or (n_mine == n_theirs and mine != theirs and theirs.startswith(mine))


def _n_copied(stem: str) -> int:
    """How many parts of the name say that the file is a copy."""
    n = 0
    while True:
        rest = _without_ending(stem, _CONFLICT_ENDING) or _without_ending(stem, _COPY_ENDING)
        if rest is None and (beginning := _COPY_BEGINNING.match(stem)):
            rest = stem[beginning.end() :]
        if not rest:
            return n
        stem, n = rest, n + 1


def _without_ending(stem: str, ending: re.Pattern[str]) -> str | None:
    """The stem without what it ends with; None if nothing would be left, or it ends otherwise."""
    found = next((one for one in ending.finditer(stem) if one.end() == len(stem)), None)
    return stem[: found.start()] or None if found else None


def _stem(name: str) -> str:
    return PurePath(unicodedata.normalize("NFC", name)).stem.lower()
