"""Search among more than a million vectors by usearch (HNSW: Malkov & Yashunin 2018), which is optional.

The index finds more candidates than are wanted, and exact products order them. It is a file beside the
matrix. Vectors that come at the end of the matrix are added to it; after any other change it is made anew,
which takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.fs.atomic import replacing
from pipeline.records import Samples

LARGE_ROWS = 1_000_000
CANDIDATES, LEAST_CANDIDATES = 10, 200  # for each vector that is wanted, and in all


def index_path(matrix: Path) -> Path:
    return matrix.with_suffix(".usearch")


def open_index(path: Path, matrix: Samples, say: Callable[[str], None]) -> Any:
    """The index of the matrix in that file, brought up to date; None if it is small, or without usearch."""
    if len(matrix) <= LARGE_ROWS or find_spec("usearch") is None:
        return None
    from usearch.index import Index

    file, index = index_path(path), Index(ndim=matrix.shape[1], metric="ip", dtype="f16")
    with suppress(RuntimeError):  # there is none, or it is damaged
        index.view(file)  # mapped into memory
    if (n := len(index)) < len(matrix):
        say(f"adding {len(matrix) - n} vectors to the index")
        if n:
            index.load(file)  # what is mapped can't grow
        index.add(range(n, len(matrix)), matrix[n:])
        temporary = path.with_suffix(".part")
        with replacing(file, temporary):
            index.save(temporary)
    return index


def candidates(index: Any, query: Samples, n: int) -> list[int]:
    """Rows that have most of the n most similar vectors among them, in their order."""
    found = index.search(query, max(CANDIDATES * n, LEAST_CANDIDATES))
    return sorted(int(key) for key in found.keys)
