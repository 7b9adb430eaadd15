"""The map: vectors in two dimensions, by their principal components (Pearson 1901)."""

from __future__ import annotations

import numpy as np

from pipeline.records import Samples

WIDTH, HEIGHT, MARGIN = 200.0, 120.0, 4.0  # of the drawing, in its own units


def places(vectors: Samples) -> Samples:
    """Where vectors, (n, d), lie on the map, (n, 2): x to the right, y down, within the margins.

    Alike vectors lie near each other. Each axis points to where its largest weight is positive, so that the
    map is not mirrored when a vector is added.
    """
    if len(vectors) < 2:
        return np.full((len(vectors), 2), (WIDTH / 2, HEIGHT / 2), np.float32)
    centred = vectors - vectors.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)  # in the order of rising variance
    axes = axes[:, -1:-3:-1]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])
    found = centred @ axes
    low, high = found.min(axis=0), found.max(axis=0)
    share = (found - low) / np.maximum(high - low, 1e-9)
    return np.asarray(MARGIN + share * (np.array([WIDTH, HEIGHT]) - 2 * MARGIN), np.float32)
