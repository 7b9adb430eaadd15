"""Beats, bar lines, meter and key of synthesized pieces, compared with what was written."""

from __future__ import annotations

from functools import cache

import mir_eval
import numpy as np
import pieces
import pytest

from pipeline.music.beats import Beats, track_beats
from pipeline.music.key import Key, find_key
from pipeline.music.spectra import compute_spectra

WRITTEN = [  # style, beats per minute, form
    ("rock", 96.0, "AAB"), ("house", 124.0, "AAB"), ("breakbeat", 171.0, "AABB"),
    ("tresillo", 160.0, "AABB"), ("tresillo", 76.0, "AB"), ("dotted", 182.0, "AABB"),
    ("dotted", 107.0, "AAB"),
    ("metal", 145.0, "AAB"), ("chiptune", 150.0, "AAB"), ("arpeggio", 62.0, "AB"), ("ballad", 60.0, "AB"),
    ("strings", 90.0, "AAB"), ("swing", 190.0, "AABB"), ("shuffle", 113.0, "AAB"),
    ("waltz", 160.0, "AABB"),
    ("jazz waltz", 100.0, "AAB"), ("three", 110.0, "AAB"), ("six eight", 80.0, "AABB"),
    ("jig", 120.0, "AABB"),
]  # fmt: skip
NUMBERS = range(len(WRITTEN))
SOME = NUMBERS[::3]
each_number = pytest.mark.parametrize(
    "number",
    [number if number in SOME else pytest.param(number, marks=pytest.mark.long) for number in NUMBERS],
    ids=lambda number: "{} at {:g}".format(*WRITTEN[number]),
)
some_and_all = pytest.mark.parametrize(
    "numbers", [SOME, pytest.param(NUMBERS, marks=pytest.mark.long)], ids=["some", "all"]
)


@cache
def heard(number: int) -> tuple[pieces.Piece, Beats, Key]:
    style, bpm, form = WRITTEN[number]
    mode = ("major", "minor")[number % 2]
    piece = pieces.play(style, bpm, form=form, tonic=5 * number % 12, mode=mode, seed=number)
    spectra = compute_spectra(piece.mono)
    return piece, track_beats(spectra, piece.mono), find_key(spectra.pitches)


def at_one_level(truth: pieces.Doubles, found: pieces.Doubles) -> list[tuple[pieces.Doubles, pieces.Doubles]]:
    """The beats with every other one of the faster left out, if one counts twice as fast."""
    ratio = np.median(np.diff(truth)) / np.median(np.diff(found))
    if ratio > 1.7:
        return [(truth, found[k::2]) for k in (0, 1)]
    return [(truth[k::2], found) for k in (0, 1)] if ratio < 0.6 else [(truth, found)]


@some_and_all
def test_beats_are_where_they_were_written(numbers: range) -> None:
    # F-measure within 70 ms; counting in half or double tempo is allowed. librosa's beat tracker: 0.84
    scores = []
    for number in numbers:
        piece, beats, _ = heard(number)
        pairs = at_one_level(piece.beats_s, played(beats.edges_s, piece))
        scores.append(max(mir_eval.beat.f_measure(*pair, f_measure_threshold=0.07) for pair in pairs))
    assert np.mean(scores) >= 0.95, dict(zip(numbers, scores, strict=True))


@each_number
def test_the_tempo_is_right_up_to_octaves(number: int) -> None:
    octaves = np.log2(heard(number)[1].tempo_bpm / WRITTEN[number][1])
    assert min(abs(octaves - whole) for whole in (-1, 0, 1)) < 0.02


@some_and_all
def test_bar_lines_are_where_they_were_written(numbers: range) -> None:
    right, all_lines = 0, 0
    for number in numbers:
        piece, beats, _ = heard(number)
        lines = played(beats.edges_s[beats.phase :: beats.meter], piece)
        right += sum(np.abs(piece.downbeats_s - line).min() < 0.07 for line in lines)
        all_lines += lines.size
    assert right / all_lines >= 0.95


@some_and_all
def test_the_meter_is_as_written_and_six_eight_counts_four_dotted_beats(numbers: range) -> None:
    meters = [(piece.meter, beats.meter) for piece, beats, _ in map(heard, numbers)]
    assert all(found == {2: 4}.get(meter, meter) for meter, found in meters)


@some_and_all
def test_keys_are_as_written(numbers: range) -> None:
    right = [(key.tonic, key.mode) == (piece.tonic, piece.mode) for piece, _, key in map(heard, numbers)]
    assert np.mean(right) >= 0.9


def played(times_s: pieces.Doubles, piece: pieces.Piece) -> pieces.Doubles:
    """Without those before the first beat and after the last, where edges go on at the same tempo."""
    return times_s[(times_s > piece.beats_s[0] - 0.1) & (times_s < piece.beats_s[-1] + 0.1)]
