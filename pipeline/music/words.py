"""A prompt in words, made from the analysis of a track: mood, tempo, key, and tags found by a model.

Fast music in major is heard as happy, fast in minor as tense, slow in major as serene and slow in minor as
melancholic (Gabrielsson and Lindström 2010, "The role of structure in the musical expression of emotions").
Tags are chosen by zero-shot classification (Radford et al. 2021; Wu et al. 2023 for sound): the texts whose
vectors are nearest to that of the track.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.music.key import Key
from pipeline.music.spectra import Floats

SLOW_BPM, FAST_BPM = 90.0, 120.0
MOODS = {("fast", "major"): "happy", ("fast", "minor"): "tense"}
MOODS |= {("slow", "major"): "serene", ("slow", "minor"): "melancholic"}
GENRES = (
    *("ambient", "blues", "classical", "country", "disco", "drum and bass", "electronic", "folk", "funk"),
    *("hip hop", "house", "jazz", "latin", "metal", "new age", "orchestral film", "pop", "reggae", "rock"),
    *("soul", "techno", "trance", "chiptune video game"),
)
INSTRUMENTS = (
    *("acoustic guitar", "bass guitar", "bells", "brass", "cello", "choir", "distorted electric guitar"),
    *("drum machine", "drum kit", "electric piano", "flute", "harp", "organ", "percussion", "piano"),
    *("saxophone", "string section", "synthesizer pad", "synthesizer lead", "trumpet", "violin"),
)
TAGS = (("{} music", GENRES, 1), ("music with {}", INSTRUMENTS, 2))  # text, choices, how many are taken

TextsFn = Callable[[Sequence[str]], Floats]  # vectors of texts, (texts, d), unit length


def describe(tempo_bpm: float | None, key: Key | None, vector: Floats | None, texts: TextsFn | None) -> str:
    """The words, separated by commas.

    Args:
        vector: of the track, (d,), by the model of `texts`; None: without tags.
    """
    pace = None
    if tempo_bpm is not None:
        pace = "fast" if tempo_bpm >= FAST_BPM else "slow" if tempo_bpm <= SLOW_BPM else None
    words = ["instrumental"]
    if vector is not None and texts is not None:
        words += [tag for text, choices, n in TAGS for tag in _nearest(vector, text, choices, n, texts)]
    if pace and key:
        words.append(MOODS[pace, key.mode])
    if pace:
        words.append(pace)
    if tempo_bpm is not None:
        words.append(f"{tempo_bpm:.0f} bpm")
    if key:
        words.append(str(key))
    return ", ".join(words)


def _nearest(vector: Floats, text: str, choices: Sequence[str], n: int, texts: TextsFn) -> list[str]:
    cosines = texts([text.format(choice) for choice in choices]) @ vector
    return [choices[at] for at in np.argsort(-cosines, kind="stable")[:n]]
