"""Bars and section boundaries.

Sections begin at the peaks of the novelty curve, the correlation of the distance matrix with a checkerboard
kernel along its diagonal (Foote 2000, "Automatic audio segmentation using a measure of audio novelty").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.music.spectra import Floats

SECTION_BARS = 4  # half the kernel's width, and the least length of a section
SECTION_PEAK = 1.0  # least novelty of a boundary: standard deviations above the mean


@dataclass(frozen=True)
class Bars:
    """Bar lines and section boundaries, as indices of edges."""

    meter: int  # beats a bar
    phase: int  # edge of the first downbeat: 0 <= phase < meter
    sections: tuple[int, ...]  # downbeats at which a section begins, without the first section's


def find_bars(distances: Floats, meter: int, phase: int) -> Bars:
    """The bars of a track with these beat distances, (beats, beats), beats a bar and first bar line."""
    return Bars(meter, phase, _sections(distances, meter, phase))


def bars_of_pseudo_beats(distances: Floats) -> Bars:
    """Bars of one beat, as no edge is a downbeat; sections as for four beats a bar."""
    return Bars(1, 0, _sections(distances, 4, 0))


def _sections(distances: Floats, meter: int, phase: int) -> tuple[int, ...]:
    """Downbeats at the peaks of novelty, at least SECTION_BARS from each other and from both ends."""
    n, half = distances.shape[0], SECTION_BARS * meter
    downbeats = np.arange(phase, n, meter)
    downbeats = downbeats[(downbeats >= half) & (downbeats <= n - half)]
    if downbeats.size < 3:
        return ()
    taper = np.exp(-0.5 * ((np.arange(-half, half) + 0.5) / (half / 2)) ** 2)
    sign = np.sign(np.arange(-half, half) + 0.5)
    kernel = -np.outer(taper * sign, taper * sign)
    around = [slice(edge - half, edge + half) for edge in downbeats]
    novelty = np.array([(kernel * distances[part, part]).sum() for part in around])
    least = novelty.mean() + SECTION_PEAK * novelty.std()
    chosen: list[int] = []
    for at in np.argsort(-novelty, kind="stable"):
        edge = int(downbeats[at])
        if novelty[at] >= least and all(abs(edge - other) >= half for other in chosen):
            chosen.append(edge)
    return tuple(sorted(chosen))
