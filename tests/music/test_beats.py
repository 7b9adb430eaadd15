"""Beats and bars of music that isn't even: rubato, other tempos, pickups, and music without a beat."""

from __future__ import annotations

import mir_eval
import numpy as np
import pieces
import pytest
from numpy.typing import NDArray

from pipeline.music.beats import Beats, track_beats
from pipeline.music.spectra import RATE_HZ, compute_spectra

UNEVEN = {
    "rubato without drums": ("ballad", pieces.rubato(80)),
    "rubato without attacks": ("strings", pieces.rubato(96)),
    "speeding up": ("rock", pieces.speeding_up(105, 130, 48)),
    "two tempos": ("rock", pieces.two_tempos(110, 124, 24)),
    "slowing waltz": ("waltz", pieces.speeding_up(140, 118, 36)),
}


def beats_of(mono: NDArray[np.float32]) -> Beats:
    return track_beats(compute_spectra(mono), mono)


def assert_bars_are_right(beats: Beats, piece: pieces.Piece) -> None:
    lines = beats.edges_s[beats.phase :: beats.meter]
    inside = lines[(lines > piece.downbeats_s[0] - 0.1) & (lines < piece.downbeats_s[-1] + 0.1)]
    assert beats.meter == piece.meter
    assert inside.size >= 0.5 * piece.downbeats_s.size - 1  # half the tempo: every other bar line
    assert np.mean([np.abs(piece.downbeats_s - line).min() < 0.07 for line in inside]) >= 0.95


@pytest.mark.parametrize("name", UNEVEN)
def test_beats_and_bars_follow_a_tempo_that_changes(name: str) -> None:
    style, tempo = UNEVEN[name]
    piece = pieces.play(style, tempo, form="AABA", seed=3)
    beats = beats_of(piece.mono)
    assert mir_eval.beat.f_measure(piece.beats_s, beats.edges_s) > 0.9
    assert_bars_are_right(beats, piece)
    changes = np.diff(np.log(np.diff(beats.edges_s[1:-1])))
    assert np.abs(changes).max() < 0.2  # the two tempos differ by 0.12


@pytest.mark.parametrize("pickup", [1, 2, 3])
def test_a_pickup_does_not_move_the_bar_lines(pickup: int) -> None:
    piece = pieces.play("rock", 118.0, pickup=pickup, seed=pickup)
    assert_bars_are_right(beats_of(piece.mono), piece)


def test_steady_beats_lie_on_one_even_grid() -> None:
    edges_s = beats_of(pieces.play("rock", 118.0, pickup=1, seed=1).mono).edges_s[1:-1]
    assert np.ptp(np.diff(edges_s)) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_music_without_onsets_has_no_beats_but_an_even_grid(seed: int) -> None:
    mono = pieces.swells(20.0, seed)
    beats = beats_of(mono)
    assert (beats.tempo_bpm, beats.meter, beats.phase) == (None, 1, 0)
    np.testing.assert_allclose(np.diff(beats.edges_s), beats.edges_s[-1] / (beats.edges_s.size - 1))
    assert beats.edges_s[-1] == pytest.approx(mono.size / RATE_HZ)


@pytest.mark.parametrize("seconds", [0.05, 0.5, 3.0])
def test_very_short_sounds_have_no_beats(seconds: float) -> None:
    assert beats_of(np.zeros(round(seconds * RATE_HZ), np.float32)).tempo_bpm is None
