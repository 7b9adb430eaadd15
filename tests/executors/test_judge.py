"""Which gates a result fails, and how it ranks, by its scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from runner_setup import StubEngines, StubGenerator

from pipeline.config import Gates
from pipeline.errors import Stopped
from pipeline.executors.judge import ScoringJudge, failed_gates, rank
from pipeline.music.beats import Beats
from pipeline.records import Audio
from pipeline.scores import Scores, analyse_source, score
from pipeline.scores.copies import BLOCK_FRAMES
from pipeline.scores.seams import Seam
from pipeline.stages import Finished

RATE_HZ = 22050


def melody(seconds: float = 4.0, transpose: int = 0) -> Audio:
    """Square waves of a quarter second each, in the scale of C major."""
    semitones = np.resize([0, 4, 7, 12, 5, 9, 2, 7], round(seconds * 4)) + transpose
    t = np.arange(RATE_HZ // 4) / RATE_HZ
    notes = [np.sign(np.sin(2 * np.pi * 261.6 * 2 ** (n / 12) * t)) * np.exp(-6 * t) for n in semitones]
    return Audio(0.3 * np.concatenate(notes).astype(np.float32)[None], RATE_HZ)


@pytest.fixture(scope="module")
def good() -> Scores:
    """Scores of a close variation without any fault."""
    audio = melody()
    return replace(
        score(analyse_source(audio), audio), similarity=0.7, key_agreement=1.0, tempo_agrees=True,
        worst_seam=Seam(0.0, 1.0), silent_share=0.0, noise_share=0.0, stuck_share=0.0, clipped_share=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "gates", "expected"),
    [
        ({"silent_share": 0.6}, {}, "60% of it is silence"),
        ({"noise_share": 0.8}, {}, "80% of it is noise"),
        ({"stuck_share": 0.9}, {}, "90% of it is a tone that does not change"),
        ({"tempo_agrees": False, "tempo_ratio": 1.5}, {"same_tempo": True}, "its tempo is 1.50 times"),
        ({"key": "F# minor", "key_agreement": 0.0}, {"same_key": True}, "its key is F# minor"),
        ({"copy_share": 0.9}, {"max_copied": 0.2}, "90% of it is a copy of the source"),
        ({"similarity": 0.3}, {"similarity": (0.4, 0.6)}, "its similarity to the source is 0.30"),
        ({"similarity": 0.8}, {"similarity": (0.4, 0.6)}, "its similarity to the source is 0.80"),
    ],
)
def test_each_gate_refuses_what_it_is_for_and_nothing_when_it_is_off(
    good: Scores, change: dict[str, Any], gates: dict[str, Any], expected: str
) -> None:
    good = replace(good, copy_share=0.0, similarity=0.5)
    assert list(failed_gates(good, Gates(**gates), 0.0)) == []
    [failed] = failed_gates(replace(good, **change), Gates(**gates), 0.0)
    assert expected in failed
    if gates:
        assert list(failed_gates(replace(good, **change), Gates(), 0.0)) == []


def test_variations_of_noise_may_be_noise(good: Scores) -> None:
    assert list(failed_gates(replace(good, noise_share=0.8), Gates(), collapsed_share=0.7)) == []


@pytest.mark.parametrize(
    "worse",
    [
        {"similarity": 0.5},
        {"key_agreement": 0.5},
        {"tempo_agrees": False},
        {"worst_seam": Seam(1.0, 0.4)},
        {"joins": (Seam(1.0, 0.9), Seam(2.0, 0.3))},
        {"silent_share": 0.3},
        {"clipped_share": 0.1},
        {"similarity": 1.0},  # a copy
    ],
)
def test_every_fault_lowers_the_rank(good: Scores, worse: dict[str, Any]) -> None:
    good = replace(good, similarity=0.88)
    assert rank(replace(good, **worse), Gates()) < rank(good, Gates())


def test_what_follows_its_prompt_better_ranks_higher(good: Scores) -> None:
    assert rank(replace(good, prompt=0.5), Gates()) > rank(replace(good, prompt=0.1), Gates())


def test_a_band_of_ones_own_decides_what_is_too_close(good: Scores) -> None:
    near, far = replace(good, similarity=0.8), replace(good, similarity=0.5)
    assert rank(near, Gates()) > rank(far, Gates())
    assert rank(near, Gates(similarity=(0.4, 0.6))) < rank(far, Gates(similarity=(0.4, 0.6)))


def test_results_are_judged_from_their_sound() -> None:
    judge = ScoringJudge(StubEngines(StubGenerator()), lambda: False)
    source = judge.analyse(melody(8.0))
    same, other = (
        judge.judge(source, Finished(audio, -14.0, {}, None, None), Gates(), "")
        for audio in (melody(), melody(transpose=6))
    )
    assert same.similarity is not None and other.similarity is not None
    assert same.similarity > other.similarity
    assert same.scores["rank"] == pytest.approx(same.rank, abs=1e-4)
    assert judge.shared(same.sound, same.sound) == 1.0
    assert judge.shared(same.sound, other.sound) < 0.5
    assert judge.shared(judge.sound(melody()), same.sound) == 1.0


def test_tempo_and_key_of_a_sound_that_is_made_of_the_source_are_the_source_s() -> None:
    judge = ScoringJudge(StubEngines(StubGenerator()), lambda: False)
    source = judge.analyse(melody(8.0))
    heard, known = (
        judge.judge(source, Finished(melody(transpose=6), -14.0, {}, None, None, own), Gates(), "").scores
        for own in (None, Beats(np.arange(0.0, 4.0), source.source.tempo_bpm, 1.0, 4, 0))
    )
    assert heard["key"] != known["key"] == str(source.source.key)
    assert heard["key_agreement"] < known["key_agreement"] == 1.0
    assert known["tempo_bpm"] == pytest.approx(source.source.tempo_bpm, abs=1e-3)
    assert (known["tempo_ratio"], known["tempo_agrees"]) == (1.0, True)
    assert heard["similarity"] == known["similarity"]


def test_a_loop_ranks_by_how_alike_the_contexts_of_its_ends_are() -> None:
    judge = ScoringJudge(StubEngines(StubGenerator()), lambda: False)
    source = judge.analyse(melody())
    poor, good, best = (
        judge.judge(source, Finished(melody(), -14.0, {}, 2, {"similarity": value}), Gates(), "").rank
        for value in (-0.1, 0.5, 1.0)
    )
    assert poor < good < best <= 1.0


def test_judging_ends_at_any_of_its_steps_if_it_is_asked_to() -> None:
    reference = ScoringJudge(StubEngines(StubGenerator()), lambda: False).analyse(melody())

    def steps_until(stop_at: int) -> int:
        """How many steps judging has; it is asked to stop at this one."""
        steps: list[None] = []

        def should_stop() -> bool:
            steps.append(None)
            return len(steps) == stop_at

        judge = ScoringJudge(StubEngines(StubGenerator()), should_stop)
        judge.judge(reference, Finished(melody(), -14.0, {}, None, None), Gates(), "")
        return len(steps)

    n_steps = steps_until(-1)
    assert n_steps > len(reference.source.fingerprint) / BLOCK_FRAMES
    for step in range(1, n_steps + 1):
        with pytest.raises(Stopped):
            steps_until(step)


def test_a_track_is_described_by_words_without_a_model() -> None:
    judge = ScoringJudge(StubEngines(StubGenerator()), lambda: False)
    assert judge.describe(judge.analyse(melody(8.0))).startswith("instrumental, ")
