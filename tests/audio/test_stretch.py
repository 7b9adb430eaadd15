"""Key and tempo, changed each without the other, of a piece whose key and tempo are known."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from home_folder import ROOT

from pipeline.audio import loudness_lufs, stretch
from pipeline.records import Audio
from pipeline.scores import analyse_source

RATE, BPM = 22050, 112.0
CHORDS = [(0, 4, 7), (9, 12, 16), (5, 9, 12), (7, 11, 14)]  # of C major, one a bar


@cache
def piece() -> Audio:
    """Eight bars of chords on the left and a beat on the right, in C major; ends in the middle of a sound."""
    beat_s, rng = 60 / BPM, np.random.default_rng(1)
    t = np.arange(round(32 * beat_s * RATE)) / RATE
    beat, since_s = (t / beat_s).astype(int), t % beat_s
    pitches = np.array(CHORDS)[beat // 4 % 4].T + 60
    tones = sum(np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * t) for pitch in pitches) / 3
    drum = rng.standard_normal(t.size) * np.exp(-since_s / 0.03)
    return Audio(np.float32([0.5 * tones * np.exp(-since_s / 0.4), 0.3 * drum + 0.05 * tones]), RATE)


def delay_s(made: Audio, speed: float, at_s: float) -> float:
    """By how much the four seconds from `at_s` on of the changed piece come late, by their power in 5 ms."""
    step = RATE // 200
    power, expected = (
        np.add.reduceat((audio.samples**2).sum(axis=0), np.arange(0, audio.n_samples, step))
        for audio in (made, piece())
    )
    frames, lags = np.arange(round(at_s * 200), round((at_s + 4) * 200)), range(-20, 21)
    written = [np.interp((frames - lag) * speed, np.arange(expected.size), expected) for lag in lags]
    likeness = [np.corrcoef(power[frames], late)[0, 1] for late in written]
    return lags[int(np.argmax(likeness))] / 200


@pytest.mark.parametrize("semitones", [-12, -3, 2, 7])
def test_transposing_moves_the_key_and_keeps_length_tempo_and_places(semitones: int) -> None:
    before, moved = analyse_source(piece()), stretch(piece(), transpose=semitones)
    after = analyse_source(moved)

    assert moved.samples.shape == piece().samples.shape
    assert before.key is not None
    assert after.key is not None
    assert (before.key.tonic, before.key.mode) == (0, "major")
    assert (after.key.tonic, after.key.mode) == (semitones % 12, "major")
    assert after.tempo_bpm == pytest.approx(before.tempo_bpm, rel=0.01)


@pytest.mark.parametrize("speed", [0.8, 0.93, 1.1, 1.25])
def test_speed_changes_the_tempo_and_keeps_the_key(speed: float) -> None:
    after = analyse_source(stretch(piece(), speed=speed))
    assert str(after.key) == "C major"
    assert after.tempo_bpm == pytest.approx(speed * BPM, rel=0.01)


@pytest.mark.parametrize(("transpose", "speed"), [(0, 0.5), (5, 0.77), (-2, 1.3), (0, 2.0)])
def test_the_length_is_exact_and_everything_in_its_place(transpose: int, speed: float) -> None:
    made = stretch(piece(), transpose=transpose, speed=speed)
    assert made.n_samples == round(piece().n_samples / speed)
    assert made.samples.dtype == np.float32
    for at_s in (0.5, made.duration_s - 4.5):
        assert abs(delay_s(made, speed, at_s)) <= 0.01


def test_no_change_is_the_same_object() -> None:
    assert stretch(piece()) is piece()
    assert stretch(piece(), transpose=0, speed=1.0) is piece()


def test_the_channels_stay_apart_and_as_loud_as_they_were() -> None:
    """Here the left channel has no drums, and the right one hardly any chords."""
    made = stretch(piece(), transpose=3, speed=1.1)
    for channel in (0, 1):
        before, after = (
            loudness_lufs(Audio(a.samples[channel : channel + 1], RATE)) for a in (piece(), made)
        )
        assert after == pytest.approx(before, abs=1.5)
    assert abs(np.corrcoef(made.samples)[0, 1] - np.corrcoef(piece().samples)[0, 1]) < 0.05


def test_mono_is_changed_as_two_equal_channels_are() -> None:
    mono = Audio(piece().samples[:1], RATE)
    made = stretch(mono, transpose=-4, speed=0.9)
    doubled = stretch(Audio(np.repeat(mono.samples, 2, axis=0), RATE), transpose=-4, speed=0.9)
    assert made.channels == 1
    assert np.max(np.abs(doubled.samples - made.samples)) < 0.01


def test_sound_is_cut_at_both_ends_without_a_click() -> None:
    loud = Audio(np.float32([0.5 * np.cos(2 * np.pi * 330 * np.arange(RATE) / RATE)]), RATE)
    made = stretch(loud, transpose=1).samples[0]
    assert max(abs(made[0]), abs(made[-1])) < 0.001
    assert np.abs(made[RATE // 20 : RATE // 10]).max() > 0.4  # and is there soon


@pytest.mark.parametrize("speed", [0.5, 1.1])
def test_the_same_sound_gives_the_same_bits_in_every_process_and_layout_of_memory(speed: float) -> None:
    """At half the tempo the library draws phases at random."""
    short = piece().samples[:, :RATE]
    expected = stretch(Audio(short, RATE), transpose=2, speed=speed).samples
    read_only = np.asfortranarray(short)
    read_only.flags.writeable = False
    assert np.array_equal(stretch(Audio(read_only, RATE), transpose=2, speed=speed).samples, expected)

    code = (
        "import sys, numpy; from pipeline.audio import stretch; from pipeline.records import Audio;"
        "samples = numpy.frombuffer(sys.stdin.buffer.read(), numpy.float32).reshape(2, -1);"
        f"made = stretch(Audio(samples, {RATE}), transpose=2, speed={speed});"
        "sys.stdout.buffer.write(made.samples.tobytes())"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], input=short.tobytes(), capture_output=True, check=True, cwd=ROOT
    )
    assert child.stdout == expected.tobytes()
