"""`reproduce` with a model: the same tokens and bytes, and what of its record matters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from home_folder import Home, run, write_music

pytestmark = pytest.mark.long  # the checkpoint is loaded and quantized by each command


def test_a_take_of_a_model_is_made_again_without_its_state(
    home: Home,
    musicgen_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    isolated: None,
) -> None:
    words = {"name": "words", "prompt": "auto", "temperature": 1.1}
    generate = {"engine": "musicgen", "model": str(musicgen_folder), "duration_s": 1}
    home.configure(words, {"name": "plain", "transpose": 3}, generate=generate)
    write_music(home.inbox / "song.wav")
    assert run(capsys, monkeypatch, home, "once").code == 0
    [made, _] = home.manifest()["variations"]
    assert made["prompt"].startswith("instrumental")
    assert {"torch", "transformers", "numba", "threads", "processor"} <= made["made_with"].keys()
    assert made["made_with"]["device"] == "cpu"
    state = sorted((home.folder / "state").rglob("*"))

    home.configure()  # of another engine
    ended = run(capsys, monkeypatch, home, "reproduce", home.folders[0] / "manifest.json")
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "2 the same, 0 different, 0 can't be tried")
    assert sorted((home.folder / "state").rglob("*")) == state
    ended = run(capsys, monkeypatch, home, "reproduce", home.folders[0] / made["file"])
    assert ended.code == 0, ended.out

    manifest = home.folders[0] / "manifest.json"
    recorded = json.loads(manifest.read_text())
    recorded["variations"][0]["model"] = "no/such-model"
    manifest.write_text(json.dumps(recorded))
    ended = run(capsys, monkeypatch, home, "reproduce", manifest, "--file", made["file"])
    assert ended.code == 2
    assert "no/such-model at sha256:" in ended.out and "is not on this machine: " in ended.out
