"""SIGKILL of the whole program while MusicGen makes tokens: the next run resumes, with the same results."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from home_folder import ROOT, Home, contents, write_music
from ray_setup import NEEDS_RAY

TIMEOUT_S = 300.0  # ends a test that would hang


def configured(folder: Path, model: Path, executor: str) -> Home:
    home = Home(folder)
    home.configure(
        {"name": "near", "temperature": 0.6, "count": 2},
        {"name": "far", "guidance": 1.0},
        generate={"engine": "musicgen", "model": str(model), "duration_s": 15},
        retry={"max_attempts": 3, "backoff_s": 0},
        executor=executor,
    )
    write_music(home.inbox / "song.wav")
    return home


def kill_when_all_variations_have_savepoints(home: Home, variations: int) -> None:
    command = [sys.executable, str(ROOT / "run_pipeline.py"), *home.arguments("once")]
    tokens = home.folder / "state" / "engines" / "musicgen" / "unfinished"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        until = time.monotonic() + TIMEOUT_S
        while len(list(tokens.glob("*.npz"))) < variations:
            assert child.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL


def sounds(home: Home) -> dict[str, str]:
    (folder,) = home.folders
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".wav")}


@pytest.mark.long
@pytest.mark.parametrize("executor", ["inline", "process", pytest.param("ray", marks=NEEDS_RAY)])
def test_a_killed_run_is_resumed_and_gives_the_same_files(
    musicgen_folder: Any, tmp_path: Path, executor: str
) -> None:
    """The same as a whole run in the program's own process."""
    whole = configured(tmp_path / "whole", musicgen_folder, "inline")
    home = configured(tmp_path / "killed", musicgen_folder, executor)
    ended = whole.in_child("once")
    assert ended.code == 0, ended.err

    kill_when_all_variations_have_savepoints(home, variations=3)
    again = home.in_child("once")
    assert again.code == 0, again.err
    assert sounds(home) == sounds(whole)
    assert len(sounds(home)) == 3
    assert not list((home.folder / "state" / "engines" / "musicgen" / "unfinished").iterdir())
