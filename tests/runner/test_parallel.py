"""Batches in several threads: what they do together, and what an error in one means for the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
from home_folder import sha256_of, write_music
from runner_setup import RunnerSetup, StubEngines, StubGenerator, StubJudge, failing_for, noise

from pipeline.errors import EngineFailure, EngineUnusable, Stopped
from pipeline.executors.base import Executor, FixedExecutors, WorkerAway
from pipeline.executors.inline import InlineExecutor
from pipeline.outbox.outbox import Outbox, Published
from pipeline.records import Failure, Variation, VariationRequest
from pipeline.runner.parallel import ParallelRunner
from pipeline.runner.runner import Runner

WAIT_S = 30.0  # after which a test that would hang fails


def parallel(
    setup: RunnerSetup, *generators: StubGenerator, outbox: Outbox | None = None, normalizes: bool = False
) -> ParallelRunner:
    """A runner with a thread for each generator, and if it `normalizes` another one that does this ahead."""
    runner = setup.runner(outbox=outbox)
    parts = {one.name: getattr(runner, one.name) for one in fields(Runner)}
    executors = [InlineExecutor(StubEngines(generator), StubJudge()) for generator in generators]
    only_normalize = [InlineExecutor(StubEngines(StubGenerator()), StubJudge())] if normalizes else []
    found = FixedExecutors(executors, only_normalize)
    return ParallelRunner(**parts, executors=found, wake=lambda: None)


class Meeting:
    """Answers that wait for each other, so that they are given at the same time."""

    def __init__(self, n: int) -> None:
        self.barrier = threading.Barrier(n)

    def generator(self, answer: Callable[[VariationRequest], Any] = noise) -> StubGenerator:
        first = threading.Event()

        def meet(request: VariationRequest) -> Variation | Failure:
            if not first.is_set():
                first.set()
                self.barrier.wait(WAIT_S)
            made: Variation | Failure = answer(request)
            return made

        return StubGenerator(meet)


def test_batches_are_processed_at_the_same_time_and_every_track_once(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav", "d.wav", "e.wav")
    meeting = Meeting(2)
    generators = [meeting.generator(), meeting.generator()]
    runner = parallel(setup, *generators)

    assert runner.drain()

    assert setup.states(hashes) == [("done", 0)] * 5
    made = [sha256 for generator in generators for call in generator.calls for sha256 in call]
    assert sorted(made) == sorted(hashes * 2)  # two variations each
    assert all(generator.calls for generator in generators)
    assert runner.result.done == set(hashes)
    assert not runner.is_busy


def test_the_caller_goes_on_while_batches_are_processed(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    may_end, begun = threading.Event(), threading.Event()

    def wait(request: VariationRequest) -> Variation:
        begun.set()
        assert may_end.wait(WAIT_S)
        return noise(request)

    runner = parallel(setup, StubGenerator(wait), StubGenerator(wait))
    assert runner.next_batch()
    assert begun.wait(WAIT_S)
    assert runner.is_busy
    assert setup.states([sha256]) == [("running", 0)]
    later = sha256_of(write_music(setup.workspace.inbox / "b.wav", seed=9, seconds=1.5))
    assert setup.ingest(settle_s=0).scan(should_stop=lambda: False).queued == 1

    assert runner.next_batch()
    may_end.set()
    runner.drain()
    assert setup.states([sha256, later]) == [("done", 0)] * 2


def test_a_track_that_fails_is_no_matter_to_the_others(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=1)
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav")
    answer = failing_for(hashes[1], EngineFailure("made silence"))
    runner = parallel(setup, StubGenerator(answer), StubGenerator(answer))

    runner.drain()

    assert setup.states(hashes) == [("done", 0), ("failed", 1), ("done", 0)]
    assert runner.result.failed == {hashes[1]}


def test_an_error_of_the_machine_ends_the_work_once_the_other_batches_have_ended(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav")
    meeting = Meeting(2)
    gone = EngineUnusable("the device is gone")
    broken = meeting.generator(lambda request: Failure(request.request_id, gone))
    runner = parallel(setup, broken, meeting.generator())

    with pytest.raises(EngineUnusable, match="device is gone"):
        runner.drain()

    assert not runner.is_busy
    assert sorted(state for state, _ in setup.states(hashes)) == ["done", "queued"]
    assert [attempts for _, attempts in setup.states(hashes)] == [0, 0]


def test_a_stop_ends_all_batches_and_queues_their_tracks_again(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav")
    meeting = Meeting(2)

    def stop(request: VariationRequest) -> Variation:
        setup.stop = True
        return noise(request)

    runner = parallel(setup, meeting.generator(stop), meeting.generator(stop))
    with pytest.raises(Stopped):
        runner.drain()
    runner.close()
    assert setup.states(hashes) == [("queued", 0)] * 2
    setup.stop = False
    setup.runner().drain()
    assert setup.states(hashes) == [("done", 0)] * 2


def test_the_next_tracks_are_normalized_while_the_engine_is_busy(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, max_attempts=1)
    first = setup.add_tracks("a.wav")
    may_end, begun = threading.Event(), threading.Event()

    def wait(request: VariationRequest) -> Variation:
        begun.set()
        assert may_end.wait(WAIT_S)
        return noise(request)

    runner = parallel(setup, StubGenerator(wait), normalizes=True)
    runner.next_batch()
    assert begun.wait(WAIT_S)
    later = [
        sha256_of(write_music(setup.workspace.inbox / f"{n}.wav", seed=n, seconds=1.5)) for n in range(7, 10)
    ]
    (setup.workspace.inbox / "broken.wav").write_bytes(b"RIFF" + bytes(100))
    setup.ingest(settle_s=0).scan(should_stop=lambda: False)

    key = {sha256: setup.recipe.plan(sha256).normalize_key for sha256 in later}
    until = time.monotonic() + WAIT_S
    while any(setup.store.unit(key[sha256]) is None for sha256 in later) or runner.result.failed == set():
        assert time.monotonic() < until
        assert runner.next_batch()
        time.sleep(0.01)
    [busy, other] = runner.workers()
    assert (busy["track"], busy["stage"], busy["engine"]) == ("a.wav", "generate", "remix")
    assert other["stage"] in (None, "normalize")
    may_end.set()
    runner.drain()
    assert setup.states([*first, *later]) == [("done", 0)] * 4
    assert [one.stage for one in setup.store.attempts(later[0])].count("normalize") == 1
    assert [one["stage"] for one in runner.workers()] == [None, None]


def test_groups_of_tracks_are_as_large_as_allowed_until_the_queue_runs_out(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, count=1)
    setup.add_tracks(*(f"{n}.wav" for n in range(20)))
    meeting = Meeting(2)
    generators = [meeting.generator(), meeting.generator()]
    parallel(setup, *generators).drain()
    sizes = sorted((len(call) for generator in generators for call in generator.calls), reverse=True)
    assert sum(sizes) == 20
    assert sizes[0] == 5  # a quarter of the queue
    assert sizes[-1] == 1


def test_closing_stops_what_is_being_processed(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    begun = threading.Event()

    class Endless(StubGenerator):
        def generate(self, requests: Any, *, progress: Any, should_stop: Callable[[], bool]) -> Any:
            begun.set()
            until = time.monotonic() + WAIT_S
            while not should_stop():
                assert time.monotonic() < until
            raise Stopped("asked to stop")
            yield

    runner = parallel(setup, Endless())
    runner.next_batch()
    assert begun.wait(WAIT_S)
    runner.close()
    assert setup.states([sha256]) == [("queued", 0)]


def test_the_tracks_of_a_worker_that_is_away_are_queued_again_without_an_attempt(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav")
    meeting = Meeting(2)
    losses = iter([WorkerAway("its node is lost")])

    def lose_once(request: VariationRequest) -> Variation:
        for loss in losses:
            raise loss
        return noise(request)

    parallel(setup, meeting.generator(lose_once), meeting.generator()).drain()

    assert setup.states(hashes) == [("done", 0)] * 3
    outcomes = [outcome for sha256 in hashes for _, outcome in setup.outcomes(sha256)]
    assert outcomes.count("stopped") == 1
    assert "failed" not in outcomes


@dataclass(frozen=True, kw_only=True)
class Growing(FixedExecutors):
    """Executors of which only the first one is ready until it works."""

    is_first_at_work: Callable[[], bool]

    def ready(self) -> Sequence[Executor]:
        return self.executors[: 1 + self.is_first_at_work()]


def test_an_executor_that_becomes_ready_is_used_while_others_work(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.runner.parallel.LOOK_AGAIN_S", 0.01)
    hashes = setup.add_tracks("a.wav", "b.wav")
    meeting = Meeting(2)  # the first one works until the second one does
    first, second = meeting.generator(), meeting.generator()
    runner = parallel(setup, first, second)
    monkeypatch.setattr(Runner, "_batch_size", lambda self: 1)
    runner.executors = Growing(executors=runner.executors.ready(), is_first_at_work=lambda: bool(first.calls))

    runner.drain()

    assert setup.states(hashes) == [("done", 0)] * 2
    assert second.calls


@dataclass
class Starting(StubEngines):
    """Engines that are not there until they may be loaded."""

    may_load: threading.Event = field(default_factory=threading.Event)

    @property
    def loaded(self) -> list[str]:
        return []

    def generator(self) -> StubGenerator:
        assert self.may_load.wait(WAIT_S)
        return super().generator()


def test_a_worker_that_waits_for_a_place_keeps_no_track_from_another(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first track keeps one worker busy until the other one is being started for the second."""
    hashes = setup.add_tracks("a.wav", "b.wav")
    monkeypatch.setattr(Runner, "_batch_size", lambda self: 1)
    starting, made = Starting(StubGenerator()), list[str]()

    def answer(request: VariationRequest) -> Variation:
        until = time.monotonic() + WAIT_S
        while len(runner._busy) == 1 and not made:
            assert time.monotonic() < until
            time.sleep(0.01)
        made.append(request.track_id)
        if len(set(made)) == 2:
            starting.may_load.set()
        return noise(request)

    runner = parallel(setup, StubGenerator(answer))
    runner.executors = FixedExecutors([InlineExecutor(starting, StubJudge()), *runner.executors.ready()])
    runner.drain()

    assert setup.states(hashes) == [("done", 0)] * 2
    assert starting.stub_generator.calls == []


class FullOnce(Outbox):
    """An outbox whose disk is full until space was freed."""

    is_full = True

    def publish(self, folder: str, file: str, content: bytes) -> Published:
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().publish(folder, file, content)


def test_a_full_disk_is_mended_between_batches_and_one_track_tried(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav", "d.wav")
    outbox = FullOnce(setup.workspace.outbox_files)
    runner = parallel(setup, StubGenerator(), StubGenerator(), outbox=outbox)
    freed = []

    def free_space() -> None:
        freed.append(runner.is_busy)
        outbox.is_full = False

    monkeypatch.setattr(runner, "free_space", free_space)
    runner.drain()

    assert freed == [False]
    assert setup.states(hashes) == [("done", 0)] * 4
