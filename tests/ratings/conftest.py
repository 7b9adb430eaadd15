"""The home with results that the tests of ratings share."""

from __future__ import annotations

from pathlib import Path

import pytest
from rated_home import RatedHome


@pytest.fixture
def rated(tmp_path: Path) -> RatedHome:
    return RatedHome.at(tmp_path / "home")
