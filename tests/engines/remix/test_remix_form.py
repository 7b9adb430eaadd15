"""The form of remixes: where they start and end, how often and where they jump, and how siblings differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import synth
from numpy.typing import NDArray

from pipeline.engines.base import EngineSettings
from pipeline.engines.remix import ENGINE, params_of_similarity
from pipeline.engines.remix.analysis import EMPHASES
from pipeline.engines.remix.beatless import onset_edges_s
from pipeline.engines.remix.lattice import Moves, weigh
from pipeline.engines.remix.similarity import break_penalties, levels_around
from pipeline.music import features, spectra
from pipeline.records import Audio, Variation, VariationRequest

PIECE = synth.play(
    124, "verse chorus verse verse chorus verse chorus chorus"
)  # 32 bars, 62 s and a last chord
BAR_S = 4 * PIECE.beat_s
RATE = spectra.RATE_HZ


@cache
def remixes(seconds: float = 30.0, n: int = 8, **params: float) -> list[Variation]:
    generator: Any = ENGINE.load(EngineSettings(sample_rate=PIECE.audio.sample_rate))
    wanted = [VariationRequest(str(seed), "t", PIECE.audio, seconds, seed, params) for seed in range(n)]
    return list(generator.generate(wanted, progress=lambda *_: None, should_stop=lambda: False))


def played_s(variation: Variation) -> NDArray[np.float64]:
    """The source's time that is heard, every 10 ms of the result."""
    time_s = np.arange(0.0, variation.audio.duration_s, 0.01)
    source_s = variation.details["start_s"] + time_s
    for join in variation.details["joins"]:
        after = time_s >= join["out_s"]
        source_s[after] = join["to_s"] + time_s[after] - join["out_s"]
    return source_s


def n_joins(variations: Sequence[Variation]) -> int:
    return sum(len(variation.details["joins"]) for variation in variations)


@pytest.mark.parametrize("temperature", [0.6, 1.2])
def test_siblings_seldom_play_the_same_at_the_same_time(temperature: float) -> None:
    played = [played_s(variation) for variation in remixes(temperature=temperature)]
    shared = [np.mean(np.abs(one - other) < 0.05) for one, other in combinations(played, 2)]
    assert np.mean(shared) < 0.12 and max(shared) < 0.9


def test_starts_and_endings_vary() -> None:
    variations = [*remixes(temperature=0.6), *remixes(temperature=1.2)]
    starts_s = {variation.details["start_s"] for variation in variations}
    assert len(starts_s) >= 8
    assert {variation.details["ending"] for variation in variations} == {"own", "fade"}


def test_a_doubled_temperature_makes_far_more_joins() -> None:
    assert n_joins(remixes(temperature=1.2)) >= 1.6 * n_joins(remixes(temperature=0.6))


def test_most_jumps_are_by_multiples_of_four_bars_and_all_keep_the_position_in_the_bar() -> None:
    joins = [join for variation in remixes(temperature=1.2) for join in variation.details["joins"]]
    assert all(join["keeps_bar_position"] for join in joins)
    assert np.mean([join["bars_jumped"] % 4 == 0 for join in joins]) >= 0.85
    for join in joins:
        assert join["to_bar"] - join["from_bar"] == join["bars_jumped"]
        assert round((join["to_s"] - join["from_s"]) / BAR_S, 1) == join["bars_jumped"]


def test_joins_are_on_bar_lines() -> None:
    for join in (join for variation in remixes(temperature=1.2) for join in variation.details["joins"]):
        assert abs(join["from_s"] / BAR_S - round(join["from_s"] / BAR_S)) * BAR_S < 0.01


@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_nothing_is_played_three_times_within_30_s(temperature: float) -> None:
    for variation in remixes(temperature=temperature):
        half_bars = np.floor(played_s(variation) / BAR_S * 2).astype(int)
        visits = half_bars[np.flatnonzero(np.diff(half_bars, prepend=-1))]
        assert np.unique(visits, return_counts=True)[1].max() <= 2


def test_no_passage_of_30_s_is_uncut() -> None:
    for variation in remixes(60.0, 4, temperature=0.3):
        joins_s = [join["out_s"] for join in variation.details["joins"]]
        assert max(np.diff([0.0, *joins_s, 60.0])) < 30


@pytest.mark.long
def test_the_dial_says_how_much_is_heard_at_the_same_time_as_in_the_source() -> None:
    shares = []
    for similarity in (1.0, 0.8, 0.6):
        params = params_of_similarity(similarity)
        ENGINE.params.model_validate(params)
        played = [played_s(variation) for variation in remixes(**params)]
        shares.append(np.mean([np.abs(one - 0.01 * np.arange(one.size)) < 0.05 for one in played]))
    assert all(one > other for one, other in pairwise(shares)) and shares[0] > 0.7 and shares[-1] < 0.15, (
        shares
    )


@pytest.mark.parametrize(
    ("bars", "bpm", "longer_s"), [(2, 96, 0.0), (2, 124, 0.0), (2, 140, 0.0), (4, 110, 0.0), (4, 110, 0.04)]
)
def test_a_short_loop_is_played_whole_and_begins_on_one_of_its_bar_lines(
    bars: int, bpm: float, longer_s: float
) -> None:
    piece = synth.play(bpm, "verse chorus", ending=False)
    bar_s, rate = 4 * piece.beat_s, piece.audio.sample_rate
    loop = Audio(piece.audio.samples[:, : round((bars * bar_s + longer_s) * rate)], rate)
    generator: Any = ENGINE.load(EngineSettings(sample_rate=rate))
    wanted = [VariationRequest(str(seed), "t", loop, 20.0, seed, {}) for seed in range(6)]
    for made in generator.generate(wanted, progress=lambda *_: None, should_stop=lambda: False):
        seams = [join for join in made.details["joins"] if join["to_s"] == 0.0]
        assert seams and all(join["from_s"] == pytest.approx(loop.duration_s, abs=1e-3) for join in seams)
        start_bars = made.details["start_s"] / bar_s
        assert start_bars == pytest.approx(round(start_bars), abs=0.02)


def notes(times_s: Sequence[float], total_s: float, *, decay_s: float = 1.0) -> Audio:
    """Notes of changing pitch with soft attacks at these times, mono at the rate of the analysis."""
    out = np.zeros(round(total_s * RATE))
    for k, at_s in enumerate(times_s):
        time_s = np.arange(out.size - round(at_s * RATE)) / RATE
        level = np.minimum(time_s / 0.03, 1) * np.exp(-time_s / decay_s)
        out[-time_s.size :] += level * np.sin(2 * np.pi * 220 * 2 ** (k * 5 % 12 / 12) * time_s)
    return Audio(0.2 * out[None].astype(np.float32), RATE)


def test_music_without_a_beat_is_cut_just_before_its_onsets() -> None:
    times_s = np.cumsum(np.random.default_rng(1).uniform(0.8, 1.7, 12))
    edges_s = onset_edges_s(spectra.compute_spectra(notes(times_s, 18.0).mono()), 18.0)
    assert np.all(np.diff(edges_s) > 0)
    before_s = np.array([(at_s - edges_s[edges_s <= at_s + 0.02]).min() for at_s in times_s])
    near = np.abs((times_s + 0.25) % 0.5 - 0.25) < 0.15  # onsets half-way between two edges are out of reach
    assert near.sum() >= 4 and before_s[near].max() < 0.1


def test_what_breaks_off_or_sets_in_without_an_attack_is_penalized() -> None:
    """A chord from 2 to 6 s, which ends at once; silence around it."""
    sound = notes([2.0], 6.0, decay_s=100.0).mono()
    mono = np.pad(sound, (0, 4 * RATE))
    mel = spectra.compute_spectra(mono).mel
    silent, begin, middle, late, end, after = range(6)
    times_s = np.array([1.0, 2.0, 3.5, 4.5, 6.0, 8.0])
    penalty = break_penalties(mel, levels_around(mono, times_s), times_s)
    assert penalty[middle, late] < 0.1  # the same chord goes on
    assert penalty[end, after] < 0.1  # it ended by itself
    assert penalty[silent, begin] < 0.1  # it begins by its own attack
    assert penalty[middle, after] > 0.3 and penalty[silent, middle] > 0.3


def test_a_jump_in_level_is_penalized_but_not_one_of_the_tracks_own() -> None:
    rng = np.random.default_rng(2)
    mono = rng.standard_normal(8 * RATE).astype(np.float32) * np.repeat([0.01, 0.1], 4 * RATE).astype(
        np.float32
    )
    quiet, step, loud, louder = range(4)
    times_s = np.array([2.0, 4.0, 6.0, 7.0])
    penalty = break_penalties(np.zeros((2, 1378), np.float32), levels_around(mono, times_s), times_s)
    assert penalty[quiet, loud] > 1.5 and penalty[loud, louder] < 0.1
    assert penalty[quiet, step] < 0.1


def test_the_emphasis_says_whether_timbre_or_harmony_makes_beats_alike() -> None:
    """Four seconds each of C in sines, C in saws, F sharp in sines; a note on each half second."""
    time_s = np.arange(RATE // 2) / RATE

    def note(pitch_hz: float, partials: int) -> NDArray[np.float64]:
        waves = [np.sin(2 * np.pi * k * pitch_hz * time_s) / k for k in range(1, partials + 1)]
        return np.asarray(0.2 * np.exp(-time_s / 0.2) * np.sum(waves, axis=0))

    passages = [np.tile(note(*voice), 8) for voice in ((261.6, 1), (261.6, 12), (370.0, 1))]
    spectrum = spectra.compute_spectra(np.concatenate(passages).astype(np.float32))
    of_beats = features.beat_features(spectrum, np.arange(25) / 2)
    by_timbre, by_harmony = (
        features.beat_distances(of_beats, EMPHASES[name]) for name in ("timbre", "harmony")
    )
    sines, saws, other_pitch = 4, 12, 20
    assert by_timbre[sines, other_pitch] < by_timbre[sines, saws]
    assert by_harmony[sines, other_pitch] > 1.5 * by_timbre[sines, other_pitch]
    assert by_harmony[sines, saws] < by_timbre[sines, saws]


def test_the_lattice_weighs_every_path_once() -> None:
    rng = np.random.default_rng(4)
    targets = np.array([[1, 3], [0, 2], [4, 0], [1, 2], [0, 1], [2, 3]])
    joins, segments = rng.normal(size=(6, 2)), np.array([-np.inf, 0.1, -0.4, 0.3])
    last, final = np.array([-np.inf, -0.2, 0.5, 0.0]), rng.normal(size=6)
    moves = Moves(segments, last, targets, joins)

    def total(point: int, left: int) -> float:
        weight = np.exp(last[left] + final[point + left]) if left < 4 and point + left < 6 else 0.0
        for length in range(1, min(4, left)):
            if (leave := point + length) < 6:
                for k, target in enumerate(targets[leave]):
                    weight += np.exp(segments[length] + joins[leave, k]) * total(int(target), left - length)
        return float(weight)

    entered = weigh(moves, final, 7, best=False).entered
    expected = [[total(point, left) for point in range(6)] for left in range(1, 8)]
    np.testing.assert_allclose(np.exp(entered[1:]), expected, rtol=1e-9)


def test_silence_inside_of_a_track_is_not_prolonged_and_nothing_starts_in_it() -> None:
    half, rate = PIECE.audio.n_samples // 2, PIECE.audio.sample_rate
    pause = np.zeros((PIECE.audio.channels, 12 * rate), np.float32)
    sound = PIECE.audio.samples
    source = Audio(np.concatenate([sound[:, :half], pause, sound[:, half:]], axis=1), rate)
    generator: Any = ENGINE.load(EngineSettings(sample_rate=rate))
    wanted = [
        VariationRequest(str(seed), "t", source, 30.0, seed, {"temperature": temperature})
        for seed in range(12)
        for temperature in (0.6, 1.5)
    ]
    for made in generator.generate(wanted, progress=lambda *_: None, should_stop=lambda: False):
        heard = np.flatnonzero(np.abs(made.audio.samples).max(axis=0) > 1e-4)
        assert heard[0] < 1.5 * rate
        assert np.diff(heard).max() < 13 * rate
