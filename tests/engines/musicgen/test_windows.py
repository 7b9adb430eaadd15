"""Music longer than the model's window: the plan, the delay pattern, and the continuation of windows."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from musicgen_setup import codes, request_state, results_of, run_requests
from tones import RequestFn, tones

from pipeline.engines.musicgen.windows import STRIDE, UNKNOWN, DelayedWindow, Window, windows
from pipeline.records import Audio, VariationRequest

pytestmark = pytest.mark.long  # half a minute together

DELAYS = {"mono": np.arange(4), "stereo": np.arange(8) // 2}
PAD = 2048

SHORT, SHORT_STRIDE = 150, 90  # frames of the short checkpoint's windows of 3 s


# -- plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_frames", "plan"),
    [
        (1, [(0, 1)]),
        (1500, [(0, 1500)]),
        (1501, [(0, 1500), (900, 601)]),
        (3250, [(0, 1500), (900, 1500), (1800, 1450)]),
    ],
)
def test_windows_of_30_s_begin_every_18_s(n_frames: int, plan: list[tuple[int, int]]) -> None:
    assert STRIDE * 30 == 18
    assert [(window.start, window.frames) for window in windows(n_frames, 1500, 900)] == plan


def test_every_plan_covers_all_frames_and_its_windows_overlap() -> None:
    for n_frames in range(1, 1000, 7):
        plan = windows(n_frames, 150, 90)
        assert plan[0].start == 0
        assert plan[-1].start + plan[-1].frames == n_frames
        for before, window in pairwise(plan):
            assert window.start == before.start + 90
            assert before.frames == 150
            assert window.frames > 60  # more than the overlap


# -- the delay pattern -------------------------------------------------------------------------------


def delay_table(codes: np.ndarray, delays: np.ndarray) -> np.ndarray:
    """The delay pattern as a table, (steps + 1, codebooks): row i is the input of step i."""
    books, frames = codes.shape
    table = np.full((frames + int(delays.max()) + 1, books), PAD)
    for book in range(books):
        for frame in range(frames):
            table[1 + frame + delays[book], book] = codes[book, frame]
    return table


def music(books: int, frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2048, (books, frames))


@pytest.mark.parametrize("delays", DELAYS.values(), ids=DELAYS)
def test_the_input_of_a_step_is_what_the_step_before_picked(delays: np.ndarray) -> None:
    whole = music(len(delays), 50)
    delayed = DelayedWindow(whole, Window(20, 12), delays, PAD)
    assert delayed.steps == 15
    np.testing.assert_array_equal(delayed.inputs(0, 16), delay_table(whole[:, 20:32], delays))
    np.testing.assert_array_equal(delayed.inputs(4, 9), delay_table(whole[:, 20:32], delays)[4:9])


@pytest.mark.parametrize("delays", DELAYS.values(), ids=DELAYS)
def test_the_stored_steps_are_the_music(delays: np.ndarray) -> None:
    """Each step picks the next row of the table; only tokens of frames inside the window are stored."""
    whole, made_codes = music(len(delays), 20), np.full((len(delays), 20), UNKNOWN)
    delayed = DelayedWindow(made_codes, Window(0, 20), delays, PAD)
    table = delay_table(whole, delays)
    for step in range(delayed.steps):
        assert delayed.known_steps == step
        np.testing.assert_array_equal(delayed.inputs(step, step + 1)[0], table[step])
        delayed.store(step, table[step + 1 : step + 2])
    assert delayed.known_steps == delayed.steps == 23
    np.testing.assert_array_equal(made_codes, whole)


@pytest.mark.parametrize("delays", DELAYS.values(), ids=DELAYS)
@pytest.mark.parametrize("stopped_after", [0, 1, 2, 3, 4, 11, 13])
def test_an_interrupted_window_is_resumed_at_its_first_unknown_step(
    delays: np.ndarray, stopped_after: int
) -> None:
    """A window that begins with 10 known frames, interrupted after so many steps."""
    whole, made_codes = music(len(delays), 40), np.full((len(delays), 40), UNKNOWN)
    made_codes[:, :30] = whole[:, :30]
    delayed = DelayedWindow(made_codes, Window(20, 12), delays, PAD)
    table = delay_table(whole[:, 20:32], delays)
    for step in range(min(stopped_after, delayed.steps)):
        delayed.store(step, table[step + 1 : step + 2])
    expected = max(10, stopped_after)
    assert DelayedWindow(made_codes, Window(20, 12), delays, PAD).known_steps == expected
    np.testing.assert_array_equal(delayed.inputs(0, expected + 1), table[: expected + 1])


def test_known_tokens_are_never_replaced() -> None:
    kept = music(4, 12)
    made_codes = kept.copy()
    made_codes[:, 8:] = UNKNOWN
    delayed = DelayedWindow(made_codes, Window(0, 12), DELAYS["mono"], PAD)
    for step in range(delayed.steps):
        delayed.store(step, np.full((1, 4), 5))
    np.testing.assert_array_equal(made_codes[:, :8], kept[:, :8])
    assert (made_codes[:, 8:] == 5).all()


# -- with a model ------------------------------------------------------------------------------------


def test_three_windows_have_no_seam_in_level(short_musicgen: Any, request_for: RequestFn) -> None:
    """RMS of 50 ms on either side of a join: no further apart than elsewhere, and 3 dB at most."""
    (result,) = results_of(short_musicgen, request_for(duration_s=6.5, guidance=1.0)).values()
    assert result.audio.samples.shape == (1, 208_000)
    assert (result.details["frames"], result.details["windows"]) == (325, 3)
    levels_db = 10 * np.log10((result.audio.samples.reshape(130, 1600) ** 2).mean(axis=1, dtype=np.float64))
    steps_db = np.abs(np.diff(levels_db))
    for join_s in (3.0, 4.8):
        assert steps_db[round(20 * join_s) - 1] <= min(3.0, 2 * np.percentile(steps_db, 95))


def test_a_later_window_follows_its_own_part_of_the_track(short_musicgen: Any) -> None:
    """Two tracks that differ from 3.5 s on: the tokens of the first window, to 3 s, are equal."""
    common, rest = tones(440.0, 554.37, seconds=3.5), (tones(pitch, seconds=4.0) for pitch in (440.0, 261.63))
    first, second = (
        codes(
            short_musicgen,
            VariationRequest(
                "a",
                f"track {index}",
                Audio(np.concatenate([common.samples, its.samples], axis=1), common.sample_rate),
                5.0,
                7,
                {"guidance": 1.0},
            ),
        )
        for index, its in enumerate(rest)
    )
    np.testing.assert_array_equal(first[:, :SHORT], second[:, :SHORT])
    assert (first[:, SHORT:] != second[:, SHORT:]).mean() > 0.5


def test_a_track_shorter_than_asked_is_repeated(short_musicgen: Any) -> None:
    """Reference: the track repeated by hand."""
    track = tones(440.0, 554.37, 659.26, seconds=1.5)
    thrice = Audio(np.tile(track.samples, 6), track.sample_rate)
    once, by_hand = (
        codes(short_musicgen, VariationRequest("a", f"track {index}", audio, 5.0, 7, {"guidance": 1.0}))
        for index, audio in enumerate((track, thrice))
    )
    np.testing.assert_array_equal(once, by_hand)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_window_begins_with_the_tokens_of_the_one_before(short_musicgen: Any, guidance: float) -> None:
    """Each longer piece, with one window more, begins with the shorter one, frame by frame."""
    checkpoint, decoder = short_musicgen.checkpoint, short_musicgen.decoder
    # With the same conditions, the pieces differ in nothing but their windows.
    pieces = [
        request_state(
            checkpoint, str(n), frames=n, guidance=guidance, window_frames=SHORT, stride_frames=SHORT_STRIDE
        )
        for n in (SHORT, SHORT + SHORT_STRIDE, SHORT + 2 * SHORT_STRIDE)
    ]
    for piece in pieces[:-1]:
        piece.conditions = pieces[-1].conditions
    short, longer, longest = [next(run_requests(checkpoint, decoder, [piece], 2)).codes for piece in pieces]
    np.testing.assert_array_equal(longer[:, :SHORT], short)
    np.testing.assert_array_equal(longest[:, : SHORT + SHORT_STRIDE], longer)


@dataclass(eq=False)
class StepNumbers:
    """A sampler that picks the number of the step."""

    params: Any
    steps: list[int] = field(default_factory=list)

    def pick(self, step: int, conditional: np.ndarray, unconditional: np.ndarray | None = None) -> np.ndarray:
        self.steps.append(step)
        return np.full(len(conditional), step)


def test_no_noise_is_drawn_twice(short_musicgen: Any) -> None:
    """Each token has the noise of the step of its own frame, and known tokens are not picked again."""
    from pipeline.engines.musicgen import SamplingParams

    sampler = StepNumbers(SamplingParams(guidance=1.0))
    piece = request_state(
        short_musicgen.checkpoint,
        frames=300,
        sampler=sampler,
        window_frames=SHORT,
        stride_frames=SHORT_STRIDE,
    )
    (finished,) = run_requests(short_musicgen.checkpoint, short_musicgen.decoder, [piece], 2)
    np.testing.assert_array_equal(finished.codes, np.arange(300) + np.arange(4)[:, None])
    assert len(sampler.steps) == 300 + 3 * len(piece.windows)
