"""The time of a search among many vectors, from the cache on the disk to the names of what was found.

    python bench/search.py [--rows 100000] [--dim 512]

The library is made up: a database and a cache of vectors as `similar` leaves them, with four variations a
track. Every search opens both anew, as the command does; the start of Python and its imports come on top. Its
peer is the product of the matrix and the query alone, with the matrix in memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.app import App  # noqa: E402
from pipeline.cli.similar import Library, similar_facts  # noqa: E402
from pipeline.plan import digest, engine_identity  # noqa: E402
from pipeline.search import vectors as cache  # noqa: E402
from pipeline.store.schema import Track, TrackState  # noqa: E402

PER_TRACK = 5  # rows: the source and its variations
TIMES = 20


def make(app: App, n_rows: int, dim: int) -> None:
    """The database and the cache."""
    store, choice = app.open_store(), app.choice("embed")
    rng, tracks = np.random.default_rng(0), [digest(n) for n in range(n_rows // PER_TRACK)]
    with store.transaction():
        for n, sha256 in enumerate(tracks):
            store.restore(
                Track(
                    sha256=sha256,
                    name=f"track {n}.wav",
                    folder=f"track {n}--{sha256[:8]}",
                    state=TrackState.DONE,
                    bytes=1,
                    finished_at=1e9 + n,
                    plan_key="p",
                    source={"duration_s": 180.0, "sample_rate": 44100, "channels": 2, "codec": "flac"},
                    queued_at=0.0,
                    attempts=0,
                    not_before=0.0,
                    stage=None,
                    error=None,
                ),
                {},
                now=1e9,
            )
    new = []
    for sha256 in tracks:
        rows = rng.standard_normal((PER_TRACK, dim)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        files = ["", *(f"variations/{n:02d}-faithful.wav" for n in range(1, PER_TRACK))]
        new += [
            ((sha256, file, "faithful" if file else ""), row) for file, row in zip(files, rows, strict=True)
        ]
    folder = app.workspace.vectors
    folder.mkdir()
    identity = engine_identity(choice.card.name, choice.card.version, choice.model, choice.revision)
    path, finished = cache._path(folder, identity), {one: at for one, (_, at) in store.finished().items()}
    cache._write_matrix(path, cache._nothing().matrix, np.zeros(0, bool), [vector for _, vector in new])
    cache._write_rows(path, cache._as_rows([row for row, _ in new]))
    cache._write_about(path, finished, store.ended_stamp())
    store.close()


def timed(work: Callable[[], object], n: int = TIMES) -> str:
    """Median and worst."""
    times = []
    for _ in range(n):
        began_s = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began_s))
    return f"{statistics.median(times):.1f} ms, at most {max(times):.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "config").mkdir()
        (home / "config" / "default.yaml").write_text("embed: {engine: descriptors}\n")
        app = App.open(home, None)
        app.workspace.prepare()
        make(app, options.rows, options.dim)

        def search() -> None:
            library = Library.open(app, print)
            found = similar_facts(library, ["track 7.wav"], [], texts=[], unwanted_texts=[], top=10)
            if len(found) != 10:
                raise SystemExit(f"{len(found)} found")

        library = Library.open(app, print)
        matrix = np.array(library.vectors.matrix)
        print(f"{len(matrix)} rows of {options.dim}, {len(matrix) // PER_TRACK} tracks")
        print(f"search with start-up  {timed(search)}")
        print(f"the product alone     {timed(lambda: matrix @ matrix[7])}")
        store = app.open_store()
        store.forget(library.vectors.row(0)[0])
        began_s = time.perf_counter()
        search()
        print(f"search after a track was removed: {1e3 * (time.perf_counter() - began_s):.0f} ms")
        store.close()


if __name__ == "__main__":
    main()
