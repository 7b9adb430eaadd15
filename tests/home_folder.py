"""Homes for tests, with short tracks in their inboxes, and the program run in them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml

from pipeline.cli.commands import main
from pipeline.store.store import Store

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_RATE = 22050
NEAR, FAR = {"name": "near", "temperature": 0.4}, {"name": "far", "temperature": 1.0}


@dataclass(frozen=True)
class RunResult:
    """The result of a run of the program."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Home:
    """A home with an inbox and a configuration for the weight-free engines."""

    folder: Path

    @property
    def inbox(self) -> Path:
        return self.folder / "inbox"

    @property
    def outbox(self) -> Path:
        return self.folder / "outbox"

    def configure(
        self, *variations: dict[str, Any], generate: dict[str, Any] | None = None, **sections: Any
    ) -> None:
        """Write the configuration; sections given replace the ones below. Pages have tests of their own."""
        defaults = {
            "engine": "remix",
            "duration_s": 2,
            "variations": list(variations or (NEAR, FAR)),
        }
        config: dict[str, Any] = {
            "executor": "inline",
            "intake": {"settle_s": 0},
            "normalize": {"sample_rate": SAMPLE_RATE},
            "embed": {"engine": "descriptors"},
            "gallery": {"enabled": False},
            "generate": {**defaults, **(generate or {})},
            "retry": {"max_attempts": 1, "backoff_s": 0},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.inbox.mkdir(exist_ok=True)
        (self.folder / "settings.yaml").write_text(yaml.safe_dump({**config, **sections}))

    def arguments(self, *words: str | Path) -> list[str]:
        return ["--home", str(self.folder), "--config", str(self.folder / "settings.yaml"), *map(str, words)]

    def in_child(self, *words: str | Path, env: dict[str, str] | None = None) -> RunResult:
        """run_pipeline.py as people start it."""
        command = [sys.executable, str(ROOT / "run_pipeline.py"), *self.arguments(*words)]
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
        )
        return RunResult(ended.returncode, ended.stdout, ended.stderr)

    @property
    def folders(self) -> list[Path]:
        """The tracks' folders in the outbox."""
        return sorted(path for path in self.outbox.iterdir() if path.is_dir())

    def manifest(self) -> dict[str, Any]:
        """The manifest of the only track."""
        [folder] = self.folders
        loaded: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        return loaded

    def store(self) -> Store:
        return Store(self.folder / "state" / "pipeline.db", read_only=True)

    def finished_at(self, *stages: str) -> dict[str, float]:
        """When each unit of work was finished, by key; of these stages only, if any are given."""
        store = self.store()
        units = [unit for track in store.tracks() for unit in store.units_of(track.sha256)]
        store.close()
        return {unit["key"]: unit["finished_at"] for unit in units if not stages or unit["stage"] in stages}


def run(capsys: Any, monkeypatch: Any, home: Home, *words: str | Path) -> RunResult:
    """The command line in this process."""
    monkeypatch.setattr(sys, "argv", ["run_pipeline.py", *home.arguments(*words)])
    capsys.readouterr()
    code = main(default_home=home.folder)
    out, err = capsys.readouterr()
    return RunResult(code, out, err)


def write_music(path: Path, *, seed: int = 0, seconds: float = 3.0) -> Path:
    """Two chords in turn under a beat at 120 a minute, stereo, 16 bits; `seed` sets pitch and noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    root = 110.0 * 2 ** (seed % 12 / 12)
    chord = np.where((t % 2.0 < 1.0), 1.0, 4 / 3) * root
    phase = 2 * np.pi * np.cumsum(chord) / SAMPLE_RATE
    tones = sum(np.sin(phase * ratio) for ratio in (1.0, 1.25, 1.5)) / 3
    beat = rng.standard_normal(len(t)) * np.exp(-((t % 0.5) / 0.03))
    left, right = 0.3 * tones + 0.2 * beat, 0.25 * tones + 0.25 * beat
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([left, right], axis=1), SAMPLE_RATE, subtype="PCM_16")
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder but the manifest and the pages, which have a date, by name."""
    dated = ("manifest.json", "index.html", "tracks.js")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in dated)
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}
