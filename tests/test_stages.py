"""What `finish` makes of a generator's result under each setting of `output`."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
from sequenced import sequenced

from pipeline import audio, stages
from pipeline.audio.wav import write_wav
from pipeline.config import Output
from pipeline.errors import BadAudio, Stopped
from pipeline.music.beats import Beats
from pipeline.outbox.manifest import markers
from pipeline.records import Audio, Variation, VariationRequest
from pipeline.scores import analyse_source

RATE, DURATION_S = 22050, 4.0


def music(seconds: float) -> Audio:
    """A chord that swells once a second, stereo."""
    t = np.arange(round(seconds * RATE)) / RATE
    chord = sum(np.sin(2 * np.pi * hz * t + phase) for phase, hz in enumerate((220.0, 277.2, 329.6)))
    return Audio(np.float32([0.05 * chord * (1.5 + np.sin(2 * np.pi * t))] * 2), RATE)


def finished(
    made: Audio,
    *,
    length_s: float = DURATION_S,
    source_lufs: float = -20.0,
    details: Any = None,
    own_beats: Beats | None = None,
    on_step: Callable[[], None] = lambda: None,
    **output: Any,
) -> stages.Finished:
    request = VariationRequest("r", "t", made, made.duration_s, 1)
    settings = Output.model_validate(output)
    variation = Variation("r", made, details or {}, own_beats)
    return stages.finish(
        variation, request, settings, length_s=length_s, source_lufs=source_lufs, on_step=on_step
    )


def test_the_default_is_one_gain_to_the_loudness_and_nothing_else() -> None:
    made = music(DURATION_S)
    result = finished(made)
    gain = result.audio.samples.max() / made.samples.max()
    assert np.allclose(result.audio.samples, gain * made.samples, atol=1e-6)
    assert result.loudness_lufs == pytest.approx(-14.0, abs=0.01)
    assert audio.loudness_lufs(result.audio) == pytest.approx(-14.0, abs=0.01)


def test_the_loudness_can_be_that_of_the_source() -> None:
    result = finished(music(DURATION_S), source_lufs=-23.5, loudness_lufs="source")
    assert result.loudness_lufs == pytest.approx(-23.5, abs=0.01)
    assert audio.loudness_lufs(result.audio) == pytest.approx(-23.5, abs=0.01)


def test_the_source_s_loudness_is_that_of_the_file_before_any_gain() -> None:
    quiet = Audio(0.1 * music(DURATION_S).samples, RATE)
    settings = stages.Normalize.model_validate({"sample_rate": RATE})
    normalized = stages.normalize(quiet, settings)
    assert normalized.source_lufs == pytest.approx(audio.loudness_lufs(quiet), abs=0.01)
    assert normalized.levels.loudness_lufs == pytest.approx(audio.loudness_lufs(normalized.audio), abs=0.01)
    assert normalized.levels.true_peak_dbtp == pytest.approx(audio.true_peak_dbtp(normalized.audio), abs=0.01)


@pytest.mark.parametrize("silence", [0.0, 0.02])  # digital zeros, or what a converter with an offset records
def test_an_offset_of_the_source_is_removed_before_it_hides_silence(silence: float) -> None:
    settings = stages.Normalize.model_validate({"sample_rate": RATE})
    plain = music(DURATION_S)
    ends = np.full((2, 5 * RATE), silence, np.float32)
    shifted = Audio(np.concatenate([ends, plain.samples + 0.02, ends], axis=1).astype(np.float32), RATE)
    normalized, expected = stages.normalize(shifted, settings), stages.normalize(plain, settings)
    assert normalized.audio.duration_s == pytest.approx(DURATION_S, abs=0.12)
    assert abs(normalized.audio.samples.mean()) < 1e-3
    ends = normalized.audio.samples[:, [0, -1]]
    assert np.abs(ends).max() <= np.abs(expected.audio.samples[:, [0, -1]]).max() + 0.01
    assert normalized.source_lufs == pytest.approx(expected.source_lufs, abs=0.1)
    nothing = 0.02 + 1e-5 * np.random.default_rng(0).standard_normal((2, 5 * RATE))
    with pytest.raises(BadAudio, match="is silent"):
        stages.normalize(Audio(nothing.astype(np.float32), RATE), settings)


@pytest.mark.parametrize(
    ("output", "rate"),
    [({}, RATE), ({"sample_rate": 48000}, 48000), ({"format": "opus"}, 24000), ({"format": "mp3"}, RATE)],
)
def test_the_sample_rate_is_the_asked_one_or_one_that_the_format_has(output: Any, rate: int) -> None:
    made = finished(music(DURATION_S), **output).audio
    assert (made.sample_rate, made.n_samples) == (rate, DURATION_S * rate)


def test_an_offset_is_removed_and_the_ends_are_faded() -> None:
    shifted = Audio(music(DURATION_S).samples + np.float32(0.01), RATE)
    made = finished(shifted, fade_in_s=0.5, fade_out_s=1.0).audio
    assert np.max(np.abs(made.samples[:, [0, -1]])) < 1e-5
    assert abs(float(made.samples[:, RATE:-RATE].mean())) < 2e-3


def test_a_loop_is_cut_from_more_on_its_bars_without_fades_and_its_joins_are_moved_along() -> None:
    output = {"loop": True, "sample_rate": 44100}
    made_s = stages.engine_duration_s(16.0, Output.model_validate(output))
    joins = [{"out_s": at, "to_s": at + 20.0} for at in (0.01, 8.0, made_s - 0.01)]
    details = {"joins": joins, "start_s": 3.0, "ending": "own"}
    result = finished(sequenced(made_s), length_s=16.0, details=details, **output)
    assert (result.audio.n_samples, result.bars) == (16 * 44100, 8)
    assert result.loop is not None and result.loop["similarity"] > 0.9
    [join] = result.details["joins"]
    start_s = 8.0 - join["out_s"]
    assert 0 < start_s < made_s - 16.0
    assert (result.details["start_s"], result.details["ending"]) == (
        pytest.approx(20.0 + start_s, abs=1e-3),
        "cut",
    )
    levels = [float(np.mean(part**2)) for part in np.split(result.audio.samples[0], 8)]
    assert max(levels) < 1.2 * min(levels)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_finishing_ends_at_any_of_its_steps_if_it_is_asked_to(step: int) -> None:
    steps = iter(range(1, step + 1))

    def on_step() -> None:
        if next(steps) == step:
            raise Stopped("as by a signal")

    with pytest.raises(Stopped):
        finished(music(DURATION_S), limiter=True, on_step=on_step)


@pytest.mark.parametrize("rate", [44100, 192000])
@pytest.mark.parametrize("output", [{}, {"loop": True}])
def test_the_cue_points_of_a_wav_are_at_the_samples_of_the_joins(output: Any, rate: int) -> None:
    made = audio.resample(sequenced(24.0), rate)
    marked = [made.n_samples // 2 + 12_347 * n for n in range(3)]
    samples = made.samples.copy()
    samples[:, marked] = 1.0
    details = {"joins": [{"out_s": round(at / rate, 6)} for at in marked]}  # as the remix gives them
    result = finished(Audio(samples, rate), length_s=12.0 if output else 24.0, details=details, **output)

    file, record = io.BytesIO(), {"details": result.details, "sample_rate": rate}
    write_wav(file, result.audio, bit_depth=24, tags={}, markers=markers(record))
    wav = file.getvalue()
    _, *points = struct.unpack_from("<I" + "II4sIII" * 3, wav, wav.index(b"cue ") + 8)
    read, _ = soundfile.read(io.BytesIO(wav))
    assert points[5::6] == sorted(np.argsort(np.abs(read[:, 0]))[-3:])


def test_a_length_in_bars_ends_faded_on_the_bar_line_nearest_to_the_asked_one() -> None:
    settings = Output.model_validate({"length": "bars"})
    made = sequenced(stages.engine_duration_s(15.3, settings))
    made = audio.remove_offset(made)  # of the kicks
    details = {"joins": [{"out_s": 8.0}, {"out_s": 17.0}]}
    result = finished(made, length_s=15.3, details=details, length="bars")
    assert result.details["joins"] == [{"out_s": 8.0}]
    assert (result.bars, result.audio.duration_s) == (8, pytest.approx(16.0, abs=0.02))
    assert np.max(np.abs(result.audio.samples[:, -1])) < 1e-4
    n = result.audio.n_samples - round(0.05 * made.sample_rate)
    gain = result.audio.samples[0, :n].max() / made.samples[0, :n].max()
    assert np.allclose(result.audio.samples[:, :n], gain * made.samples[:, :n], atol=1e-5)


def test_bars_are_those_of_known_beats() -> None:
    """Here of every second beat that would be found."""
    settings = Output.model_validate({"length": "bars"})
    made = sequenced(stages.engine_duration_s(15.3, settings))
    known = Beats(np.arange(0.0, made.duration_s), 60.0, 1.0, 2, 0)
    ended = finished(made, length_s=15.3, own_beats=known, length="bars")
    looped = finished(sequenced(40.0), length_s=15.3, own_beats=known, loop=True)
    assert ended.own_beats is looped.own_beats is known
    assert (ended.bars, ended.audio.duration_s) == (8, pytest.approx(16.0, abs=0.001))
    assert (looped.bars, looped.audio.duration_s) == (8, pytest.approx(16.0, abs=0.001))
    known = Beats(np.arange(0.0, made.duration_s), 60.0, 1.0, 3, 0)
    ended = finished(made, length_s=15.3, own_beats=known, length="bars")
    assert (ended.bars, ended.audio.duration_s) == (5, pytest.approx(15.0, abs=0.001))


def test_a_length_in_bars_is_exact_where_there_is_no_beat() -> None:
    settings = Output.model_validate({"length": "bars"})
    result = finished(music(stages.engine_duration_s(4.0, settings)), length="bars")
    tempo_bpm = analyse_source(result.audio).tempo_bpm
    assert (result.bars, tempo_bpm, result.audio.n_samples) == (None, None, 4 * RATE)


def test_tempo_and_key_are_those_of_the_result() -> None:
    result = finished(sequenced(16.0), length_s=16.0)
    heard = analyse_source(result.audio)
    assert heard.tempo_bpm == pytest.approx(120, abs=0.5)
    assert heard.key is not None
    assert str(heard.key) in {
        "A minor",
        "C major",
    }  # its chords are in both
