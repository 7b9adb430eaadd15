"""How similar the contexts of two edges are.

A join leaves at edge i and enters at edge j. It is good if the beats before i resemble those before j and
the beats after i resemble those after j. The beats to both sides are therefore compared along the diagonal
of the self-similarity matrix (Foote 1999); the nearest have the largest weights.
"""

from __future__ import annotations

import numpy as np

from pipeline.music.spectra import Floats

CONTEXT_BEATS = 8  # to either side of a join
CONTEXT_FADE = 3.0  # beats: Gaussian width of the context's weights


def join_costs(distances: Floats) -> Floats:
    """Cost of leaving at edge i and entering at edge j, (edges, edges): weighted mean of beat distances.

    Edge i lies before beat i. Near the track's ends only the beats that exist are compared.
    """
    n = distances.shape[0]
    total, weight = np.zeros((n + 1, n + 1), np.float32), np.zeros((n + 1, n + 1), np.float32)
    for beat in range(-CONTEXT_BEATS, CONTEXT_BEATS):
        share = np.float32(np.exp(-0.5 * ((beat + 0.5) / CONTEXT_FADE) ** 2))
        low, high = max(0, -beat), min(n + 1, n - beat)
        if low >= high:
            continue
        inside = slice(low, high)
        shifted = slice(low + beat, high + beat)
        total[inside, inside] += share * distances[shifted, shifted]
        weight[inside, inside] += share
    return np.asarray(total / np.maximum(weight, 1e-9), np.float32)
