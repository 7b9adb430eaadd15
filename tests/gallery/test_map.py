"""The map of a gallery."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.gallery.map import HEIGHT, MARGIN, WIDTH, places


def kinds(n: int) -> np.ndarray:
    return np.resize([0, 0, 0, 1, 1, 2], n)


def vectors(n: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around three directions, which are not equally frequent."""
    rng = np.random.default_rng(seed)
    found = np.eye(3, 64)[kinds(n)] + 0.02 * rng.standard_normal((n, 64))
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def test_alike_vectors_lie_near_each_other_and_all_within_the_margins() -> None:
    found = places(vectors(300))
    assert found.min() >= MARGIN - 1e-3
    assert (found.max(axis=0) <= np.array([WIDTH, HEIGHT]) - MARGIN + 1e-3).all()
    distances = np.linalg.norm(found[:, None] - found[None], axis=2)
    same = kinds(300)[:, None] == kinds(300)
    assert distances[same].max() < distances[~same].min()


def test_one_more_vector_hardly_moves_the_others() -> None:
    many = vectors(300)
    moved = np.abs(places(many)[:-1] - places(many[:-1]))
    assert moved.max() < 10


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_vectors_have_places_too(n: int) -> None:
    found = places(vectors(n))
    assert found.shape == (n, 2)
    assert np.isfinite(found).all()


def test_equal_vectors_lie_at_one_place() -> None:
    found = places(np.repeat(vectors(1), 5, axis=0))
    assert np.isfinite(found).all()
    assert (found == found[0]).all()
