"""The embedder: cuts a track into windows and combines their vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.base import StopFn, check_stop
from pipeline.engines.descriptors.features import RATE_HZ, raw_features
from pipeline.engines.descriptors.layout import DIM, VERSION, scaled
from pipeline.records import Audio, Embedding

WINDOW_S = 10.0
SHORTEST_S = 5.0  # a shorter tail joins the window before it


class DescriptorsEmbedder:
    """An `Embedder`: see `pipeline.engines.base`."""

    name = "descriptors"
    version = VERSION
    dim = DIM

    def embed(self, audio: Audio, *, should_stop: StopFn) -> Embedding:
        """Embed one track of any rate, length and number of channels.

        Raises:
            Stopped: at most one window after `should_stop` turned true.
        """
        from pipeline.audio import resample

        mono = resample(Audio(audio.mono()[None], audio.sample_rate), RATE_HZ).samples[0]
        edges = window_edges(mono.size)
        rows = []
        for start, stop in edges:
            check_stop(should_stop, "descriptors")
            rows.append(unit(scaled(raw_features(mono[start:stop]))))
        windows = np.stack(rows)
        times_s = np.minimum(np.array(edges) / RATE_HZ, audio.duration_s)
        return Embedding(
            track=unit(np.diff(edges, axis=1)[:, 0] @ windows).astype(np.float32),
            windows=windows.astype(np.float32),
            times_s=times_s.astype(np.float32),
        )


def unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scaled to length 1."""
    return np.asarray(vector / np.linalg.norm(vector))


def window_edges(n_samples: int) -> list[tuple[int, int]]:
    """First and last sample (exclusive) of each window at RATE_HZ; see the package for the tail."""
    size, shortest = round(WINDOW_S * RATE_HZ), round(SHORTEST_S * RATE_HZ)
    starts = list(range(0, max(1, n_samples - shortest + 1), size))
    return list(zip(starts, [*starts[1:], n_samples], strict=True))
