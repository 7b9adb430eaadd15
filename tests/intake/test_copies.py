"""Names that programs give to copies."""

from __future__ import annotations

import pytest

from pipeline.intake.copies import is_conflict_copy, is_plainer

CONFLICTS = [
    "song (conflicted copy 2024-01-01).wav",
    "song (conflicted copy 2024-01-01 123456).wav",
    "song (Anna's conflicted copy 2024-01-01).wav",
    "song (in Konflikt stehende Kopie von Anna 2024-01-01).wav",
    "song.sync-conflict-20240101-123456-ABCDEFG.wav",
    "song_conflict-20240101-123456.wav",
    "song_DiskStation_Jan-01-1234-2024_Conflict.wav",
    "song (SFConflict anna@example.org 2024-01-01-12-00-00).wav",
]
COPIES = [
    "song copy.wav",
    "song copy 2.wav",
    "song - Copy.wav",
    "song - Copy (2).wav",
    "Copy of song.wav",
    "Copy (2) of song.wav",
    "Kopie von song.wav",
    "song Kopie.wav",
    "song (copy).wav",
    "song (another copy).wav",
    "song (3rd copy).wav",
    "song (1).wav",
    "song(1).wav",
    "song 2.wav",
    "song-LAPTOP.wav",
]


@pytest.mark.parametrize("name", [*CONFLICTS, *COPIES])
def test_the_name_without_a_copys_addition_is_the_plainer(name: str) -> None:
    assert is_plainer("song.wav", name)
    assert not is_plainer(name, "song.wav")
    assert is_plainer("Song.WAV", name.upper())


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_copy_of_a_copy_is_less_plain_than_the_copy(name: str) -> None:
    assert is_plainer(name, name.replace(".wav", " copy.wav"))


@pytest.mark.parametrize("name", ["(1).wav", "copy.wav", "photocopy.wav", "conflict.wav", "a (live).wav"])
def test_a_name_that_is_nothing_but_a_copys_addition_is_a_plain_name(name: str) -> None:
    assert not is_plainer("zzz.wav", name)
    assert not is_conflict_copy(name)


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflict_copies_are_told_from_other_copies(name: str) -> None:
    assert is_conflict_copy(name)
    assert is_conflict_copy(name.upper())


@pytest.mark.parametrize("name", [*COPIES, "song.wav", "song (conflict of interest).wav"])
def test_other_names_are_no_conflict_copies(name: str) -> None:
    assert not is_conflict_copy(name)
