"""The cache of vectors: what it has after tracks were finished, made again, collected, lost or damaged."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored_tracks import StoredTracks, claim_due

from pipeline.errors import FolderUnusable
from pipeline.outbox.outbox import EMBEDDING, MANIFEST, VECTORS, Outbox
from pipeline.plan import engine_identity
from pipeline.records import Samples
from pipeline.search import vectors as cache
from pipeline.search.vectors import Vectors, load_vectors

DIM = 8
ENGINE = {"engine": "stub", "model": None, "revision": None, "version": "1"}
IDENTITY = engine_identity("stub", "1", None, None)


def unit(seed: int) -> Samples:
    vector = np.random.default_rng(seed).standard_normal(DIM)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


class CountingOutbox(Outbox):
    """An outbox that counts what is read of it, but for manifests."""

    n_read = 0

    def read(self, folder: str, file: str) -> bytes:
        self.n_read += 1
        return super().read(folder, file)


@dataclass
class Library:
    """Finished tracks with vectors: see `StoredTracks`."""

    stored: StoredTracks
    wanted: dict[tuple[str, str], Samples] = field(default_factory=dict)  # by hash and file
    now: float = 1000.0

    def add(self, name: str, *seeds: int, **changes: Any) -> str:
        """A finished track; the first seed is of its own vector, the others are of its variations'."""
        sha256 = self.stored.arrived(name, name.encode(), now=self.now)
        self.make(sha256, *seeds, **changes)
        return sha256

    def make(self, sha256: str, *seeds: int, **changes: Any) -> None:
        """Finish a queued track with these vectors, in place of earlier ones."""
        self.now += 1.0
        track = self.stored.store.track(sha256)
        assert track is not None
        claim_due(self.stored.store, 100, now=self.now)
        engine = {**ENGINE, **changes}
        files = [f"variations/{n:02d}-v.wav" for n in range(1, len(seeds))]
        rows = [unit(seed) for seed in seeds]
        manifest = {
            "source": {"sha256": sha256},
            "embedding": {**engine, **self._published(track.folder, EMBEDDING, track=rows[0])},
            "variations": [{"file": file, "name": "v", "sha256": "", "bytes": 0} for file in files],
        }
        if files:  # a library that was made without them has none
            published = self._published(track.folder, VECTORS, variations=np.array(rows[1:]))
            manifest["variation_embeddings"] = {**engine, **published}
        self.stored.outbox.publish_manifest(track.folder, manifest)
        self.stored.store.finish(sha256, plan_key="p", recipe_key="r", source={}, now=self.now)
        self.drop(sha256)
        if engine == ENGINE:
            self.wanted |= dict(zip([(sha256, file) for file in ("", *files)], rows, strict=True))

    def drop(self, sha256: str) -> None:
        self.wanted = {key: row for key, row in self.wanted.items() if key[0] != sha256}

    def folder(self, sha256: str) -> Path:
        return self.stored.folder(sha256)

    @property
    def cached(self) -> Path:
        return self.stored.workspace.state / "vectors"

    def load(self) -> Vectors:
        return load_vectors(self.cached, IDENTITY, self.stored.store, self.stored.outbox)

    def check(self) -> None:
        """The cache has the wanted vectors and no others."""
        found = self.load()
        rows = {found.row(n)[:2]: found.matrix[n] for n in range(len(found.rows))}
        assert rows.keys() == self.wanted.keys()
        assert len(rows) == len(found.matrix)
        for key, row in rows.items():
            np.testing.assert_array_equal(row, self.wanted[key])

    def reads(self) -> int:
        """How many files another check reads."""
        outbox = CountingOutbox(self.stored.workspace.outbox_files)
        load_vectors(self.cached, IDENTITY, self.stored.store, outbox)
        return outbox.n_read

    def _published(self, folder: str, file: str, **arrays: Any) -> dict[str, Any]:
        content = io.BytesIO()
        np.savez(content, **arrays)
        return vars(self.stored.outbox.publish(folder, file, content.getvalue()))


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    stored = StoredTracks.new(tmp_path)
    yield Library(stored)
    stored.store.close()


def test_it_has_a_row_for_each_source_and_variation_with_its_name(library: Library) -> None:
    sha256 = library.add("a.wav", 1, 2, 3)
    library.add("b.wav", 4, 5, 6)
    library.check()
    found = library.load()
    assert found.matrix.dtype == np.float32
    assert isinstance(found.matrix, np.memmap)
    assert [found.row(int(n))[2] for n in found.sources] == ["", ""]
    row = found.find(sha256, "variations/02-v.wav")
    assert row is not None
    assert found.row(row) == (sha256, "variations/02-v.wav", "v")
    assert found.find(sha256, "variations/03-v.wav") is None


def test_only_what_is_new_is_read(library: Library) -> None:
    for n in range(3):
        library.add(f"{n}.wav", n, 10 + n)
    assert library.reads() == 6
    assert library.reads() == 0
    library.add("new.wav", 100, 101)
    assert library.reads() == 2
    library.check()


def test_a_track_that_is_made_again_has_its_new_vectors_alone(library: Library) -> None:
    sha256 = library.add("a.wav", 1, 2, 3)
    library.add("b.wav", 4, 5)
    library.check()

    library.stored.store.requeue(sha256, now=library.now)
    before, library.wanted = (
        library.wanted,
        {key: row for key, row in library.wanted.items() if key[0] != sha256},
    )
    library.check()  # while it is queued
    assert len(library.wanted) < len(before)

    library.make(sha256, 6, 7)
    library.check()


def test_what_was_collected_or_forgotten_is_no_longer_in_it(library: Library) -> None:
    collected, forgotten, _ = (library.add(f"{n}.wav", n, n + 10) for n in range(3))
    library.check()
    library.stored.store.set_collected(collected, now=1.0)
    library.drop(collected)
    library.check()
    library.stored.store.forget(forgotten)
    library.drop(forgotten)
    library.check()


def test_the_last_track_can_go_and_another_one_come(library: Library) -> None:
    library.check()
    sha256 = library.add("a.wav", 1)
    library.check()
    library.stored.store.forget(sha256)
    library.drop(sha256)
    library.check()
    library.add("b.wav", 2)
    library.check()


@pytest.mark.parametrize("change", [{"engine": "other"}, {"version": "2"}, {"model": "m", "revision": "r"}])
def test_vectors_of_another_engine_are_left_out_and_read_once(
    library: Library, change: dict[str, str]
) -> None:
    library.add("other.wav", 1, 2, **change)
    sha256 = library.add("a.wav", 3, 4)
    library.check()
    assert library.reads() == 0
    library.stored.store.requeue(sha256, now=library.now)
    library.make(sha256, 5, **change)
    library.check()
    assert library.wanted == {}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: [path.unlink() for path in folder.glob("*.np[yz]")],
        lambda folder: [path.unlink() for path in folder.glob("*.npz")],
        lambda folder: [path.unlink() for path in folder.glob("*.npy")],
        lambda folder: [path.write_bytes(b"") for path in folder.glob("*.npz")],
        lambda folder: [path.write_bytes(path.read_bytes()[:-200]) for path in folder.glob("*.npz")],
        lambda folder: [path.write_bytes(path.read_bytes()[:-20]) for path in folder.glob("*.npy")],
        lambda folder: [path.write_bytes(path.read_bytes()[:-20]) for path in folder.glob("*.rows.npy")],
        lambda folder: [
            np.save(path, np.zeros((1, DIM), np.float32)) for path in folder.glob("*[0-9a-f].npy")
        ],
    ],
    ids=["lost", "no stamp", "no matrix", "empty", "cut", "cut matrix", "cut rows", "fewer rows"],
)
def test_a_lost_or_damaged_cache_is_made_again(library: Library, spoil: Callable[[Path], Any]) -> None:
    library.add("a.wav", 1, 2)
    library.add("b.wav", 3)
    library.check()
    spoil(library.cached)
    library.check()


@pytest.mark.parametrize("after", ["_write_matrix", "_write_rows", "_write_about"])
def test_a_kill_while_it_is_written_costs_only_another_reading(
    library: Library, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    library.add("a.wav", 1, 2)
    sha256 = library.add("b.wav", 3)
    library.check()
    library.stored.store.forget(sha256)
    library.drop(sha256)
    library.add("c.wav", 4)
    write = getattr(cache, after)

    def killed(*args: Any) -> None:
        if after != "_write_about":
            write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cache, after, killed)
        library.load()
    library.check()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / EMBEDDING).write_bytes(b"x"),
        lambda folder: (folder / VECTORS).unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
    ],
    ids=["altered", "missing", "no manifest"],
)
def test_a_track_whose_files_can_not_be_read_is_named_and_tried_again(
    library: Library, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], Any]
) -> None:
    caplog.set_level(logging.WARNING, logger="pipeline")
    library.add("good.wav", 1)
    bad = library.add("bad.wav", 2, 3)
    wanted = dict(library.wanted)
    content = {path: path.read_bytes() for path in library.folder(bad).iterdir() if path.is_file()}
    spoil(library.folder(bad))
    library.drop(bad)
    library.check()
    assert caplog.text.count("its vectors can't be read") == 1
    assert library.folder(bad).name in caplog.text

    for path, before in content.items():
        path.write_bytes(before)
    library.wanted = wanted
    library.check()


def test_a_missing_outbox_is_no_empty_library(library: Library) -> None:
    library.add("a.wav", 1)
    library.stored.outbox.root.rename(library.stored.outbox.root.with_name("away"))
    with pytest.raises(FolderUnusable, match="is missing"):
        library.load()
    library.stored.outbox.root.with_name("away").rename(library.stored.outbox.root)
    library.check()


def test_two_at_once_read_everything_once_and_find_the_same(library: Library) -> None:
    for n in range(20):
        library.add(f"{n}.wav", n, n + 100)
    outbox, found = CountingOutbox(library.stored.workspace.outbox_files), list[int]()

    def load() -> None:
        loaded = load_vectors(library.cached, IDENTITY, library.stored.store, outbox)
        found.append(len(loaded.rows))
        library.stored.store.disconnect()

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [40] * 4
    assert outbox.n_read == 40
    library.check()
