"""A fixture that the tests of the intake share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from other_user import AsOtherUser


@pytest.fixture
def as_other_user(monkeypatch: pytest.MonkeyPatch) -> AsOtherUser:
    """Run without the rights of root in a folder, which becomes the working directory."""

    @contextmanager
    def entered(folder: Path) -> Iterator[None]:
        folder.chmod(0o755)
        monkeypatch.chdir(folder)  # the folders above it are closed to other users
        am_root = os.geteuid() == 0
        if am_root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if am_root:
                os.seteuid(0)

    return entered
