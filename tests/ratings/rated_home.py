"""A home with finished tracks whose results can be rated, made without engines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from home_folder import Home
from stored_tracks import StoredTracks

from pipeline.store.schema import Rating


@dataclass(frozen=True)
class RatedHome:
    home: Home
    tracks: StoredTracks

    @classmethod
    def at(cls, folder: Path) -> RatedHome:
        home = Home(folder)
        home.configure()
        return cls(home, StoredTracks.new(folder))

    def track(self, name: str, *results: dict[str, Any]) -> list[dict[str, Any]]:
        """A finished track with these results; returns the entries of `ratings.json` for them, undecided."""
        sha256 = self.tracks.arrived(name, name.encode(), now=1.0)
        track = self.tracks.store.track(sha256)
        assert track is not None
        records = []
        for n, result in enumerate(results, 1):
            file = f"variations/{n:02d}-{result.get('name', 'near')}.wav"
            published = self.tracks.outbox.publish(track.folder, file, f"{name} {n}".encode())
            record = {"name": "near", "engine": "remix", "seed": n, "params": {}, **vars(published), **result}
            records.append(record)
            self.tracks.store.finish_unit(
                f"{sha256} {n}", sha256=sha256, stage="generate", result=record, seconds=1.0, now=1.0
            )
        manifest = {"source": {"name": Path(name).name, "sha256": sha256}, "variations": records}
        self.tracks.outbox.publish_manifest(track.folder, manifest)
        self.tracks.store.finish(sha256, plan_key="p", recipe_key="r", source={}, now=2.0)
        blank = {"stars": None, "kept": None, "note": ""}
        return [{"track": sha256, "file": one["file"], "sha256": one["sha256"], **blank} for one in records]

    def rate(self, entries: list[dict[str, Any]]) -> None:
        self.tracks.store.rate([Rating(**entry) for entry in entries], now=3.0)


def write_ratings(path: Path, entries: list[dict[str, Any]], **others: Any) -> Path:
    path.write_text(json.dumps({"schema": 1, "ratings": entries, **others}))
    return path
