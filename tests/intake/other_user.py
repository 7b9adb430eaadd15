"""Running a part of a test without the rights of root."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

AsOtherUser = Callable[[Path], AbstractContextManager[None]]  # entered with a folder to work in
