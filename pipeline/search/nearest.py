"""The nearest vectors to one, and pairs of near duplicates: exact, by products of unit vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.records import Samples

TILE = 2048  # rows on each side of a product
SMALLEST = 1e-6  # length of a sum of vectors below which it has no direction


def combined(added: Sequence[Samples], subtracted: Sequence[Samples]) -> Samples | None:
    """The sum of unit vectors, (d,), less that of others, at length 1; None if nothing is left of it."""
    total = np.sum([*added, *(-vector for vector in subtracted)], axis=0, dtype=np.float64)
    length = float(np.linalg.norm(total))
    return np.asarray(total / length, np.float32) if length > SMALLEST else None


def nearest(
    matrix: Samples,
    query: Samples,
    n: int,
    *,
    without: Sequence[int] = (),
    among: Sequence[int] | None = None,
) -> list[tuple[int, float]]:
    """The rows of a matrix, (n, d), most similar to a query, (d,), best first, with their cosines.

    Args:
        without: rows that are left out.
        among: the rows that are compared, rising; default: all.
    """
    distances = -((matrix if among is None else matrix[among]) @ query)
    out = [*set(without)] if among is None else np.flatnonzero(np.isin(among, [*without]))
    distances[out] = np.inf
    n = min(n, len(distances) - len(out))
    if n <= 0:
        return []
    best = np.argpartition(distances, n - 1)[:n]
    ordered = best[np.lexsort((best, distances[best]))]
    return [(int(one if among is None else among[one]), -float(distances[one])) for one in ordered]


def near_duplicates(matrix: Samples, rows: NDArray[np.intp], above: float) -> list[tuple[int, int, float]]:
    """Pairs of those rows of a matrix whose cosine is at least `above`, best first; tile by tile."""
    pairs: list[tuple[int, int, float]] = []
    for i in range(0, len(rows), TILE):
        left = matrix[rows[i : i + TILE]]
        for j in range(i, len(rows), TILE):
            products = left @ matrix[rows[j : j + TILE]].T
            is_pair = np.triu(products >= above, k=1) if i == j else products >= above
            for a, b in np.argwhere(is_pair):
                pairs.append((int(rows[i + a]), int(rows[j + b]), float(products[a, b])))
    return sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))
