"""The nearest vectors against sorted products, and near duplicates against all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.records import Samples
from pipeline.search import nearest as module
from pipeline.search.nearest import combined, near_duplicates, nearest


def units(n: int, dim: int = 16, *, seed: int = 0) -> Samples:
    rows = np.random.default_rng(seed).standard_normal((n, dim))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize("n", [1, 5, 199, 200, 1000])
def test_the_nearest_are_the_first_of_all_in_order(n: int) -> None:
    matrix, query = units(200), units(1, seed=1)[0]
    order = np.argsort(-(matrix.astype(np.float64) @ query))
    found = nearest(matrix, query, n)
    assert [row for row, _ in found] == order[:n].tolist()
    np.testing.assert_allclose([one for _, one in found], matrix[order[:n]] @ query, rtol=1e-5)


def test_what_is_left_out_is_not_found() -> None:
    matrix = units(20)
    assert [row for row, _ in nearest(matrix, matrix[3], 20, without=[3, 7, 3])] == [
        row for row, _ in nearest(matrix, matrix[3], 20) if row not in (3, 7)
    ]
    assert nearest(matrix[:1], matrix[0], 5, without=[0]) == []


def test_equal_ones_are_in_the_order_of_their_rows() -> None:
    matrix = np.repeat(units(2), 3, axis=0)
    assert [row for row, _ in nearest(matrix, matrix[3], 4)] == [3, 4, 5, 0]


def test_queries_are_added_and_subtracted_with_the_same_weight() -> None:
    x, y, z = np.eye(3, dtype=np.float32)
    found, opposite = combined([x, y], [z]), combined([], [x])
    assert found is not None
    assert opposite is not None
    np.testing.assert_allclose(found, np.array([1, 1, -1]) / np.sqrt(3), atol=1e-7)
    np.testing.assert_array_equal(opposite, -x)
    assert combined([x], [x]) is None


@pytest.mark.parametrize("n", [2, 5, 64, 100])
def test_near_duplicates_are_all_pairs_above_the_limit_once(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 16)
    matrix = units(n + 10, dim=3)
    rows = np.arange(10, n + 10)
    products = np.round(matrix.astype(np.float64) @ matrix.T, 9)
    wanted = {(a, b) for a in rows for b in rows if a < b and products[a, b] >= 0.9}
    found = near_duplicates(matrix, rows, 0.9)
    assert {(a, b) for a, b, _ in found} == wanted
    assert len(found) == len(wanted)
    assert [one for *_, one in found] == sorted((one for *_, one in found), reverse=True)
