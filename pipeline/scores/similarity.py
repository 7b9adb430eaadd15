"""How similar the harmony and tempo of two tracks are, and one number for all.

Chroma at the same time: audiocraft's chroma cosine similarity (Copet et al. 2023, "Simple and controllable
music generation") with one-hot chroma: the share of the frames whose strongest pitch class is the same.
Chroma anywhere: windows of the variation matched with the whole source by subsequence dynamic time warping
(Müller 2015, "Fundamentals of music processing", 7.2), so that bars in another order still count.
"""

from __future__ import annotations

import numpy as np

from pipeline.music.spectra import Floats
from pipeline.scores.chroma import FRAME_RATE_HZ

WINDOW_FRAMES = round(6.0 * FRAME_RATE_HZ)  # matched as a whole; they overlap by half
FLAT_CHROMA = 0.1  # how far from even a frame with pitch is: white noise has 0.06, music 0.15 and more
BLOCK_WINDOWS = 32  # matched at once
TEMPO_TOLERANCE = 0.04  # Gouyon et al. 2006, "An experimental comparison of audio tempo induction algorithms"
# What unrelated music has: means over 674 pairs of 27 pieces, the embedding's by the engine descriptors. They
# are 0 in the overall similarity.
UNRELATED_CHROMA, UNRELATED_WARPED, UNRELATED_EMBEDDING = 0.09, 0.45, 0.18


def chroma_similarity(source: Floats, made: Floats) -> float | None:
    """Share of the frames with the same strongest pitch class at the same time, 0 to 1.

    Args:
        source, made: chroma, (frames, 12); frames beyond the end of one are left out.

    Returns:
        None if the source is silent; otherwise its silent frames are left out.
    """
    n = min(len(source), len(made))
    is_heard = source[:n].any(axis=1)
    same = (source[:n].argmax(axis=1) == made[:n].argmax(axis=1)) & made[:n].any(axis=1)
    return float(same[is_heard].mean()) if is_heard.any() else None


def warped_similarity(source: Floats, made: Floats) -> float | None:
    """Mean cosine of windows of 6 s with the passages of the source that match them best, -1 to 1.

    The cosine is of the square roots of chroma, so that quieter notes count as well, less their mean, so that
    unrelated notes give 0. Silent frames are like each other and unlike all others; so are those
    of sound without pitch.

    Args:
        source, made: chroma, (frames, 12).

    Returns:
        None if the source has no pitch.
    """
    source, made = _centred(source), _centred(made)
    if not source[:, :12].any():
        return None
    size = min(WINDOW_FRAMES, len(source), len(made))
    starts = np.arange(0, len(made) - size + 1, max(1, size // 2))
    costs = [
        subsequence_costs(made[block[:, None] + np.arange(size)], source)
        for block in np.split(starts, np.arange(BLOCK_WINDOWS, starts.size, BLOCK_WINDOWS))
    ]
    return 1.0 - float(np.concatenate(costs).mean())


def has_pitch(chroma: Floats) -> bool:
    """Whether half of the sound or more has a pitch: noise and most drums have none."""
    centred = _centred(chroma)
    is_pitched, is_flat = centred[:, :12].any(axis=1).sum(), centred[:, 13].sum()
    return bool(is_pitched > 0 and is_pitched >= is_flat)


def _centred(chroma: Floats) -> Floats:
    """(frames, 14) of unit length; the last two are 1 in silence and in sound without pitch, else 0."""
    roots = np.sqrt(chroma)
    roots = roots - roots.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(roots, axis=1, keepdims=True)
    has_pitch = lengths > FLAT_CHROMA
    classes = np.where(has_pitch, roots / np.maximum(lengths, FLAT_CHROMA), 0.0)
    is_silent = ~chroma.any(axis=1, keepdims=True)
    return np.concatenate([classes, is_silent, ~has_pitch & ~is_silent], axis=1, dtype=np.float32)


def subsequence_costs(windows: Floats, source: Floats) -> Floats:
    """Mean cost of a frame in each window's best match in the source, (windows,).

    The cost of two frames is one minus their product. Steps of (1, 1), (1, 2) and (2, 1) frames (window,
    source), the last of which costs double, allow half to double tempo; each frame of a window counts once.

    Args:
        windows: (windows, frames, dims), unit length along dims.
        source: (source frames, dims), likewise.
    """
    before = last = np.full((len(windows), len(source) + 2), np.inf, np.float32)  # with two columns ahead
    for k in range(windows.shape[1]):
        cost = 1.0 - windows[:, k] @ source.T
        total = np.full_like(last, np.inf)
        if k == 0:
            total[:, 2:] = cost
        else:
            one_frame = np.minimum(last[:, 1:-1], last[:, :-2]) + cost
            total[:, 2:] = np.minimum(one_frame, before[:, 1:-1] + 2 * cost)
        before, last = last, total
    return np.asarray(last.min(axis=1) / windows.shape[1])


def tempo_agrees(ratio: float) -> bool:
    """Whether a ratio of tempos is 1, 2 or a half, within 4 %."""
    return any(abs(ratio / times - 1) <= TEMPO_TOLERANCE for times in (0.5, 1.0, 2.0))


def cosine(one: Floats, other: Floats) -> float:
    """Cosine of two vectors, -1 to 1; 0 if one is zero."""
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.dot(one, other)) / lengths if lengths > 0 else 0.0


def overall_similarity(chroma: float | None, warped: float | None, embedding: float | None) -> float:
    """The mean of the similarities that there are, each scaled so that unrelated music has 0: 0 to 1."""
    scaled = [
        max(0.0, (value - unrelated) / (1.0 - unrelated))
        for value, unrelated in (
            (chroma, UNRELATED_CHROMA),
            (warped, UNRELATED_WARPED),
            (embedding, UNRELATED_EMBEDDING),
        )
        if value is not None
    ]
    return sum(scaled) / len(scaled) if scaled else 0.0
