"""The same batch in every executor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from home_folder import ROOT, Home, contents
from ray_setup import NEEDS_RAY

pytestmark = pytest.mark.long  # true processes


def results(folder: Path, executor: str) -> dict[str, str]:
    """Hash of every file that is made of the bundled track, but of the manifest, by name."""
    home = Home(folder / executor)
    home.configure(executor=executor, normalize={}, generate={"duration_s": 10})
    shutil.copy(ROOT / "pipeline" / "demo" / "paper-lanterns.ogg", home.inbox)
    ended = home.in_child("once")
    assert ended.code == 0, ended.err
    return contents(home.outbox)


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return results(tmp_path_factory.mktemp("same"), "inline")


@pytest.mark.parametrize("executor", ["process", pytest.param("ray", marks=NEEDS_RAY)])
def test_every_executor_gives_the_same_bytes(tmp_path: Path, inline: dict[str, str], executor: str) -> None:
    assert len(inline) == 4  # two variations, their embedding and that of the track
    assert results(tmp_path, executor) == inline
