"""Copied passages are found at any level and place, and after MP3; other performances are none."""

from __future__ import annotations

import numpy as np
import pytest
from tunes import RATE, changed, joined, noise, part, play, silence, through_mp3

from pipeline.records import Audio
from pipeline.scores import Source, analyse_source, score, shared_share


@pytest.fixture(scope="module")
def source() -> Source:
    return analyse_source(play())


@pytest.mark.parametrize(
    "copy",
    [
        play(),
        changed(play(), gain=0.5),
        changed(play(), gain=4.0),
        through_mp3(play()),
        Audio(np.pad(play().samples, ((0, 0), (154, 0))), RATE),
    ],
    ids=["same", "quieter", "clipped", "mp3", "7 ms late"],
)
def test_a_copy_is_found_whatever_its_level_and_coding(source: Source, copy: Audio) -> None:
    result = score(source, copy)
    assert result.copy_share > 0.97
    assert result.copy_longest_s == pytest.approx(16.0, abs=0.5)


@pytest.mark.parametrize(
    "audio", [play(tune=5, transpose=6), noise(), silence()], ids=["other music", "noise", "silence"]
)
def test_other_sounds_are_no_copies(source: Source, audio: Audio) -> None:
    result = score(source, audio)
    assert (result.copy_longest_s, result.copy_share) == (0.0, 0.0)


def test_the_same_notes_on_another_instrument_are_no_copy() -> None:
    original = analyse_source(play(drums=False))
    assert score(original, play(drums=False, instrument="organ")).copy_share == 0.0


def test_a_passage_is_found_wherever_it_is_from_and_goes_to(source: Source) -> None:
    passage = part(play(), 9.3, 14.3)
    result = score(source, joined(part(play(tune=5, transpose=6), 0, 6.1), passage, noise(3.0)))
    assert result.copy_longest_s == pytest.approx(5.0, abs=1.0)
    assert result.copy_share == pytest.approx(5.0 / 14.1, abs=0.07)


def test_passages_are_counted_apart_where_they_are_joined_otherwise(source: Source) -> None:
    result = score(source, joined(part(play(), 10.0, 15.0), part(play(), 2.3, 9.1)))
    assert result.copy_longest_s == pytest.approx(6.8, abs=1.0)
    assert result.copy_share > 0.9


def test_two_takes_share_what_they_have_at_the_same_time() -> None:
    one = analyse_source(play())
    half = analyse_source(joined(part(play(), 0.0, 8.0), part(play(tune=5, transpose=6), 8.0, 16.0)))
    later = analyse_source(joined(part(play(), 7.0, 16.0), part(play(), 0.0, 7.0)))
    assert shared_share(one.fingerprint, one.fingerprint) > 0.97
    assert shared_share(one.fingerprint, half.fingerprint) == pytest.approx(0.5, abs=0.05)
    assert shared_share(one.fingerprint, later.fingerprint) < 0.1
