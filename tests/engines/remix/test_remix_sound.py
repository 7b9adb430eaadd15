"""Measured properties of remixes: tempo, beats across joins, clicks, level, similarity at the joins."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import soundfile
import synth
from numpy.typing import NDArray

from pipeline.demo import INSTRUMENTAL
from pipeline.engines.base import EngineSettings
from pipeline.engines.remix import ENGINE
from pipeline.engines.remix.analysis import Analysis, analyse
from pipeline.records import Audio, Variation, VariationRequest

Doubles = NDArray[np.float64]

CROSSFADE_S = 0.04  # the default
BEATLESS_FADE_S = 0.6
REAL = sorted((Path(__file__).parents[4] / "shared" / "audio").glob("*.ogg"))


def remixes(audio: Audio, seconds: float, seeds: Sequence[int] = range(4), **params: Any) -> list[Variation]:
    generator: Any = ENGINE.load(EngineSettings(sample_rate=audio.sample_rate))
    wanted = [VariationRequest(str(seed), "t", audio, seconds, seed, params) for seed in seeds]
    results = list(generator.generate(wanted, progress=lambda *_: None, should_stop=lambda: False))
    assert all(isinstance(result, Variation) for result in results), results
    return results


def around_joins(
    audio: Audio, variation: Variation, before_s: float, until_s: float
) -> list[tuple[Doubles, Doubles, Doubles]]:
    """Per join: the result, and the source around the point left and the point entered; mono.

    Without joins in the last seconds, where a result may be faded.
    """
    rate = audio.sample_rate
    first, last = round(before_s * rate), round(until_s * rate)
    result, source = variation.audio.mono().astype(float), audio.mono().astype(float)
    out = []
    for join in variation.details["joins"]:
        at = [round(join[key] * rate) for key in ("out_s", "from_s", "to_s")]
        if min(at) >= first and at[0] + last <= result.size - 4 * rate and max(at[1:]) + last <= source.size:
            cut = [x[k - first : k + last] for x, k in zip((result, source, source), at, strict=True)]
            out.append((cut[0], cut[1], cut[2]))
    return out


def burst_db(sounds: tuple[Doubles, Doubles, Doubles]) -> float:
    """By how much the brightest millisecond of the result exceeds both sides' (second difference)."""
    peak = [np.abs(np.diff(sound, 2)).max() for sound in sounds]
    return float(20 * np.log10(max(peak[0], 1e-6) / max(*peak[1:], 1e-6)))


def level_step_db(sounds: tuple[Doubles, Doubles, Doubles]) -> float:
    """By how much the level of the result lies outside of the levels of the two sides."""
    result, left, entered = (10 * np.log10((sound**2).mean() + 1e-12) for sound in sounds)
    return float(max(0.0, min(left, entered) - result, result - max(left, entered)))


@pytest.mark.parametrize("bpm", [84.0, 97.3, 120.0, 150.0])
@pytest.mark.parametrize("meter", [3, 4, 7])
def test_beats_are_found_within_4_ms(bpm: float, meter: int) -> None:
    piece = synth.play(bpm, "verse chorus", meter=meter)
    track = analyse(piece.audio)
    assert track.tempo_bpm == pytest.approx(bpm, rel=0.002)
    assert track.meter == meter
    off_s = (track.edges_s / piece.beat_s - np.round(track.edges_s / piece.beat_s)) * piece.beat_s
    assert np.abs(off_s).max() < 0.004


def drifting(piece: synth.Piece, depth: float) -> tuple[Audio, Doubles, Doubles]:
    """The piece with a tempo that varies by +-depth over 6 s; times, and the piece's time at each."""
    rate = piece.audio.sample_rate
    time_s = np.arange(piece.audio.n_samples) / rate
    piece_s = time_s + depth * 6 / (2 * np.pi) * np.sin(2 * np.pi * time_s / 6)
    warped = [np.interp(piece_s, time_s, channel) for channel in piece.audio.samples]
    return Audio(np.array(warped, np.float32), rate), time_s, piece_s


@pytest.mark.parametrize("depth", [0.0, 0.01, 0.03])
def test_beats_go_on_across_joins(depth: float) -> None:
    piece = synth.play(112, "verse chorus verse chorus")
    audio, time_s, piece_s = drifting(piece, depth)
    skips = []
    for variation in remixes(audio, 60.0):
        for join in variation.details["joins"]:
            left, entered = np.interp([join["from_s"], join["to_s"]], time_s, piece_s)
            skips.append((left - entered) / piece.beat_s)
    off_s = np.abs(np.array(skips) - np.round(skips)) * piece.beat_s
    assert off_s.size >= 8 and off_s.max() < (0.015 if depth > 0.02 else 0.005)


def test_bars_keep_their_phase_across_joins() -> None:
    piece = synth.play(112, "verse chorus verse chorus", meter=3)
    for variation in remixes(piece.audio, 60.0):
        for join in variation.details["joins"]:
            assert round((join["from_s"] - join["to_s"]) / piece.beat_s) % 3 == 0


def test_impulses_stay_on_their_grid() -> None:
    audio = synth.impulses(12.0, bpm=120)
    for variation in remixes(audio, 30.0, temperature=2.0):
        assert variation.details["joins"]
        samples = variation.audio.samples[0, : -5 * 44100]  # the last seconds are faded
        times_s = np.flatnonzero(samples > 0.5) / 44100
        np.testing.assert_allclose(np.diff(times_s), 0.5, atol=0.0001)


@pytest.mark.parametrize("bpm", [90.0, 128.0])
def test_the_tempo_of_the_result_is_the_sources(bpm: float) -> None:
    """Measured without the engine: the autocorrelation of the rising energy near a lag of eight beats."""
    piece = synth.play(bpm, "verse chorus verse")
    for variation in remixes(piece.audio, 40.0, seeds=[0, 1], temperature=1.5):
        frames = variation.audio.mono()[: 35 * 44100].reshape(-1, 441)
        rise = np.maximum(0.0, np.diff(np.log10((frames.astype(float) ** 2).mean(axis=1) + 1e-6)))
        power = scipy.signal.correlate(rise - rise.mean(), rise - rise.mean())[rise.size - 1 :]
        lags = np.arange(power.size)
        near = (lags * 0.01 > 7.6 * piece.beat_s) & (
            lags * 0.01 < 8.4 * piece.beat_s
        )  # eight beats: 1 in 400
        assert lags[near][np.argmax(power[near])] * 0.01 / 8 == pytest.approx(piece.beat_s, rel=0.01)


PIECES = {
    "music": lambda: synth.play(100).audio,
    "at 8 kHz": lambda: synth.play(sample_rate=8000, channels=1).audio,
    "pads": lambda: synth.pads(24.0),
    "drone": lambda: synth.drone(12.0),
}


@cache
def minutes(name: str) -> tuple[Audio, list[Variation]]:
    """A piece and four remixes of 60 s."""
    audio = PIECES[name]()
    return audio, remixes(audio, 60.0)


@pytest.mark.parametrize("name", PIECES)
def test_joins_do_not_click(name: str) -> None:
    """Up to the beat, the fastest change is at most 1 dB above that of the two sides."""
    audio, variations = minutes(name)
    beatless = name in {"pads", "drone"}
    before_s, until_s = (BEATLESS_FADE_S + 0.1, 0.2) if beatless else (CROSSFADE_S + 0.02, -0.002)
    bursts = [burst_db(s) for v in variations for s in around_joins(audio, v, before_s, until_s)]
    assert len(bursts) >= 8 and max(bursts) < 1.0


def test_the_click_measure_finds_a_join_without_a_crossfade() -> None:
    audio, variations = minutes("drone")
    bursts = []
    for _, left, entered in around_joins(audio, variations[0], 0.2, 0.2):
        cut = np.concatenate([left[: left.size // 2], np.roll(entered, 150)[left.size // 2 :]])
        bursts.append(burst_db((cut, left, entered)))
    assert min(bursts) > 6


@pytest.mark.parametrize("name", PIECES)
def test_joins_keep_the_level(name: str) -> None:
    audio, variations = minutes(name)
    fade_s = BEATLESS_FADE_S if name in {"pads", "drone"} else CROSSFADE_S
    before_s, until_s = fade_s + 0.005, -0.005
    steps = [level_step_db(s) for v in variations for s in around_joins(audio, v, before_s, until_s)]
    assert len(steps) >= 8 and max(steps) < 1.5


def mean_scores(track: Analysis, variations: Sequence[Variation]) -> tuple[float, float]:
    """Of the joins made, and of all possible ones."""
    made = [join["score"] for variation in variations for join in variation.details["joins"]]
    return float(np.mean(made)), float(track.natural[np.isfinite(track.scores)].mean())


def test_joins_are_far_better_than_random_ones() -> None:
    audio = synth.play(100).audio
    made, random = mean_scores(analyse(audio), remixes(audio, 30.0))
    assert made > 0.5 and made > random + 0.3


def test_an_ending_is_played_to_its_end() -> None:
    """The last second is the source's last second, apart from a fade and up to 0.4 s of silence."""
    piece = synth.play(120, "verse chorus verse chorus")
    variations = [
        v for v in remixes(piece.audio, 50.0, range(8), temperature=1.0) if v.details["ending"] == "own"
    ]
    assert 2 <= len(variations) < 8
    for variation in variations:
        tail = variation.audio.mono()[-2 * 44100 :].astype(float)
        found = scipy.signal.correlate(piece.audio.mono()[-3 * 44100 :].astype(float), tail, method="fft")
        norms = np.sqrt((tail**2).sum() * (piece.audio.mono()[-3 * 44100 :].astype(float) ** 2).sum())
        assert found.max() / norms > 0.5
        assert np.abs(tail[-441:]).max() < 0.02


def test_a_result_without_an_ending_is_faded() -> None:
    audio = synth.play(sections="verse verse chorus", ending=False).audio
    for variation in remixes(audio, 12.0):
        assert variation.details["ending"] == "fade"
        mono = variation.audio.mono().astype(float)
        level = [float(np.sqrt((mono[-k : -k + 4410] ** 2).mean())) for k in (30000, 10000, 4411)]
        assert level[0] > level[1] > level[2]
        assert abs(mono[-1]) < 1e-4


@pytest.mark.parametrize(
    "path",
    [INSTRUMENTAL, *(pytest.param(path, marks=pytest.mark.long) for path in REAL)],
    ids=lambda path: path.stem,
)
def test_joins_of_produced_tracks_do_not_click_and_are_better_than_random(path: Path) -> None:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    audio = Audio(np.ascontiguousarray(samples.T), rate)
    variations = remixes(audio, 30.0)
    joins = [s for v in variations for s in around_joins(audio, v, CROSSFADE_S + 0.02, -0.002)]
    assert len(joins) >= 2
    assert max(burst_db(s) for s in joins) < 1.0
    assert max(level_step_db(s) for s in joins) < 2.0
    made, random = mean_scores(analyse(audio), variations)
    assert made > random + 0.2


@pytest.mark.parametrize("less", [0, 1])  # an odd number of samples, too: the analysis ends after the sound
def test_the_end_of_a_loop_joins_its_start_without_a_click(less: int) -> None:
    piece = synth.play(120.0, "verse verse", ending=False).audio
    piece = Audio(piece.samples[:, : piece.n_samples - less], piece.sample_rate)
    sway = 0.2 * np.sin(np.pi * np.arange(piece.n_samples) / (2 * piece.n_samples))  # ends far from its start
    source = Audio(piece.samples + sway.astype(np.float32), piece.sample_rate)
    [made] = remixes(source, 2.5 * source.duration_s, seeds=[0], temperature=0.0)
    whole = [join for join in made.details["joins"] if join["to_s"] == 0.0]
    assert whole  # the whole loop is played more than once
    for join in whole:
        at = round(join["out_s"] * source.sample_rate)
        assert np.abs(np.diff(made.audio.samples[:, at - 3 : at + 3])).max() < 0.05
