"""The vector's dimensions, and the constants that make them comparable.

Centres and spreads (mean and standard deviation) were measured over 37 windows of six pieces, including
the bundled one, and 30 windows of five synthesized bands in three keys and tempos (tests/engines/loops.py);
each piece had the weight of one band. `key` and `tempo` have one centre and one spread for all their
dimensions, so that no key and no tempo is preferred.

A changed number here requires a new VERSION.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LIMIT = 3.0  # spreads, so that a single outlier can't dominate the vector


@dataclass(frozen=True)
class Block:
    """Consecutive dimensions of the vector; the package's table describes them."""

    name: str
    dims: int
    share: float  # of the squared length, over music
    centers: tuple[float, ...]  # one for each dimension, or one for all
    spreads: tuple[float, ...]


# fmt: off
LAYOUT = (
    Block(
        "timbre", 13, 0.22,
        (57.1, 1.86, 8.03, 4.09, 4.98, 1.21, 2.25, 1.04, 2.08, 1.4, 1.11, -0.564, 0.888),
        (25.6, 22.8, 14.3, 10.3, 7.18, 5.91, 5.07, 3.86, 3.59, 3.21, 4.41, 4.73, 3.89),
    ),
    Block(
        "motion", 13, 0.10,
        (20.4, 13.8, 10.2, 8.36, 8.68, 8.33, 7.5, 6.42, 5.8, 6.06, 6.45, 6.59, 5.96),
        (8.57, 7.47, 5.33, 5.81, 5.11, 5.28, 3.72, 2.88, 2.36, 2.5, 2.84, 3.31, 2.99),
    ),
    Block(
        "spectrum", 12, 0.13,
        (-1.87, 1.15, -17.9, 0.735, 0.344, 4.34, 25.8, 30.7, 33.1, 29.4, 23.2, 20.3),
        (0.869, 0.326, 3.32, 0.33, 0.167, 1.7, 8.49, 7.74, 8.45, 8.42, 7.61, 5.54),
    ),
    Block(
        "chords", 15, 0.15,
        (0.274, 0.325, 0.335, 0.221, 0.301, 0.12, 0.139, 0.175, 0.159, 0.0924, 0.262, 0.0584, 3.32, 0.443,
         0.251),
        (0.114, 0.115, 0.0785, 0.0578, 0.0768, 0.0507, 0.109, 0.108, 0.087, 0.0562, 0.0836, 0.0526, 0.117,
         0.173, 0.0856),
    ),
    Block("key", 12, 0.10, (0.0,), (0.0523,)),
    Block("tempo", 24, 0.15, (0.143,), (0.312,)),
    Block("pulse", 5, 0.07, (0.695, 3.93, 1.37, 0.0571, 0.44), (0.147, 0.999, 0.325, 0.0252, 0.0775)),
    Block(
        "dynamics", 6, 0.08,
        (4.34, 4.34, 6.75, 1.12, 0.0941, 14.6),
        (3.15, 1.34, 6.16, 0.489, 0.0877, 1.6),
    ),
)
# fmt: on
DIM = sum(block.dims for block in LAYOUT)


def row(values: Iterable[tuple[float, ...]]) -> NDArray[np.float64]:
    """(DIM,) from each block's values: one for each dimension, or one for all."""
    pairs = zip(values, LAYOUT, strict=True)
    return np.concatenate([np.broadcast_to(value, block.dims) for value, block in pairs])


def scaled(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    """Raw features, (DIM,), centred, in units of their spreads, limited to +-LIMIT and weighted by block."""
    z = (raw - row(block.centers for block in LAYOUT)) / row(block.spreads for block in LAYOUT)
    weights = row(((block.share / block.dims) ** 0.5,) for block in LAYOUT)
    return np.asarray(weights * z / np.sqrt(1 + (z / LIMIT) ** 2))
