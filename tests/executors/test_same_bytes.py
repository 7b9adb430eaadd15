"""The same batch in every executor."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from home_folder import ROOT, Home, contents, run
from ray_setup import NEEDS_RAY

from pipeline.app import App

pytestmark = pytest.mark.long  # true processes


def prepared(folder: Path, executor: str) -> Home:
    """A home with the bundled track in its inbox."""
    home = Home(folder / executor)
    home.configure(executor=executor, normalize={}, generate={"duration_s": 10})
    shutil.copy(ROOT / "pipeline" / "demo" / "paper-lanterns.ogg", home.inbox)
    return home


def results(folder: Path, executor: str) -> dict[str, str]:
    """Hash of every file that is made of the bundled track, but of the manifest, by name."""
    home = prepared(folder, executor)
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


def test_a_generator_with_workers_beside_it_gives_the_same_bytes(
    tmp_path: Path,
    inline: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    isolated: None,
) -> None:
    monkeypatch.setattr(App, "_generates_on_gpu", True)
    home = prepared(tmp_path, "process")
    ended = run(capsys, monkeypatch, home, "once")
    assert ended.code == 0, ended.err
    assert contents(home.outbox) == inline
    store = home.store()
    [track] = store.tracks()
    worker = store.attempts(track.sha256)[-1].worker
    store.close()
    assert worker and re.fullmatch(r"process \d+ beside process \d+", worker)
