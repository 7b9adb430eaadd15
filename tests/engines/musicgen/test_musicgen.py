"""The MusicGen generator, on a tiny random checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from musicgen_setup import codes, generator_with, never, no_progress, results_of
from pydantic import ValidationError
from tones import A_MINOR, EVERY_PARAMETER, MELODY_OR_PROMPT, RequestFn

from pipeline.engines import cards
from pipeline.engines.base import EngineSettings
from pipeline.engines.musicgen import ENGINE, MusicgenParams, conditioning
from pipeline.errors import Stopped
from pipeline.records import Audio, Failure, Variation


@EVERY_PARAMETER
def test_every_parameter_changes_the_tokens(musicgen: Any, request_for: RequestFn, change: dict) -> None:
    assert not np.array_equal(codes(musicgen, request_for()), codes(musicgen, request_for(**change)))


@MELODY_OR_PROMPT
def test_melody_and_prompt_change_the_tokens_at_temperature_0_without_guidance(
    musicgen: Any, request_for: RequestFn, change: dict
) -> None:
    plain = {"temperature": 0.0, "guidance": 1.0}
    changed = codes(musicgen, request_for(**plain, **change))
    assert not np.array_equal(codes(musicgen, request_for(**plain)), changed)


def test_a_request_gives_the_same_bits_alone_in_a_batch_and_in_any_order(
    musicgen: Any, request_for: RequestFn
) -> None:
    """The sound; the tokens of each kind of decoder are compared in test_scheduler."""
    requests = [
        request_for("a"),
        request_for("b", pitches_hz=A_MINOR, prompt="warm synths", guidance=1.0),
        request_for("c", seed=0, temperature=1.4, duration_s=0.7),
    ]
    together, reversed_ = results_of(musicgen, *requests), results_of(musicgen, *reversed(requests))
    for wanted in requests:
        (alone,) = results_of(musicgen, wanted).values()
        for other in (together[wanted.request_id], reversed_[wanted.request_id]):
            assert alone.audio.samples.tobytes() == other.audio.samples.tobytes()


@pytest.mark.parametrize("wanted", ["mix", "harmonic", "auto"])
@pytest.mark.parametrize("duration_s", [1.0, 35.0])
def test_prepared_requests_give_the_same_tokens(
    short_musicgen: Any, request_for: RequestFn, wanted: str, duration_s: float
) -> None:
    asked = request_for(melody=wanted, duration_s=duration_s)
    assert ENGINE.prepare is not None
    found = ENGINE.prepare([asked], never)[asked.request_id]
    prepared = replace(asked, prepared=found)
    if found[0] is not None:  # then the track itself isn't read
        prepared = replace(prepared, audio=Audio(np.zeros((2, 100), np.float32), 44100))
    np.testing.assert_array_equal(codes(short_musicgen, prepared), codes(short_musicgen, asked))


def test_the_global_random_state_is_not_used(musicgen: Any, request_for: RequestFn) -> None:
    import torch

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    codes(musicgen, request_for())
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("duration_s", [0.05, 1.0, 1.013, 2.5])
def test_the_result_has_the_asked_length(musicgen: Any, request_for: RequestFn, duration_s: float) -> None:
    (result,) = results_of(musicgen, request_for(duration_s=duration_s)).values()
    assert result.audio.samples.shape == (1, round(duration_s * 32000))
    assert result.audio.samples.dtype == np.float32
    assert result.audio.sample_rate == musicgen.sample_rate == 32000


def test_the_whole_window_can_be_asked_for(short_musicgen: Any, request_for: RequestFn) -> None:
    (result,) = results_of(short_musicgen, request_for(duration_s=3.0)).values()
    assert result.audio.n_samples == 96_000
    assert (result.details["frames"], result.details["windows"]) == (150, 1)


def test_more_than_the_window_is_made_in_windows(short_musicgen: Any, request_for: RequestFn) -> None:
    (result,) = results_of(short_musicgen, request_for(duration_s=5.01, guidance=1.0)).values()
    assert result.audio.n_samples == round(5.01 * 32000)
    assert (result.details["frames"], result.details["windows"]) == (251, 3)


def test_stereo_checkpoints_make_two_different_channels(stereo_musicgen: Any, request_for: RequestFn) -> None:
    (result,) = results_of(stereo_musicgen, request_for(duration_s=1.013)).values()
    left, right = result.audio.samples
    assert result.audio.samples.shape == (2, round(1.013 * 32000))
    assert not np.array_equal(left, right)
    assert codes(stereo_musicgen, request_for()).shape == (8, 25)


@pytest.mark.parametrize("engine", ["musicgen", "stereo_musicgen"])
def test_the_sound_is_encodecs_decoding_of_the_tokens(
    engine: str, request_for: RequestFn, request: pytest.FixtureRequest
) -> None:
    """Reference: the bare audio encoder on the reported tokens, bit for bit."""
    generator = request.getfixturevalue(engine)
    import torch

    tokens = codes(generator, request_for())
    channels = generator.checkpoint.channels
    with torch.inference_mode():
        decode = generator.checkpoint.codec().decode
        parts = [torch.from_numpy(tokens[channel::channels])[None, None] for channel in range(channels)]
        expected = torch.cat([decode(part, audio_scales=[None]).audio_values[0] for part in parts])
    (result,) = results_of(generator, request_for()).values()
    np.testing.assert_array_equal(result.audio.samples, expected.numpy())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("engine", ["exact_musicgen", "exact_stereo_musicgen"])
def test_at_temperature_0_the_tokens_are_those_of_the_librarys_greedy_search(
    engine: str, request_for: RequestFn, guidance: float, request: pytest.FixtureRequest
) -> None:
    """Reference: transformers' generate() with its own guidance and greedy search, bit for bit."""
    import torch
    from transformers import MusicgenMelodyForConditionalGeneration

    generator = request.getfixturevalue(engine)
    wanted = request_for(temperature=0.0, guidance=guidance, prompt="warm piano")
    checkpoint = generator.checkpoint
    model = MusicgenMelodyForConditionalGeneration.from_pretrained(checkpoint.weights.folder)
    with torch.inference_mode():
        expected = model.eval().generate(
            **checkpoint.tokenizer(["warm piano"], return_tensors="pt"),
            input_features=torch.from_numpy(conditioning.track_chroma(checkpoint, wanted.audio, [0])[0])[
                None
            ],
            do_sample=False,
            guidance_scale=guidance,
            max_length=25 + 4,
        )
    (result,) = results_of(generator, wanted).values()
    np.testing.assert_array_equal(result.audio.samples, expected[0].numpy())


def test_progress_counts_every_frame_to_the_last(musicgen: Any, request_for: RequestFn) -> None:
    seen: list[tuple[str, int, int]] = []
    requests = [request_for("a"), request_for("b", guidance=1.0)]
    list(musicgen.generate(requests, progress=lambda *step: seen.append(step), should_stop=never))
    steps = [*range(1, 26), 25, 25, 25]  # frames of half a second, and the lag of the last of 4 codebooks
    for name in "ab":
        counted = [(done, total) for which, done, total in seen if which == name]
        assert counted == [(n, 26) for n in [*steps, 26]]  # the last is the sound


def test_progress_counts_each_decoded_piece_and_a_stop_between_them_keeps_the_tokens(
    musicgen: Any, request_for: RequestFn, tmp_path: Path
) -> None:
    """100 s whose tokens are saved already: two pieces of 30 s and one of 40 s."""
    from pipeline.engines.musicgen.savepoints import Savepoints

    engine = generator_with(musicgen.checkpoint, "int8", saved=Savepoints(tmp_path))
    request, seen = request_for(duration_s=100.0), list[tuple[int, int]]()
    (state,) = engine.prepare([request], never)
    engine.saved.save(state.identity, np.random.default_rng(0).integers(0, 2048, (4, 5000)))

    def run(should_stop: Any) -> Any:
        progress = lambda *step: seen.append(step[1:])  # noqa: E731
        return list(engine.generate([request], progress=progress, should_stop=should_stop))

    with pytest.raises(Stopped):
        run(lambda: bool(seen))
    assert seen == [(5001, 5003)]
    seen.clear()
    (result,) = run(never)
    assert isinstance(result, Variation)
    assert seen == [(5001, 5003), (5002, 5003), (5003, 5003)]
    assert not list(tmp_path.iterdir())


def test_it_stops_within_one_step(musicgen: Any, request_for: RequestFn) -> None:
    seen: list[int] = []

    def progress(request_id: str, done: int, total: int) -> None:
        if request_id == "b":
            seen.append(done)

    results = musicgen.generate(
        [request_for("a"), request_for("b", duration_s=20.0)],
        progress=progress,
        should_stop=lambda: len(seen) >= 28 + 5,
    )
    assert isinstance(next(results), Variation)
    with pytest.raises(Stopped):
        next(results)
    assert seen == list(range(1, 34))


def test_it_does_not_start_when_already_asked_to_stop(musicgen: Any, request_for: RequestFn) -> None:
    with pytest.raises(Stopped):
        next(musicgen.generate([request_for()], progress=no_progress, should_stop=lambda: True))


def silence(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = checkpoint.codec()
    for parameter in codec.decoder.layers[-1].parameters():
        parameter.zero_()
    monkeypatch.setattr(type(checkpoint), "codec", lambda self: codec)


def misfit(checkpoint: Any, _: pytest.MonkeyPatch) -> None:
    checkpoint.text_projection.weight.data = checkpoint.text_projection.weight.data[:, :3]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(silence, "made silence"), (misfit, "mat1 and mat2")],
)
def test_an_error_of_the_model_fails_each_request(
    musicgen_folder: Path,
    request_for: RequestFn,
    damage: Callable[[Any, pytest.MonkeyPatch], None],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = ENGINE.load(EngineSettings(model=str(musicgen_folder)))
    import torch

    with torch.no_grad():
        damage(broken.checkpoint, monkeypatch)
    results = results_of(broken, request_for("a", prompt="warm"), request_for("b", prompt="warm"))
    assert [type(result) for result in results.values()] == [Failure, Failure]
    assert sentence in str(results["a"].error)


def test_a_failed_request_does_not_hold_the_text_encoder(
    musicgen: Any, request_for: RequestFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback of the error refers to the function that makes the conditions."""
    import gc
    import weakref

    from pipeline.engines.musicgen.checkpoint import Checkpoint

    opened: list[Any] = []
    text_encoder = Checkpoint.text_encoder

    def watched(self: Checkpoint) -> Any:
        encoder = text_encoder(self)
        opened.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(Checkpoint, "text_encoder", watched)
    prepared = musicgen.prepare(
        [request_for(prompt="warm"), request_for(prompt="slow", temperature=-1)], never
    )
    gc.collect()
    assert len(prepared) == 2
    assert [ref() for ref in opened] == [None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"guidance": 0.5},
        {"top_k": -1},
        {"top_p": 1.5},
        {"prompt": "x" * 501},
        {"tempo": 120},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_parameters_out_of_range_or_unknown_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        MusicgenParams.model_validate(wrong)


def test_the_card_is_found_without_loading_the_model(tmp_path: Path) -> None:
    assert cards()["musicgen"] is ENGINE
    assert ENGINE.license_of("facebook/musicgen-stereo-melody") == "CC-BY-NC-4.0 (MusicGen weights)"
    (tmp_path / "mine").mkdir()
    assert ENGINE.license_of(str(tmp_path / "mine")) == (
        "that of the checkpoint in mine; MusicGen's published weights are CC-BY-NC-4.0"
    )
