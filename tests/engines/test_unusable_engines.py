"""The command line on checkpoints that can't be loaded: a sentence, an exit code, an untouched inbox."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import need_models
from home_folder import Home, RunResult, run, write_music

Pipeline = Callable[..., RunResult]


@pytest.fixture
def pipeline(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated: None
) -> Pipeline:
    return lambda *words: run(capsys, monkeypatch, home, *words)


@pytest.fixture
def clap_home(home: Home, clap_folder: Path) -> Home:
    """A home with a checkpoint of its own and one track."""
    shutil.copytree(clap_folder, home.folder / "clap")
    home.configure(embed={"engine": "clap", "model": "clap"})
    write_music(home.inbox / "a.wav")
    return home


def refused(home: Home, ended: RunResult) -> str:
    """The error message of a run that must not have changed anything."""
    assert ended.code == 2
    assert [path.name for path in home.inbox.rglob("*")] == ["a.wav"]
    database = home.folder / "state" / "pipeline.db"
    if database.exists():
        store = home.store()
        assert [(track.state, track.attempts) for track in store.tracks()] in ([], [("queued", 0)])
        store.close()
    return ended.err


def test_a_device_that_does_not_exist(
    clap_home: Home, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_models()
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("DEVICE", "cuda")
    assert "device: cuda can't be used" in refused(clap_home, pipeline("once"))
    assert "device: cuda can't be used" in pipeline("doctor").out
    monkeypatch.delenv("DEVICE")
    assert pipeline("once").code == 0


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_weights_that_are_damaged_or_gone_between_two_runs(
    clap_home: Home, pipeline: Pipeline, name: str
) -> None:
    folder, aside = clap_home.folder / "clap", clap_home.folder / "aside"
    shutil.copytree(folder, aside)
    (folder / name).write_bytes(b"torn")
    assert str(folder) in refused(clap_home, pipeline("once"))
    shutil.rmtree(folder)
    assert "clap" in refused(clap_home, pipeline("once"))
    aside.rename(folder)
    assert pipeline("once").code == 0
