"""The words of a prompt made from a track's analysis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.music.key import Key
from pipeline.music.spectra import Floats
from pipeline.music.words import describe


@pytest.mark.parametrize(
    ("tempo_bpm", "mode", "expected"),
    [
        (160.2, "major", "instrumental, happy, fast, 160 bpm, A major"),
        (160.0, "minor", "instrumental, tense, fast, 160 bpm, A minor"),
        (70.0, "major", "instrumental, serene, slow, 70 bpm, A major"),
        (70.0, "minor", "instrumental, melancholic, slow, 70 bpm, A minor"),
        (105.0, "minor", "instrumental, 105 bpm, A minor"),
        (None, "minor", "instrumental, A minor"),
    ],
)
def test_tempo_and_mode_give_pace_and_mood(tempo_bpm: float | None, mode: str, expected: str) -> None:
    assert describe(tempo_bpm, Key(9, mode), None, None) == expected  # type: ignore[arg-type]


def test_nothing_is_made_up_about_sound_without_beat_and_key() -> None:
    assert describe(None, None, None, None) == "instrumental"


def test_the_tags_are_those_whose_texts_are_nearest_to_the_track() -> None:
    def texts(asked: Sequence[str]) -> Floats:
        """A vector per text: its cosine with the track's is what the wanted ones deserve."""
        wanted = {"jazz music": 0.9, "music with piano": 0.8, "music with saxophone": 0.7}
        cosines = np.array([wanted.get(text, 0.1) for text in asked], np.float32)
        return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)

    track = np.array([1.0, 0.0], np.float32)
    assert describe(None, None, track, texts) == "instrumental, jazz, piano, saxophone"
