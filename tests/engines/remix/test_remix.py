"""The remix generator as an engine: lengths, seeds, order, failures, stopping."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import synth
from pydantic import ValidationError
from sequenced import BAR_S, sequenced

from pipeline.config import Output
from pipeline.engines import cards
from pipeline.engines.base import EngineSettings, Generator
from pipeline.engines.remix import ENGINE, RemixParams
from pipeline.errors import BadAudio, Stopped
from pipeline.records import Audio, Failure, Variation, VariationRequest
from pipeline.stages import engine_duration_s, finish

SONG = synth.play(bpm=124, sections="verse chorus verse chorus")  # 16 bars, 31 s and a last chord


def load(audio: Audio) -> Generator:
    generator: Any = ENGINE.load(EngineSettings(sample_rate=audio.sample_rate))
    return generator


def request(
    audio: Audio, seconds: float, *, seed: int = 0, request_id: str = "r", **params: Any
) -> VariationRequest:
    return VariationRequest(request_id, f"track {id(audio)}", audio, seconds, seed, params)


def run(
    *requests: VariationRequest, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Variation | Failure]:
    generator = load(requests[0].audio)
    results = generator.generate(requests, progress=lambda *_: None, should_stop=should_stop)
    return {result.request_id: result for result in results}


def remix(audio: Audio, seconds: float, **params: Any) -> Variation:
    result = run(request(audio, seconds, **params))["r"]
    assert isinstance(result, Variation), result
    return result


def test_its_card_is_found_and_names_no_model() -> None:
    card = cards()["remix"]
    assert (card.stage, card.rank, card.default_model) == ("generate", 0, None)
    assert card.params is RemixParams


@pytest.mark.parametrize(
    "wrong", [{"temperature": 2.1}, {"crossfade_ms": 0}, {"min_segment_beats": 0}, {"tempo": 1}]
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        RemixParams.model_validate(wrong)


SOURCES = {
    "music": lambda: synth.play(sections="verse chorus").audio,
    "music that loops": lambda: synth.play(sections="verse verse", ending=False).audio,
    "three in a bar": lambda: synth.play(sections="verse chorus", meter=3).audio,
    "mono at 8 kHz": lambda: synth.play(sections="verse chorus", sample_rate=8000, channels=1).audio,
    "96 kHz": lambda: synth.play(sections="verse", sample_rate=96000).audio,
    "pads": lambda: synth.pads(12.0),
    "drone": lambda: synth.drone(8.0),
    "noise": lambda: synth.noise(6.0),
    "impulses": lambda: synth.impulses(8.0),
    "speech": lambda: synth.speech(8.0),
    "two seconds": lambda: Audio(SONG.audio.samples[:, : 2 * 44100], 44100),
    "1.2 s": lambda: Audio(SONG.audio.samples[:, : round(1.2 * 44100)], 44100),
    "0.3 s": lambda: Audio(SONG.audio.samples[:, : round(0.3 * 44100)], 44100),
}


@pytest.mark.parametrize("name", SOURCES)
def test_any_source_gives_any_length_to_the_sample(name: str) -> None:
    audio = SOURCES[name]()
    lengths_s = [
        2.0,
        0.5 * audio.duration_s,
        audio.duration_s,
        2.0137 * audio.duration_s,
        4 * audio.duration_s,
    ]
    wanted = [
        request(
            audio,
            seconds,
            request_id=f"{seconds} at {temperature}",
            temperature=temperature,
            min_segment_beats=n,
        )
        for seconds in lengths_s
        for temperature, n in ((0.0, 8), (0.8, 8), (2.0, 64))
    ]
    results = run(*wanted)
    for one in wanted:
        result = results[one.request_id]
        assert isinstance(result, Variation), (one.request_id, result)
        samples = result.audio.samples
        assert samples.shape == (audio.channels, round(one.duration_s * audio.sample_rate))
        assert samples.dtype == np.float32 and np.isfinite(samples).all()
        assert np.abs(samples).max() > 0.05
        json.dumps(dict(result.details), allow_nan=False)
        assert result.own_beats is not None
        edges_s = result.own_beats.edges_s
        assert edges_s[0] >= 0 and edges_s[-1] <= one.duration_s
        if result.own_beats.tempo_bpm is not None and edges_s.size > 1:
            assert np.diff(edges_s).min() > 30 / result.own_beats.tempo_bpm


def test_its_beats_are_those_of_the_passages_that_it_plays() -> None:
    made = remix(SONG.audio, 40.0, temperature=1.5)
    beats, joins = made.own_beats, made.details["joins"]
    assert beats is not None and len(joins) > 2
    assert (beats.tempo_bpm, beats.meter) == (pytest.approx(124, rel=0.005), 4)
    assert np.diff(beats.edges_s) == pytest.approx(60 / 124, abs=0.02)
    assert beats.edges_s.size == pytest.approx(40.0 * 124 / 60, abs=2)
    for join in joins:  # on bar lines
        edge = int(np.argmin(np.abs(beats.edges_s - join["out_s"])))
        assert beats.edges_s[edge] == pytest.approx(join["out_s"], abs=0.02)
        assert (edge - beats.phase) % beats.meter == 0


@pytest.mark.parametrize("settings", [Output(loop=True), Output(length="bars")])
def test_bars_are_whole_where_a_loop_was_played_from_its_end_to_its_start(settings: Output) -> None:
    source = sequenced(16.0)
    seconds = engine_duration_s(45.0, settings)
    for seed in range(5):
        one = request(source, seconds, seed=seed)
        made = run(one)["r"]
        assert isinstance(made, Variation)
        ended = finish(made, one, settings, length_s=45.0, source_lufs=-14.0)
        assert ended.bars is not None
        assert ended.audio.duration_s == pytest.approx(ended.bars * BAR_S, abs=0.02)


MODES = {"music": "beats", "impulses": "beats"} | dict.fromkeys(["pads", "drone", "noise", "speech"], "grid")


@pytest.mark.parametrize(("name", "mode"), MODES.items())
def test_beats_are_used_only_where_the_music_has_them(name: str, mode: str) -> None:
    assert remix(SOURCES[name](), 10.0).details["mode"] == mode


def test_equal_seeds_give_equal_samples_and_most_others_different_ones() -> None:
    wanted = [request(SONG.audio, 24.0, seed=seed, request_id=str(seed)) for seed in range(4)]
    first, again = run(*wanted), run(*wanted)
    samples = {}
    for key, made in first.items():
        repeated = again[key]
        assert isinstance(made, Variation) and isinstance(repeated, Variation)
        np.testing.assert_array_equal(made.audio.samples, repeated.audio.samples)
        samples[key] = made.audio.samples.tobytes()
    assert len(set(samples.values())) >= 3


def test_a_result_does_not_depend_on_its_batch_or_on_its_order() -> None:
    other, third = synth.pads(8.0), synth.noise(4.0)
    wanted = request(SONG.audio, 20.0, seed=5, request_id="wanted")
    alone = run(wanted)["wanted"]
    fillers = [
        request(audio, 6.0, seed=k, request_id=str(k)) for k, audio in enumerate([other, third, SONG.audio])
    ]
    generator = load(SONG.audio)
    for batch in ([fillers[2], wanted, *fillers[:2]], [*fillers[:2], wanted], [wanted]):
        results = list(generator.generate(batch, progress=lambda *_: None, should_stop=lambda: False))
        assert {result.request_id for result in results} == {one.request_id for one in batch}
        (result,) = [result for result in results if result.request_id == "wanted"]
        assert isinstance(result, Variation) and isinstance(alone, Variation)
        np.testing.assert_array_equal(result.audio.samples, alone.audio.samples)
        assert result.details == alone.details


def test_temperature_0_at_the_sources_length_returns_the_source() -> None:
    result = remix(SONG.audio, SONG.audio.duration_s, temperature=0)
    np.testing.assert_array_equal(result.audio.samples, SONG.audio.samples)
    assert result.details["joins"] == [] and result.details["ending"] == "own"


def test_temperature_0_ignores_the_seed_and_makes_few_joins() -> None:
    half = [remix(SONG.audio, 18.0, temperature=0, seed=seed) for seed in (1, 2)]
    np.testing.assert_array_equal(half[0].audio.samples, half[1].audio.samples)
    assert len(half[0].details["joins"]) <= 2


def test_more_temperature_makes_more_joins() -> None:
    def joins(temperature: float) -> float:
        wanted = [
            request(SONG.audio, 40.0, seed=k, request_id=str(k), temperature=temperature) for k in range(6)
        ]
        return float(
            np.mean([len(v.details["joins"]) for v in run(*wanted).values() if isinstance(v, Variation)])
        )

    counts = [joins(temperature) for temperature in (0.3, 0.6, 1.2, 2.0)]
    assert all(low <= high for low, high in pairwise(counts)) and counts[-1] > counts[0] + 1, counts


def test_a_variation_is_not_a_copy() -> None:
    wanted = [
        request(SONG.audio, SONG.audio.duration_s, seed=seed, request_id=str(seed)) for seed in range(4)
    ]
    for variation in run(*wanted).values():
        assert isinstance(variation, Variation)
        assert not np.array_equal(variation.audio.samples, SONG.audio.samples)


def test_joins_are_at_least_min_segment_beats_apart() -> None:
    details = remix(SONG.audio, 60.0, temperature=2.0, min_segment_beats=12).details
    times_s = [0.0, *(join["out_s"] for join in details["joins"])]
    assert len(times_s) > 2
    tolerance_s = 0.03  # the alignment moves a join by up to 20 ms
    assert min(np.diff(times_s)) > 12 * SONG.beat_s - tolerance_s


def test_the_details_describe_the_source() -> None:
    details = remix(SONG.audio, 45.0).details
    assert details["tempo_bpm"] == pytest.approx(124, rel=0.002)
    assert details["meter"] == 4 and details["ending"] in {"own", "fade"}
    assert details["pulse_clarity"] > 0.5


def test_a_read_only_memory_map_gives_the_same_samples(tmp_path: Any) -> None:
    np.save(tmp_path / "a.npy", SONG.audio.samples)
    mapped = Audio(np.load(tmp_path / "a.npy", mmap_mode="r"), 44100)
    np.testing.assert_array_equal(remix(mapped, 12.0).audio.samples, remix(SONG.audio, 12.0).audio.samples)


def test_a_request_that_cannot_be_made_fails_alone() -> None:
    bad = request(Audio(SONG.audio.samples[:, :4000], 44100), 10.0, request_id="bad")
    results = run(bad, request(SONG.audio, 10.0, request_id="good"))
    assert isinstance(results["good"], Variation)
    failure = results["bad"]
    assert isinstance(failure, Failure) and isinstance(failure.error, BadAudio)


def test_it_stops_between_steps_and_keeps_what_it_yielded() -> None:
    asked = iter([False] * 4 + [True] * 9)
    wanted = [request(SONG.audio, 10.0, seed=k, request_id=str(k)) for k in range(3)]
    results = load(SONG.audio).generate(wanted, progress=lambda *_: None, should_stop=lambda: next(asked))
    assert next(results).request_id == "0"
    with pytest.raises(Stopped):
        list(results)


def test_progress_rises_to_its_total() -> None:
    reported: list[tuple[str, int, int]] = []
    list(
        load(SONG.audio).generate(
            [request(SONG.audio, 10.0)], progress=lambda *a: reported.append(a), should_stop=lambda: False
        )
    )
    assert reported == [("r", done, 3) for done in range(4)]
