"""Workers on the CPU that share a generator: what runs where and at the same time, and what an error ends."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runner_setup import (
    Answer,
    RunnerSetup,
    StubEmbedder,
    StubEngines,
    StubGenerator,
    StubJudge,
    noise,
    with_variation,
)

from pipeline.config import Gates
from pipeline.engines.base import Embedder, Generator, Rater
from pipeline.errors import DiskFull, EngineFailure, Stopped
from pipeline.executors import tasks
from pipeline.executors.base import FixedExecutors
from pipeline.executors.beside import BesideGenerator, beside
from pipeline.executors.inline import InlineExecutor
from pipeline.executors.judge import Verdict
from pipeline.outbox.outbox import Outbox, Published
from pipeline.records import Audio, VariationRequest
from pipeline.runner.parallel import ParallelRunner
from pipeline.runner.runner import Runner
from pipeline.stages import Finished

WAIT_S = 30.0  # after which a test that would hang fails
Judged = Callable[[Finished, Gates], Verdict]


def passed(made: Finished, gates: Gates) -> Verdict:
    return Verdict((), 0.0, None, {}, made)


@dataclass
class OnlyGenerator(StubEngines):
    """The engines of a worker from which only sounds are wanted."""

    names: list[str] = field(default_factory=lambda: ["stub"])  # of those that are loaded

    @property
    def loaded(self) -> list[str]:
        return self.names

    def embedder(self) -> Embedder:
        raise AssertionError("it embeds")

    def rater(self) -> Rater:
        raise AssertionError("it rates")


class NoGenerator(StubEngines):
    """The engines of a worker that makes no sounds."""

    def generator(self) -> Generator:
        raise AssertionError("it generates")


@dataclass
class LateEngines(NoGenerator):
    """The same, but they are loaded only after an event."""

    event: threading.Event = field(default_factory=threading.Event)

    def embedder(self) -> StubEmbedder:
        assert self.event.wait(WAIT_S)
        return super().embedder()


class NoJudge(StubJudge):
    def analyse(self, source: Audio) -> None:
        raise AssertionError("it analyses")

    def judge(self, *_: Any) -> Verdict:
        raise AssertionError("it judges")


@dataclass
class Work:
    """A runner with workers that share a generator."""

    setup: RunnerSetup
    answer: Answer = noise
    judged: Judged = passed
    outbox: Outbox | None = None
    n_workers: int = 2
    batch_tracks: int = 8
    generator: StubGenerator = field(init=False)
    pairs: list[BesideGenerator] = field(init=False)
    runner: ParallelRunner = field(init=False)

    def __post_init__(self) -> None:
        self.generator = StubGenerator(self.answer)
        shared = InlineExecutor(OnlyGenerator(self.generator), NoJudge())
        others = [
            InlineExecutor(NoGenerator(StubGenerator()), StubJudge(verdict=self.judged))
            for _ in range(self.n_workers)
        ]
        self.pairs = beside(shared, others, self.setup.workspace.state, self.batch_tracks)
        plain = self.setup.runner(outbox=self.outbox)
        parts = {one.name: getattr(plain, one.name) for one in fields(Runner)}
        self.runner = ParallelRunner(**parts, executors=FixedExecutors(self.pairs), wake=lambda: None)

    def hold_back_until(self, event: threading.Event) -> None:
        """All workers but the first."""
        for pair in self.pairs[1:]:
            engines = LateEngines(StubGenerator(), event=event)
            pair.executor.engines = engines  # type: ignore[attr-defined]


def test_takes_are_those_of_one_worker_and_everything_but_the_sounds_is_made_beside_the_generator(
    setup: RunnerSetup, tmp_path: Path
) -> None:
    other = RunnerSetup.at(tmp_path / "other")
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav")
    assert other.add_tracks("a.wav", "b.wav", "c.wav") == hashes
    other.runner().drain()

    work = Work(setup)
    work.runner.drain()

    assert setup.states(hashes) == [("done", 0)] * 3
    for sha256 in hashes:
        assert setup.files(sha256) == other.files(sha256)
        workers = {attempt.worker for attempt in setup.store.attempts(sha256)}
        assert all(worker and " beside process " in worker for worker in workers)
    assert not list(setup.workspace.state.glob("*.npy"))


def test_the_generator_goes_on_while_its_first_sound_is_finished(setup: RunnerSetup) -> None:
    """The first verdict is given when the second sound is made."""
    [sha256] = setup.add_tracks("a.wav")
    second = threading.Event()
    n_asked = iter(range(100))

    def answer(request: VariationRequest) -> Any:
        if next(n_asked) == 1:
            second.set()
        return noise(request)

    def judged(made: Finished, gates: Gates) -> Verdict:
        assert second.wait(WAIT_S)
        return passed(made, gates)

    Work(setup, answer, judged).runner.drain()
    assert setup.states([sha256]) == [("done", 0)]


def test_another_batch_has_the_generator_while_the_takes_of_the_first_are_finished(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first verdict is given when the generator was called for both batches, one after the other."""
    hashes = setup.add_tracks("a.wav", "b.wav")
    monkeypatch.setattr(Runner, "_batch_size", lambda self: 1)
    first, both, at_work = threading.Event(), threading.Event(), threading.Lock()

    def answer(request: VariationRequest) -> Any:
        first.set()
        assert at_work.acquire(blocking=False), "two calls of the generator at the same time"
        if len(work.generator.calls) == 2:
            both.set()
        at_work.release()
        return noise(request)

    def judged(made: Finished, gates: Gates) -> Verdict:
        assert both.wait(WAIT_S)
        return passed(made, gates)

    work = Work(setup, answer, judged)
    work.hold_back_until(first)
    work.runner.drain()
    assert setup.states(hashes) == [("done", 0)] * 2
    assert len(work.generator.calls) == 2


def test_a_generator_that_another_one_has_loaded_meanwhile_is_not_waited_for(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, loaded = Work(setup), list[str]()
    generator = work.pairs[0].shared.executor
    generator.engines.names = loaded  # type: ignore[attr-defined]
    asked = iter(range(10))

    def should_stop() -> bool:
        """Asked while it waits for its turn, in which the other one loads the generator."""
        loaded.append("stub")
        assert next(asked) < 5
        return False

    opening = threading.Event()

    def open_slowly(*_: Any, **__: Any) -> Iterator[None]:
        opening.set()
        assert ended.wait(WAIT_S)
        yield

    ended = threading.Event()
    monkeypatch.setattr(generator, "run", open_slowly)
    open_generator = partial(work.pairs[0].run, tasks.open_generator, progress=lambda *_: None)
    first = threading.Thread(target=lambda: list(open_generator(should_stop=lambda: False)))
    first.start()
    try:
        assert opening.wait(WAIT_S)
        assert list(open_generator(should_stop=should_stop)) == [None]
    finally:
        ended.set()
        first.join()


@pytest.mark.parametrize(("n_workers", "n_tracks"), [(1, 8), (2, 8), (4, 4), (12, 1), (40, 1)])
def test_the_batches_of_all_workers_are_two_of_the_generator(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch, n_workers: int, n_tracks: int
) -> None:
    setup.add_tracks(*(f"{n}.wav" for n in range(10)))
    claimed: list[int] = []

    def process(self: Runner, tracks: Sequence[Any]) -> None:
        claimed.append(len(tracks))
        setup.stop = True

    monkeypatch.setattr(Runner, "process", process)
    work = Work(setup, n_workers=n_workers)
    work.runner.next_batch()
    wait_until(lambda: not work.runner.is_busy)
    assert max(claimed) == n_tracks


@dataclass
class Held:
    """A generator whose first call is for one worker alone, and ends when it is told to."""

    fails_for: str = ""
    started: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: VariationRequest) -> Any:
        if not self.started.is_set():
            self.started.set()
            assert self.released.wait(WAIT_S)
        if request.track_id == self.fails_for:
            raise RuntimeError("the model has no sound for this track")
        return noise(request)

    def work(self, setup: RunnerSetup, n_workers: int, batch_tracks: int = 8) -> Work:
        """Workers whose batches are of one track."""
        work = Work(setup, self.answer, n_workers=n_workers, batch_tracks=batch_tracks)
        work.hold_back_until(self.started)
        return work

    def drain(self, work: Work, n_waiting: int) -> None:
        """Release the first call when so many others wait."""
        thread = threading.Thread(target=work.runner.drain)
        thread.start()
        try:
            assert self.started.wait(WAIT_S)
            wait_until(lambda: len(work.pairs[0].shared.waiting) == n_waiting)
        finally:
            self.released.set()
            thread.join()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("batch_tracks", [8, 2])
def test_a_call_makes_what_all_workers_wait_for_up_to_a_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tracks: int
) -> None:
    setup = RunnerSetup.at(tmp_path, count=1)
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav", "d.wav")
    monkeypatch.setattr(Runner, "_batch_size", lambda self: 1)
    held = Held()
    work = held.work(setup, 4, batch_tracks)
    held.drain(work, n_waiting=3)
    assert setup.states(hashes) == [("done", 0)] * 4
    assert [len(call) for call in work.generator.calls] == ([1, 3] if batch_tracks == 8 else [1, 2, 1])
    assert sorted(track for call in work.generator.calls for track in call) == sorted(hashes)


def test_after_an_error_in_a_call_for_several_workers_only_its_cause_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = RunnerSetup.at(tmp_path, count=2, max_attempts=1)
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav", "d.wav")
    monkeypatch.setattr(Runner, "_batch_size", lambda self: 1)
    held = Held()
    work = held.work(setup, 4)
    first = setup.store.due(1, setup.workspace.input_folder, now=setup.now)[0].sha256
    held.fails_for = next(one for one in hashes if one != first)
    held.drain(work, n_waiting=3)
    failed = {one for one, state in zip(hashes, setup.states(hashes), strict=True) if state == ("failed", 1)}
    assert failed == {held.fails_for}
    assert setup.states([one for one in hashes if one not in failed]) == [("done", 0)] * 3
    assert not list(setup.workspace.state.glob("*.npy"))


def test_words_for_a_prompt_the_melody_and_the_analysis_are_made_beside_the_generator_and_before(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, analysed, before = list[VariationRequest](), list[Audio](), list[int]()
    monkeypatch.setattr(StubJudge, "analyse", lambda self, source: analysed.append(source))

    def answer(request: VariationRequest) -> Any:
        asked.append(request)
        before.append(len(analysed))
        return noise(request)

    setup = with_variation(setup, "musicgen", prompt=["auto", "my own"], melody="harmonic")
    [sha256] = setup.add_tracks("a.wav")
    Work(setup, answer).runner.drain()
    assert setup.states([sha256]) == [("done", 0)]
    assert [request.params["prompt"] for request in asked] == ["words", "my own"]
    assert [request.prepared[1] for request in asked] == ["harmonic", "harmonic"]
    assert before == [1, 1]
    assert len(analysed) == 1


def test_a_stop_is_seen_by_a_worker_whose_call_still_waits(
    setup: RunnerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav")
    monkeypatch.setattr(Runner, "_batch_size", lambda self: 1)
    held = Held()
    work = held.work(setup, 2)

    def stop() -> None:
        assert held.started.wait(WAIT_S)
        wait_until(lambda: len(work.pairs[0].shared.waiting) == 1)
        setup.stop = True
        wait_until(lambda: len(work.pairs[0].shared.waiting) == 0)
        held.released.set()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Stopped):
        work.runner.drain()
    stopper.join()
    assert setup.states(hashes) == [("queued", 0)] * 2
    assert len(work.generator.calls) == 1


def test_a_take_that_cannot_be_judged_fails_its_track_alone(tmp_path: Path) -> None:
    """What the generator then makes for it is dropped: of six sounds, one isn't judged."""
    setup = RunnerSetup.at(tmp_path, count=2, max_attempts=1)
    hashes = setup.add_tracks("a.wav", "b.wav", "c.wav")
    n_judged = iter(range(100))

    def judged(made: Finished, gates: Gates) -> Verdict:
        if next(n_judged) == 0:
            raise EngineFailure("can't be judged")
        return passed(made, gates)

    Work(setup, judged=judged).runner.drain()
    assert sorted(setup.states(hashes)) == [("done", 0), ("done", 0), ("failed", 1)]
    assert next(n_judged) == 5


def test_an_error_of_the_machine_stops_the_generator_and_leaves_it_to_others(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path, count=1)
    hashes = setup.add_tracks("a.wav", "b.wav")
    failed, stopped = threading.Event(), threading.Event()

    class Endless(StubGenerator):
        """After its first sound it waits until it is stopped."""

        def generate(self, requests: Sequence[Any], *, progress: Any, should_stop: Any) -> Iterator[Any]:
            yield noise(requests[0])
            assert failed.wait(WAIT_S)
            until = time.monotonic() + WAIT_S
            while not should_stop():
                assert time.monotonic() < until
            stopped.set()
            raise Stopped("asked to stop")

    class Full(Outbox):
        """An outbox in which no variation has room."""

        def publish(self, folder: str, file: str, content: bytes) -> Published:
            if not file.endswith(".wav"):
                return super().publish(folder, file, content)
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    work = Work(setup, outbox=Full(setup.workspace.outbox_files))
    work.pairs[0].shared.executor.engines.stub_generator = Endless()  # type: ignore[attr-defined]
    with pytest.raises(DiskFull):
        work.runner.drain()
    assert stopped.is_set()  # who leaves the call last has waited for it
    assert [state for state, _ in setup.states(hashes)] == ["queued"] * 2


def test_a_stop_ends_the_generator_and_queues_all_tracks_again(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav")

    def stop(request: VariationRequest) -> Any:
        setup.stop = True
        return noise(request)

    work = Work(setup, stop)
    with pytest.raises(Stopped):
        work.runner.drain()
    assert setup.states(hashes) == [("queued", 0)] * 2
