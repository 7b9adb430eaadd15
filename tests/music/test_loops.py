"""Loops: whole bars where there are bars, no seam that is heard, and the length that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from sequenced import BAR_S, RATE, pads, sequenced

from pipeline.errors import EngineFailure
from pipeline.music.analysis import analyse
from pipeline.music.loops import bar_line, cut_loop, find_loop
from pipeline.records import Audio


def test_a_loop_of_sequenced_music_is_whole_bars_to_the_sample_and_plays_on_like_the_piece() -> None:
    piece = sequenced()
    found = find_loop(piece, analyse(piece), 15.3)
    assert (found.stop - found.start, found.bars) == (16 * RATE, 8)
    assert found.similarity > 0.95 and abs(found.level_step_db) < 0.1
    loop = cut_loop(piece, found)
    twice = np.concatenate([loop.samples, loop.samples], axis=1)
    played_on = sequenced(80.0).samples[:, found.start : found.start + twice.shape[1]]
    assert np.max(np.abs(twice - played_on)) < 1e-3


def test_a_loop_begins_on_a_bar_line() -> None:
    piece = sequenced()
    start_s = find_loop(piece, analyse(piece), 16.0).start / RATE
    assert abs((start_s + BAR_S / 2) % BAR_S - BAR_S / 2) < 0.02


def test_a_passage_that_fades_is_left_out_of_the_loop() -> None:
    gain = np.clip(np.arange(40 * RATE, 0, -1) / (6 * RATE), 0, 1)
    piece = Audio((sequenced().samples * gain).astype(np.float32), RATE)
    found = find_loop(piece, analyse(piece), 24.0)
    assert found.stop <= 34.5 * RATE
    assert abs(found.level_step_db) < 1


def test_a_loop_without_a_beat_has_no_click_and_no_step_at_its_seam() -> None:
    piece = pads()
    found = find_loop(piece, analyse(piece), 20.0)
    assert found.bars is None
    loop = cut_loop(piece, found)
    assert loop.duration_s == pytest.approx(20.0, rel=0.11)
    seam = np.concatenate([loop.samples[0, -RATE:], loop.samples[0, :RATE]])
    assert np.abs(np.diff(seam, 2)).max() <= 1.5 * np.abs(np.diff(piece.samples[0], 2)).max()
    before, after = (np.mean(part**2) for part in (seam[RATE // 2 : RATE], seam[RATE : 3 * RATE // 2]))
    assert abs(10 * np.log10(after / before)) < 3


def test_sound_that_is_too_short_for_the_loop_is_an_error() -> None:
    piece = sequenced(8.0)
    with pytest.raises(EngineFailure, match=r"no loop of 20\.0 s fits in 8\.0 s of sound"):
        find_loop(piece, analyse(piece), 20.0)


def test_the_bar_line_nearest_to_a_time_is_found_and_none_without_a_beat() -> None:
    line = bar_line(analyse(sequenced()), 15.1)
    assert line is not None
    assert line[0] == pytest.approx(16.0, abs=0.02)
    assert line[1] == 8
    assert bar_line(analyse(pads()), 15.1) is None


def test_a_length_of_less_than_a_bar_becomes_one_bar() -> None:
    piece = sequenced(8.0)
    assert find_loop(piece, analyse(piece), 0.3).bars == 1
    assert bar_line(analyse(piece), 0.3) == (pytest.approx(BAR_S, abs=0.02), 1)


def test_a_loop_shorter_than_its_crossfade_has_a_shorter_one() -> None:
    noise = Audio(0.1 * np.random.default_rng(1).standard_normal((2, 15 * RATE)).astype(np.float32), RATE)
    for length_s in (0.1, 0.3, 0.5, 0.6):
        found = find_loop(noise, analyse(noise), length_s)
        assert cut_loop(noise, found).n_samples == found.stop - found.start
