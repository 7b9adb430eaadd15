"""Records made again from manifests: what is not finished, has no keys or is known is only reported."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stored_tracks import StoredTracks, a_manifest

from pipeline.config import Retention
from pipeline.maintenance.rebuild import rebuild
from pipeline.maintenance.reconcile import has_source
from pipeline.maintenance.retention import collect
from pipeline.outbox.outbox import MANIFEST, Published

NOW = 1_700_000_000.0
FOLDER = "a--" + "1" * 8
FILES = [Published(name, "0" * 64, 10) for name in ("embedding.npz", "variations/01-a.wav")]


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[StoredTracks]:
    made = StoredTracks.new(tmp_path)
    yield made
    made.store.close()


def complete(**changes: Any) -> dict[str, Any]:
    made = a_manifest("1" * 64, FILES)
    made["source"] |= {"name": "a.wav", "bytes": 5, "codec": "flac"}
    keys = {"plan": "p", "normalize": "n", "embed": "e", "generate": ["g"]}
    created_at = "2026-11-26T12:00:00+00:00"
    return {**made, "normalized": {"sample_rate": 44100}, "keys": keys, "created_at": created_at, **changes}


def said(stored: StoredTracks) -> list[tuple[str, bool]]:
    return [(one.text, one.mended) for one in rebuild(stored.store, stored.outbox, stored.workspace, now=NOW)]


def test_a_finished_track_is_recorded_once_with_its_units(stored: StoredTracks) -> None:
    stored.outbox.publish_manifest(FOLDER, complete())

    assert said(stored) == [("1 variations recorded", True)]
    assert said(stored) == []

    track = stored.store.track("1" * 64)
    assert track is not None
    assert (track.state, track.plan_key, track.folder, track.bytes) == ("done", "p", FOLDER, 5)
    assert track.source == {"codec": "flac"}
    assert track.finished_at == 1_795_694_400.0
    assert stored.store.unit("n") == {"source": {"codec": "flac"}, "sample_rate": 44100}
    assert (stored.store.unit("g") or {})["file"] == "variations/01-a.wav"


def test_the_vectors_of_the_variations_are_recorded_if_there_are_any(stored: StoredTracks) -> None:
    keys = {**complete()["keys"], "embed_variations": "v"}
    stored.outbox.publish_manifest(
        FOLDER, complete(keys=keys, variation_embeddings={"file": "variations.npz"})
    )
    assert said(stored) == [("1 variations recorded", True)]
    assert stored.store.unit("v") == {"file": "variations.npz"}
    assert [one["stage"] for one in stored.store.units_of("1" * 64) if one["key"] == "v"] == [
        "embed-variations"
    ]


@pytest.mark.parametrize(
    "changes", [{"keys": None}, {"keys": {}}, {"created_at": "today"}, {"variations": []}]
)
def test_a_manifest_that_lacks_something_is_reported(stored: StoredTracks, changes: dict[str, Any]) -> None:
    stored.outbox.publish_manifest(FOLDER, complete(**changes))
    [(text, mended)] = said(stored)
    assert "has no keys" in text
    assert not mended
    assert stored.store.tracks() == []


def test_a_folder_without_a_manifest_is_not_finished(stored: StoredTracks) -> None:
    stored.outbox.publish_manifest(FOLDER, complete())
    (stored.outbox.root / FOLDER / MANIFEST).unlink()
    assert said(stored) == [("has no manifest.json, so it is not finished", False)]


def test_sources_in_the_archive_are_recorded_again_by_their_hash(stored: StoredTracks) -> None:
    sha256 = hashlib.sha256(b"sound").hexdigest()
    made = complete()
    stored.outbox.publish_manifest(FOLDER, {**made, "source": {**made["source"], "sha256": sha256}})
    done = stored.workspace.inbox / "done"
    for name, content in (("sub/a.wav", b"sound"), ("other.wav", b"other"), ("longer.wav", b"no sound")):
        (done / name).parent.mkdir(parents=True, exist_ok=True)
        (done / name).write_bytes(content)

    for _ in range(2):  # the second time nothing changes
        said(stored)
        [file] = stored.store.files_below(stored.workspace.inbox)
        assert (file.path, file.moved_to) == (stored.workspace.inbox / "sub/a.wav", done / "sub/a.wav")
        assert (file.sha256, file.state) == (sha256, "settled")

    [track] = stored.store.tracks()
    assert track.state == "done" and has_source(track, stored.store, stored.workspace)
    wanted = Retention(archive_days=0.0)
    removals = collect(stored.store, stored.workspace, wanted, now=time.time() + 1.0, dry_run=False)
    assert [removal.path for removal in removals] == [done / "sub/a.wav"]
