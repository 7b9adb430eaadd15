"""The index of usearch against exact search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.records import Samples
from pipeline.search import large
from pipeline.search.large import candidates, index_path, open_index
from pipeline.search.nearest import nearest

DIM, N_GROUPS = 24, 60


@pytest.fixture(autouse=True)
def _usearch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch.index", reason="usearch is not in the core install")
    monkeypatch.setattr(large, "LARGE_ROWS", 500)


def grouped(n: int, *, seed: int = 0) -> Samples:
    """Vectors in groups, as those of similar sounds are."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((N_GROUPS, DIM))
    rows = centers[rng.integers(0, N_GROUPS, n)] + 0.7 * rng.standard_normal((n, DIM))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def said(path: Path, matrix: Samples) -> list[str]:
    lines: list[str] = []
    index = open_index(path, matrix, lines.append)
    assert len(index) == len(matrix)
    return lines


def test_nearly_all_of_the_nearest_are_found_with_their_exact_similarities(tmp_path: Path) -> None:
    matrix = grouped(3000)
    index, n_same = open_index(tmp_path / "m.npy", matrix, print), 0
    for query in grouped(50, seed=1):
        exact = dict(nearest(matrix, query, 10))
        found = dict(nearest(matrix, query, 10, among=candidates(index, query, 10)))
        n_same += len(exact.keys() & found.keys())
        assert list(found.values()) == sorted(found.values(), reverse=True)
        np.testing.assert_allclose([*found.values()], matrix[[*found]] @ query, atol=1e-6)
    assert n_same >= 0.95 * 500


def test_only_what_is_new_is_added(tmp_path: Path) -> None:
    path, matrix = tmp_path / "m.npy", grouped(700)
    assert said(path, matrix[:600]) == ["adding 600 vectors to the index"]
    assert said(path, matrix[:600]) == []
    assert said(path, matrix) == ["adding 100 vectors to the index"]
    assert [one.name for one in tmp_path.iterdir()] == [index_path(path).name]
    index_path(path).write_bytes(b"damaged")
    assert said(path, matrix) == ["adding 700 vectors to the index"]
    index = open_index(path, matrix, print)
    assert 650 in candidates(index, matrix[650], 1)


def test_few_vectors_have_none(tmp_path: Path) -> None:
    assert open_index(tmp_path / "m.npy", grouped(500), print) is None
    assert list(tmp_path.iterdir()) == []
