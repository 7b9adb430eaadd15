"""An outbox with a gallery, for tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from home_folder import Home, write_music

from pipeline.cli import main

HOSTILE = "<img src=x onerror=alert(1)>.wav"
BROKEN = "broken.wav"


def made_gallery(folder: Path, *, seconds: float = 3.0, **sections: Any) -> Home:
    """A home with two finished tracks, one of them with a hostile name, and a file that is no sound."""
    home = Home(folder)
    variations = [{"name": "near & <b>far", "count": 2}, {"name": "pick", "keep": "best 1 of 2"}]
    gates = {"rejected": "keep", "max_shared": None}  # of so short a source, takes may be alike
    home.configure(
        *variations, gallery={"enabled": True}, generate={"duration_s": seconds}, gates=gates, **sections
    )
    write_music(home.inbox / HOSTILE, seed=1, seconds=2 * seconds)
    write_music(home.inbox / "song.wav", seed=2, seconds=2 * seconds)
    (home.inbox / BROKEN).write_bytes(b"no sound" * 100)
    process(home, "once")
    return home


def process(home: Home, *words: str) -> int:
    """The command line in this process."""
    before, sys.argv = sys.argv, ["run_pipeline.py", *home.arguments(*words)]
    try:
        return main(default_home=home.folder)
    finally:
        sys.argv = before


def content(home: Home) -> dict[str, Any]:
    """What tracks.js has."""
    text = (home.outbox / "tracks.js").read_text()
    found: dict[str, Any] = json.loads(text.removeprefix("const TRACKS = ").removesuffix(";\n"))
    return found


def rows(home: Home) -> dict[str, dict[str, Any]]:
    """The rows of the list of tracks, by name."""
    return {row["name"]: row for row in content(home)["rows"]}


def page_of(home: Home, name: str) -> Path:
    [folder] = [path for path in home.folders if path.name.startswith(name)]
    return folder / "index.html"
