"""The runner with injected engines: whose fault a failure is, what is tried again, and which results stay."""

from __future__ import annotations

import errno
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from home_folder import SAMPLE_RATE
from runner_setup import (
    BACKOFF_S,
    RunnerSetup,
    StubEmbedder,
    StubEngines,
    StubGenerator,
    StubJudge,
    failing_for,
    noise,
    with_variation,
)

from pipeline.audio import DecodeLimits, decode, loudness_lufs
from pipeline.config import Gates
from pipeline.engines import cards
from pipeline.engines.base import ProgressFn, StopFn
from pipeline.engines.selection import Choice
from pipeline.errors import BadAudio, DiskFull, EngineFailure, FolderUnusable, NoResult, Stopped
from pipeline.executors.judge import ScoringJudge, Verdict
from pipeline.maintenance.reconcile import reconcile
from pipeline.outbox.outbox import Outbox, Published
from pipeline.records import Audio, Failure, Stage, Variation, VariationRequest
from pipeline.runner.retry import JITTER, backoff_s
from pipeline.stages import Finished


class FullDisk(Outbox):
    """An outbox on whose disk there is no space for audio."""

    def publish(self, folder: str, file: str, content: bytes) -> Published:
        if file.endswith(".wav"):
            raise OSError(errno.ENOSPC, "No space left on device", file)
        return super().publish(folder, file, content)


@dataclass
class OneTrackAtATime(StubGenerator):
    """Fails for more than one track at a time, and always for the one whose hash is `bad`."""

    bad: str = ""
    last_array: Any = lambda: None  # a weak reference to an array of the last call
    was_held: bool = False  # whether anything still referred to that array at the next call

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        tracks = {request.track_id for request in requests}
        self.was_held |= self.last_array() is not None
        large = np.zeros(1000)
        self.last_array = weakref.ref(large)
        if len(tracks) > 1 or self.bad in tracks:
            self.calls.append([request.track_id for request in requests])
            raise RuntimeError("out of memory")
        yield from super().generate(requests, progress=progress, should_stop=should_stop)


def test_all_variations_of_all_tracks_are_asked_for_in_one_call(setup: RunnerSetup) -> None:
    hashes, generator = setup.add_tracks("a.wav", "b.wav"), StubGenerator()

    runner = setup.runner(generator)
    runner.drain()

    assert [sorted(call) for call in generator.calls] == [sorted([*hashes, *hashes])]
    assert (runner.result.done, runner.result.failed) == (set(hashes), set())
    assert setup.states(hashes) == [("done", 0), ("done", 0)]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"track": np.eye(1, 5, dtype=np.float32)[0]}, "has track as float32 (5,), not float32 (4,)"),
        ({"track": np.eye(1, 4, dtype=np.float32)}, "has track as float32 (1, 4), not float32 (4,)"),
        ({"track": np.eye(1, 4)[0]}, "has track as float64 (4,), not float32 (4,)"),
        ({"windows": np.eye(1, 5, dtype=np.float32)}, "has windows as float32 (1, 5), not float32 (1, 4)"),
        ({"times_s": np.zeros((2, 2), np.float32)}, "has times_s as float32 (2, 2), not float32 (1, 2)"),
        ({"track": np.full(4, np.nan, np.float32)}, "has numbers in track that are not finite"),
        ({"windows": np.full((1, 4), np.inf, np.float32)}, "has numbers in windows that are not finite"),
        ({"track": np.full(4, 0.6, np.float32)}, "has vectors that are not of unit length"),
        ({"windows": np.zeros((1, 4), np.float32)}, "has vectors that are not of unit length"),
    ],
)
def test_vectors_of_a_wrong_shape_or_length_fail_the_track_and_are_not_published(
    setup: RunnerSetup, changes: dict[str, Any], why: str
) -> None:
    [sha256] = setup.add_tracks("a.wav")
    generator = StubGenerator()

    setup.runner(engines=StubEngines(generator, StubEmbedder(changes))).drain()

    track = setup.track(sha256)
    assert (track.state, track.stage, track.error) == ("failed", "embed", f"the embedding's file {why}")
    assert setup.files(sha256) == {}
    assert generator.calls == []


def test_a_failure_fails_its_track_and_no_other(setup: RunnerSetup) -> None:
    good, bad = setup.add_tracks("good.wav", "bad.wav")

    runner = setup.runner(StubGenerator(failing_for(bad, BadAudio("has no beat"))))
    runner.drain()

    assert setup.states([good, bad]) == [("done", 0), ("failed", 1)]
    assert (setup.track(bad).stage, setup.track(bad).error) == ("generate", "has no beat")
    failed = setup.workspace.inbox / "failed"
    assert (failed / "bad.wav.error.txt").read_text() == "bad.wav has no beat\n"
    assert (setup.workspace.inbox / "done" / "good.wav").exists()
    assert not (setup.workspace.outbox / setup.track(bad).folder / "manifest.json").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda samples: samples[:, :-1], "samples instead of"),
        (lambda samples: samples * np.float32(np.nan), "not finite"),
        (lambda samples: samples * np.float32(0), "silence"),
    ],
)
def test_a_result_that_is_not_what_was_asked_for_is_not_published(
    setup: RunnerSetup, spoil: Callable[[Any], Any], says: str
) -> None:
    [sha256] = setup.add_tracks("a.wav")

    def answer(request: VariationRequest) -> Variation:
        return Variation(request.request_id, Audio(spoil(noise(request).audio.samples), SAMPLE_RATE))

    setup.runner(StubGenerator(answer)).drain()

    assert setup.states([sha256]) == [("failed", 1)]
    assert says in (setup.track(sha256).error or "")
    assert list(setup.files(sha256)) == ["embedding.npz"]


def test_a_batch_that_the_engine_raises_on_is_tried_track_by_track(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav")
    generator = OneTrackAtATime(bad=hashes[1])

    setup.runner(generator).drain()

    assert [len(set(call)) for call in generator.calls] == [3, 1, 1, 1]
    assert setup.states(hashes) == [("done", 0), ("failed", 1), ("done", 0)]
    assert setup.track(hashes[1]).error == "RuntimeError: out of memory"
    assert not generator.was_held


def test_a_track_alone_gives_the_same_files_as_in_a_batch(tmp_path: Path) -> None:
    together, alone = RunnerSetup.at(tmp_path / "together"), RunnerSetup.at(tmp_path / "alone")
    first, _ = together.add_tracks("a.wav", "b.wav")
    alone.add_tracks("a.wav")

    together.runner(StubGenerator()).drain()
    alone.runner(StubGenerator()).drain()

    assert together.files(first) == alone.files(first)


def test_a_stop_queues_again_without_an_attempt_and_keeps_what_is_published(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    made = []

    def second_stopped(request: VariationRequest) -> Variation:
        made.append(request)
        setup.stop = len(made) == 2  # before the result is finished and judged
        return noise(request)

    with pytest.raises(Stopped):
        setup.runner(StubGenerator(second_stopped)).drain()

    assert setup.states([sha256]) == [("queued", 0)]
    assert setup.outcomes(sha256) == [("normalize", "done"), ("embed", "done"), ("generate", "stopped")]
    assert setup.store.attempts() == []
    published = setup.files(sha256)
    assert sorted(published) == ["embedding.npz", "variations/01-v.wav"]

    setup.stop, generator = False, StubGenerator()
    setup.runner(generator).drain()

    assert generator.calls == [[sha256]]  # one request: the variation that was missing
    assert setup.states([sha256]) == [("done", 0)]
    assert setup.files(sha256).items() > published.items()


def test_a_transient_failure_is_retried_after_doubling_waits_and_then_fails_the_track(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=3)
    [sha256] = setup.add_tracks("a.wav")
    generator = StubGenerator(failing_for(sha256, EngineFailure("made silence")))
    runner = setup.runner(generator)

    for attempts, wait_s in ((1, BACKOFF_S), (2, 2 * BACKOFF_S)):
        runner.drain()
        assert setup.states([sha256]) == [("queued", attempts)]
        due = setup.track(sha256).not_before
        assert due == setup.now + backoff_s(sha256, attempts, setup.config.retry)
        assert abs(due - setup.now - wait_s) <= JITTER * wait_s
        setup.now = due - 0.1
        runner.drain()
        assert len(generator.calls) == attempts  # not due yet
        setup.now = due
    assert (setup.workspace.inbox / "a.wav").exists()
    runner.drain()

    assert setup.states([sha256]) == [("failed", 3)]
    assert (runner.result.done, runner.result.failed) == (set(), {sha256})
    assert [outcome for stage, outcome in setup.outcomes(sha256) if stage == "generate"] == ["failed"] * 3
    assert (setup.workspace.inbox / "failed" / "a.wav").exists()


def silent(request: VariationRequest) -> Variation:
    made = noise(request)
    return replace(made, audio=Audio(0 * made.audio.samples, SAMPLE_RATE))


@pytest.mark.parametrize(
    ("answer", "why"),
    [(silent, "the engine made silence"),
     (lambda request: Failure(request.request_id, NoResult("found no path")), "found no path")],
)  # fmt: skip
def test_what_no_other_try_can_make_fails_the_track_at_once(tmp_path: Path, answer: Any, why: str) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=3)
    [sha256] = setup.add_tracks("a.wav")
    setup.runner(StubGenerator(answer)).drain()
    assert setup.states([sha256]) == [("failed", 1)]
    assert setup.track(sha256).error == why


def test_a_track_whose_failure_has_passed_is_finished(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=2)
    [sha256] = setup.add_tracks("a.wav")
    setup.runner(StubGenerator(failing_for(sha256, EngineFailure("made silence")))).drain()

    setup.now += (1 + JITTER) * BACKOFF_S
    setup.runner(StubGenerator()).drain()

    assert setup.track(sha256).state == "done"
    assert setup.track(sha256).error is None


def test_a_full_disk_ends_the_run_and_fails_no_track(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav")

    with pytest.raises(FolderUnusable, match="no space left"):
        setup.runner(StubGenerator(), outbox=FullDisk(setup.workspace.outbox_files)).drain()

    assert setup.states(hashes) == [("queued", 0), ("queued", 0)]
    assert setup.store.attempts() == []
    assert sorted(p.name for p in setup.workspace.inbox.glob("*.wav")) == ["a.wav", "b.wav"]

    setup.runner(StubGenerator()).drain()
    assert setup.states(hashes) == [("done", 0), ("done", 0)]


def test_too_few_results_are_a_failure_of_the_engine(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")

    class Incomplete(StubGenerator):
        def generate(self, requests: Sequence[VariationRequest], **how: Any) -> Iterator[Variation | Failure]:
            return super().generate(requests[:1], **how)

    setup.runner(Incomplete()).drain()

    assert setup.track(sha256).state == "failed"
    assert "too few" in (setup.track(sha256).error or "")


def test_what_happens_to_a_source_after_it_was_taken_in_is_harmless(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("gone.wav", "other.wav", "elsewhere.wav")
    (setup.workspace.inbox / "gone.wav").unlink()
    (setup.workspace.inbox / "other.wav").write_bytes(b"other bytes")
    (setup.workspace.inbox / "elsewhere.wav").rename(setup.workspace.home / "elsewhere.wav")

    setup.runner(StubGenerator()).drain()

    assert setup.states(hashes) == [("done", 0)] * 3
    assert (setup.workspace.inbox / "other.wav").read_bytes() == b"other bytes"


def test_a_working_copy_that_was_damaged_is_made_again_from_the_source(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    setup.workspace.scratch(sha256).source.write_bytes(b"torn")

    setup.runner(StubGenerator()).drain()

    assert setup.states([sha256]) == [("done", 0)]


def test_a_source_that_is_gone_with_its_working_copy_fails_without_a_retry(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=3)
    gone, here = setup.add_tracks("gone.wav", "here.wav")
    (setup.workspace.inbox / "gone.wav").unlink()
    setup.workspace.scratch(gone).clear()

    setup.runner(StubGenerator()).drain()

    assert setup.states([gone, here]) == [("failed", 1), ("done", 0)]
    assert "was removed or changed" in (setup.track(gone).error or "")


def test_a_finished_track_leaves_no_working_files(setup: RunnerSetup) -> None:
    setup.add_tracks("a.wav")
    setup.runner(StubGenerator()).drain()
    assert list((setup.workspace.state / "work").iterdir()) == []


@pytest.mark.parametrize(("tracks_that_fit", "claimed"), [(9, 3), (2.5, 2), (1, 1)])
def test_no_more_tracks_are_claimed_than_there_is_disk_space_for_their_results(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch, tracks_that_fit: float, claimed: int
) -> None:
    setup.add_tracks("a.wav", "b.wav", "c.wav")
    per_track = 2 * 0.5 * SAMPLE_RATE * 2 * 3  # two stereo variations of half a second, 24 bit
    free = setup.config.disk.min_free_mb * 1e6 + tracks_that_fit * per_track
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    generator = StubGenerator()

    setup.runner(generator).next_batch()

    assert [len(set(call)) for call in generator.calls] == [claimed]


def test_without_space_for_one_track_nothing_is_claimed(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = setup.add_tracks("a.wav")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    with pytest.raises(DiskFull, match="are free"):
        setup.runner(StubGenerator()).next_batch()

    assert setup.states(hashes) == [("queued", 0)]


def test_on_a_full_disk_working_copies_are_removed_and_one_track_is_processed(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav")
    generator = StubGenerator()
    runner = setup.runner(generator)
    asked = iter([1000, 10**12, 10**12])  # bytes free
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(asked, 10**12)))

    assert runner.next_batch()

    assert [len(set(call)) for call in generator.calls] == [1]
    assert not all(setup.workspace.scratch(sha256).source.exists() for sha256 in hashes)
    assert sorted(setup.states(hashes)) == [("done", 0), ("queued", 0)]


def test_a_source_whose_inbox_is_away_is_waited_for_without_an_attempt(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    setup.workspace.scratch(sha256).clear()
    away = setup.workspace.inbox.rename(setup.workspace.home / "away")
    setup.runner(StubGenerator()).drain()
    assert setup.states([sha256]) == [("queued", 0)]

    away.rename(setup.workspace.inbox)
    setup.now = setup.track(sha256).not_before
    setup.runner(StubGenerator()).drain()

    assert setup.states([sha256]) == [("done", 0)]


def test_a_closed_folder_of_one_track_stops_no_other(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path)
    closed, other = setup.add_tracks("a.wav", "b.wav")

    class OneClosed(Outbox):
        def remove_manifest(self, folder: str) -> None:
            if folder == setup.track(closed).folder:
                raise PermissionError(errno.EACCES, "Permission denied", folder)
            super().remove_manifest(folder)

    setup.runner(StubGenerator(), outbox=OneClosed(setup.workspace.outbox_files)).drain()

    assert setup.states([closed, other]) == [("failed", 1), ("done", 0)]


def test_nothing_is_written_below_an_outbox_whose_disk_has_gone(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav")
    runner = setup.runner(StubGenerator())
    setup.store.set_fact("outbox mount", str(setup.workspace.outbox))

    with pytest.raises(FolderUnusable, match="isn't mounted now"):
        runner.next_batch()

    assert setup.states(hashes) == [("queued", 0)]


# -- takes -----------------------------------------------------------------------------------------


def with_gates(setup: RunnerSetup, **gates: Any) -> RunnerSetup:
    config = setup.config.model_validate({**setup.config.model_dump(), "gates": gates})
    return replace(setup, config=config, recipe=replace(setup.recipe, config=config))


def decoded(setup: RunnerSetup, sha256: str, file: str) -> Audio:
    path = setup.workspace.outbox / setup.track(sha256).folder / file
    return decode(path, sample_rate=SAMPLE_RATE, limits=DecodeLimits(min_duration_s=0.0))[0]


class SeededTakes(StubGenerator):
    """Noise, with a judge that ranks it by its seed. A result is judged before the next one is made."""

    def __init__(self, worth: dict[int, float], *, failing: Sequence[int] = ()) -> None:
        super().__init__(self.make)
        self.worth, self.failing, self.seed = worth, failing, 0
        self.judge = StubJudge(self.verdict)

    def make(self, request: VariationRequest) -> Variation:
        self.seed = request.seed
        return noise(request)

    def verdict(self, made: Finished, gates: Gates) -> Verdict:
        failed = ("is too loud",) if self.seed in self.failing else ()
        return Verdict(failed, self.worth.get(self.seed, 0.0), 0.5, {"similarity": 0.5}, made)


def test_the_best_of_several_takes_is_published_and_the_manifest_tells_of_the_others(
    setup: RunnerSetup,
) -> None:
    setup = with_variation(setup, seed=1, keep="best 1 of 4")
    [sha256] = setup.add_tracks("a.wav")

    generator = SeededTakes({2: 0.9, 3: 0.95, 4: 0.1}, failing=[3])

    setup.runner(generator, judge=generator.judge).drain()

    assert sorted(setup.files(sha256)) == ["embedding.npz", "variations.npz", "variations/01-v.wav"]
    [made] = setup.manifest(sha256)["variations"]
    assert (made["seed"], made["scores"], "failed" in made) == (2, {"similarity": 0.5}, False)
    assert [(one["seed"], one["failed"]) for one in made["takes"]] == [
        (1, []), (2, []), (3, ["is too loud"]), (4, []),
    ]  # fmt: skip


def test_a_variation_that_passes_no_gate_is_published_with_what_it_fails(
    setup: RunnerSetup, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pipeline")
    setup = with_variation(setup, seed=1)
    [sha256] = setup.add_tracks("a.wav")
    generator = StubGenerator()

    judge = StubJudge(lambda made, gates: Verdict(("is noise",), 0.0, None, {}, made))
    setup.runner(generator, judge=judge).drain()

    said = [record.getMessage() for record in caplog.records]
    assert said.count("a.wav: another take of 01-v.wav: is noise") == setup.config.gates.retries
    assert "a.wav: 01-v.wav fails its gates: is noise" in said
    [made] = setup.manifest(sha256)["variations"]
    assert made["failed"] == ["is noise"]
    assert len(generator.calls) == len(made["takes"]) == 1 + setup.config.gates.retries


def test_takes_that_a_killed_run_has_held_are_not_made_again(setup: RunnerSetup) -> None:
    setup = with_variation(setup, seed=1, keep="best 1 of 3")
    [sha256] = setup.add_tracks("a.wav")
    first, second, third = (SeededTakes({1: 0.9}) for _ in range(3))

    def two_takes(request: VariationRequest) -> Variation:
        if request.seed == 3:
            raise Stopped("as by a signal")
        return first.make(request)

    first.answer = two_takes
    with pytest.raises(Stopped):
        setup.runner(first, judge=first.judge).drain()
    setup.runner(second, judge=second.judge).drain()

    assert second.calls == [[sha256]]  # the third take alone
    [made] = setup.manifest(sha256)["variations"]
    assert (made["seed"], len(made["takes"])) == (1, 3)
    interrupted = setup.files(sha256)
    setup.store.requeue(sha256, now=setup.now, stages=list(Stage))
    setup.runner(third, judge=third.judge).drain()
    assert setup.files(sha256)["variations/01-v.wav"] == interrupted["variations/01-v.wav"]


def test_takes_that_a_killed_run_has_held_are_made_again_if_the_judge_has_changed(setup: RunnerSetup) -> None:
    setup = with_variation(setup, seed=1, keep="best 1 of 2")
    [sha256] = setup.add_tracks("a.wav")
    first, second = SeededTakes({1: 0.9}), SeededTakes({2: 0.9})

    def one_take(request: VariationRequest) -> Variation:
        if request.seed == 2:
            raise Stopped("as by a signal")
        return first.make(request)

    first.answer = one_take
    with pytest.raises(Stopped):
        setup.runner(first, judge=first.judge).drain()
    setup.recipe = replace(setup.recipe, rater=Choice(cards()["audiobox"], "aes", "1" * 40, "test"))
    setup.runner(second, judge=second.judge).drain()

    assert second.calls == [[sha256, sha256]]
    made = setup.manifest(sha256)
    assert made["variations"][0]["seed"] == 2
    assert (made["judge"]["engine"], made["judge"]["revision"]) == ("audiobox", "1" * 40)


def test_a_silent_take_is_replaced_by_another_one(setup: RunnerSetup) -> None:
    setup = with_variation(setup, seed=1)
    [sha256] = setup.add_tracks("a.wav")

    def first_silent(request: VariationRequest) -> Variation:
        made = noise(request)
        return replace(made, audio=Audio(made.audio.samples * (request.seed != 1), SAMPLE_RATE))

    setup.runner(StubGenerator(first_silent)).drain()

    [made] = setup.manifest(sha256)["variations"]
    assert [one["failed"] for one in made["takes"]] == [["the engine made silence"], []]


def test_a_prompt_of_words_from_the_analysis_is_given_to_the_engine_and_shown(setup: RunnerSetup) -> None:
    setup = with_variation(setup, "musicgen", prompt=["auto", "my own"])
    [sha256] = setup.add_tracks("a.wav")
    prompts = []

    def answer(request: VariationRequest) -> Variation:
        prompts.append(request.params["prompt"])
        return noise(request)

    setup.runner(StubGenerator(answer)).drain()

    assert prompts == ["words", "my own"]
    automatic, own = setup.manifest(sha256)["variations"]
    assert (automatic["params"]["prompt"], automatic["prompt"]) == ("auto", "words")
    assert "prompt" not in own


def test_a_variation_of_a_changed_source_is_made_from_it_and_compared_with_it(setup: RunnerSetup) -> None:
    setup = with_variation(
        setup,
        temperature=[0.5, 0.8],
        transpose=[0, 5],
        speed=0.8,
        duration_s="source",
        gates={"max_shared": 1.0},
    )
    [sha256] = setup.add_tracks("a.wav")
    sources: list[Audio] = []

    def itself(request: VariationRequest) -> Variation:
        sources.append(request.audio)
        return Variation(request.request_id, request.audio)

    generator = StubGenerator(itself)
    setup.runner(generator, judge=ScoringJudge(StubEngines(generator), lambda: False)).drain()

    assert (sources[0], sources[2]) == (sources[1], sources[3])  # one object, so that it is analysed once
    made = setup.manifest(sha256)["variations"]
    assert [(one["params"]["temperature"], one.get("transpose"), one["speed"]) for one in made] == [
        (0.5, None, 0.8), (0.5, 5, 0.8), (0.8, None, 0.8), (0.8, 5, 0.8),
    ]  # fmt: skip
    assert [one["duration_s"] for one in made] == pytest.approx([1.5 / 0.8] * 4, abs=0.001)
    assert [one["scores"]["similarity"] for one in made] == [1.0] * 4  # to the unchanged source: 0.3
    pitches_hz = [np.abs(np.fft.rfft(source.mono())).argmax() / source.duration_s for source in sources[1:3]]
    assert pitches_hz[1] / pitches_hz[0] == pytest.approx(2 ** (5 / 12), rel=0.01)


def test_rejected_takes_are_published_apart_if_they_are_wanted(setup: RunnerSetup) -> None:
    setup = with_variation(setup, seed=1, keep="best 1 of 3")
    setup = with_gates(setup, rejected="keep")
    [sha256] = setup.add_tracks("a.wav")
    generator = SeededTakes({2: 0.9}, failing=[3])

    setup.runner(generator, judge=generator.judge).drain()

    [made] = setup.manifest(sha256)["variations"]
    first, kept, third = (one.get("file") for one in made["takes"])
    assert kept is None
    vectors = ["embedding.npz", "variations.npz"]
    assert sorted(setup.files(sha256)) == sorted([*vectors, first, third, "variations/01-v.wav"])


@pytest.mark.parametrize("problem", ["missing", "altered"])
def test_a_rejected_take_that_is_missing_or_altered_is_found_and_made_again(
    setup: RunnerSetup, problem: str
) -> None:
    setup = with_variation(setup, seed=1, keep="best 2 of 3")
    setup = with_gates(setup, rejected="keep")
    [sha256] = setup.add_tracks("a.wav")
    generator = SeededTakes({1: 0.9, 2: 0.8})
    setup.runner(generator, judge=generator.judge).drain()
    before = setup.files(sha256), setup.manifest(sha256)
    [name] = {take["file"] for one in before[1]["variations"] for take in one["takes"] if "file" in take}
    path = setup.workspace.outbox / setup.track(sha256).folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    if problem == "missing":
        path.unlink()

    outbox = Outbox(setup.workspace.outbox_files)
    [finding] = reconcile(setup.store, outbox, setup.workspace, thorough=True, repair=True, now=setup.now)
    assert f"{name} is {problem}" in finding.text
    setup.runner(generator, judge=generator.judge).drain()

    assert (setup.files(sha256), setup.manifest(sha256)) == before
    assert reconcile(setup.store, outbox, setup.workspace, thorough=True, repair=True, now=setup.now) == []


def test_as_an_album_all_results_of_a_track_have_the_loudness_of_the_quietest(setup: RunnerSetup) -> None:
    setup = with_variation(setup, seed=1, count=3)
    config = setup.config.model_validate({**setup.config.model_dump(), "output": {"album": True}})
    setup = replace(setup, config=config, recipe=replace(setup.recipe, config=config))
    [sha256] = setup.add_tracks("a.wav")

    def spiky(request: VariationRequest) -> Variation:
        """Noise with a peak that leaves less room for gain from one take to the next."""
        made = noise(request)
        made.audio.samples[0, 5000] = request.seed
        return made

    runs = []
    for stop_after in (2, 3):  # the first run is stopped before the last take

        def answer(request: VariationRequest, stop_after: int = stop_after) -> Variation:
            if request.seed > stop_after:
                raise Stopped("as by a signal")
            return spiky(request)

        with suppress(Stopped):
            setup.runner(StubGenerator(answer)).drain()
        runs.append(sorted(setup.files(sha256)))

    assert runs[0] == ["embedding.npz"]
    made = setup.manifest(sha256)["variations"]
    assert len({one["loudness_lufs"] for one in made}) == 1
    measured = [loudness_lufs(decoded(setup, sha256, one["file"])) for one in made]
    np.testing.assert_allclose(measured, made[0]["loudness_lufs"], atol=0.02)


def test_the_sound_of_a_published_result_is_not_kept_in_memory(setup: RunnerSetup) -> None:
    setup = with_variation(setup, seed=1, count=6)
    setup.add_tracks("a.wav")
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def answer(request: VariationRequest) -> Variation:
        alive.append(sum(one() is not None for one in made))
        return noise(request)

    def verdict(finished: Finished, gates: Gates) -> Verdict:
        made.append(weakref.ref(finished.audio.samples))
        return Verdict((), 0.0, None, {}, "a fingerprint")

    setup.runner(StubGenerator(answer), judge=StubJudge(verdict)).drain()

    assert len(made) == 6
    assert max(alive) <= 1
