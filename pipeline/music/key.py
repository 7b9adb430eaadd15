"""The key of a track, by correlating its chroma with the profile of every key.

The method is Krumhansl and Schmuckler's (Krumhansl 1990, "Cognitive Foundations of Musical Pitch"), the
profiles are Albrecht and Shanahan's (2013, "The use of large corpora to train a new type of key-finding
algorithm"), which were counted in music rather than asked of listeners and tell a key from its relative and
its fifths better. The agreement of two keys is scored as in MIREX's key detection task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.music.spectra import LOWEST_PITCH, N_PITCHES, Floats

Mode = Literal["major", "minor"]

NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
PROFILES: dict[Mode, tuple[float, ...]] = {  # share of each pitch class, from the tonic up
    "major": (0.238, 0.006, 0.111, 0.006, 0.137, 0.094, 0.016, 0.214, 0.009, 0.080, 0.008, 0.081),
    "minor": (0.220, 0.006, 0.104, 0.123, 0.019, 0.103, 0.012, 0.214, 0.062, 0.022, 0.061, 0.052),
}
# MIDI: below, the spectrum's bins are wider than a semitone; above, there is little but overtones
LOWEST_KEY_PITCH, HIGHEST_KEY_PITCH = 48, 92
FIFTH, RELATIVE, PARALLEL = 0.5, 0.3, 0.2  # MIREX's scores


@dataclass(frozen=True)
class Key:
    """A key of 24; as text "A minor"."""

    tonic: int  # pitch class: 0 is C
    mode: Mode

    def __str__(self) -> str:
        return f"{NAMES[self.tonic]} {self.mode}"


def find_key(pitches: Floats) -> Key:
    """The key of magnitudes per semitone, (N_PITCHES, frames), as in `Spectra.pitches`."""
    chroma = _mean_chroma(pitches)
    chroma -= chroma.mean()
    chroma /= max(float(np.linalg.norm(chroma)), 1e-9)
    keys = (Key(tonic, mode) for mode in PROFILES for tonic in range(12))
    return max(keys, key=lambda key: float(chroma @ _profile(key.tonic, key.mode)))


def key_agreement(a: Key, b: Key) -> float:
    """MIREX's weighted score: 1 the same key, 0.5 a fifth apart, 0.3 relative, 0.2 parallel, otherwise 0."""
    if a.mode == b.mode:
        return {0: 1.0, 5: FIFTH, 7: FIFTH}.get((a.tonic - b.tonic) % 12, 0.0)
    major, minor = (a, b) if a.mode == "major" else (b, a)
    return {0: PARALLEL, 3: RELATIVE}.get((major.tonic - minor.tonic) % 12, 0.0)


def _mean_chroma(pitches: Floats) -> NDArray[np.float64]:
    """(12,), C first: how far each semitone stands out from its two neighbours, averaged over time."""
    compressed = np.sqrt(pitches)  # so that quieter notes count as well
    neighbours = np.zeros_like(compressed)
    neighbours[1:-1] = 0.5 * (compressed[:-2] + compressed[2:])
    clear = np.maximum(0.0, compressed - neighbours).mean(axis=1, dtype=np.float64)
    midi = np.arange(LOWEST_PITCH, LOWEST_PITCH + N_PITCHES)
    inside = (midi >= LOWEST_KEY_PITCH) & (midi <= HIGHEST_KEY_PITCH)
    return np.bincount(midi[inside] % 12, clear[inside], minlength=12).astype(np.float64)


def _profile(tonic: int, mode: Mode) -> NDArray[np.float64]:
    """A key's profile, (12,), without its mean and of unit length."""
    profile = np.roll(PROFILES[mode], tonic)
    profile = profile - profile.mean()
    return np.asarray(profile / np.linalg.norm(profile))
