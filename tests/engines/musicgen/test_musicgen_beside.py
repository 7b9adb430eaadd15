"""MusicGen with workers beside it, as on a GPU, in the program as people run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from home_folder import Home, contents, run, write_music

from pipeline.app import App

pytestmark = pytest.mark.long  # true processes, which compile the kernels


def test_calls_for_several_workers_give_the_bytes_of_one_process(
    tmp_path: Path,
    musicgen_checkpoint: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    isolated: None,
) -> None:
    """With a prompt from the analysis, and a melody that is found beside the generator."""
    model = str(musicgen_checkpoint("tiny-melody"))

    def results(folder: Path, executor: str) -> dict[str, str]:
        home = Home(folder)
        home.configure(
            {"name": "words", "prompt": "auto"},
            {"name": "filtered", "melody": "harmonic"},
            executor=executor,
            generate={"engine": "musicgen", "model": model, "duration_s": 1},
            gates={"max_shared": None, "retries": 0},
        )
        for seed in range(4):
            write_music(home.inbox / f"{seed}.wav", seed=seed)
        # Not in this process, in which other tests may have set the number of torch's threads.
        ended = home.in_child("once") if executor == "inline" else run(capsys, monkeypatch, home, "once")
        assert ended.code == 0, ended.err
        return contents(home.outbox)

    alone = results(tmp_path / "alone", "inline")
    monkeypatch.setattr(App, "_generates_on_gpu", True)
    assert results(tmp_path / "beside", "process") == alone
    assert sum(name.endswith(".wav") for name in alone) == 8
    log = (tmp_path / "beside" / "state" / "pipeline.log").read_text()
    assert sum(map(int, re.findall(r"a call made (\d+) takes", log))) == 8
