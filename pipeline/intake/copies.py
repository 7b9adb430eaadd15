"""How sync tools and file managers name copies of a file.

Sources: the documentation of Dropbox, Nextcloud, Syncthing, Seafile and Synology Drive. Names in other
languages count where these programs translate them.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePath

_CONFLICTED = (
    r"conflicted copy|conflict copy|sfconflict|in konflikt stehende kopie|copie en conflit"
    r"|copia en conflicto|copia in conflitto|cópia em conflito"
)
_CONFLICT_COPY = re.compile(
    rf".(?: ?\([^()]*(?:{_CONFLICTED})[^()]*(?:\(\d+\))?\)"  # Dropbox, Nextcloud, Seafile
    r"|\.sync-conflict-\d{8}-\d{6}(?:-\w+)?"  # Syncthing
    r"|_conflict-\d{8}-\d{6}"  # ownCloud
    r"|_[^_]+_\w{3}-\d{2}-\d+-\d{4}_(?:case)?conflict(?:\(\d+\))?"  # Synology Drive
    r")\Z"
)


def is_conflict_copy(name: str) -> bool:
    """Whether a sync tool gave the file this name because two machines had changed it."""
    return _CONFLICT_COPY.search(_stem(name)) is not None


def is_plainer(name: str, other: str) -> bool:
    """Whether `other` has this whole name in it, as `song copy.wav` and `song (1).wav` do."""
    return _stem(name) != _stem(other) and _stem(name) in _stem(other)


def _stem(name: str) -> str:
    return PurePath(unicodedata.normalize("NFC", name)).stem.lower()
