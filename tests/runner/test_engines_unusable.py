"""An engine that can't be loaded is the environment's fault: no track is claimed, counted or moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from runner_setup import RunnerSetup, StubEngines, StubGenerator, StubRater, UnloadableEngines

from pipeline.engines import cards
from pipeline.engines.base import EngineSettings
from pipeline.engines.loading import LoadedEngines
from pipeline.engines.selection import Choice
from pipeline.errors import (
    BadCheckpoint,
    ConfigError,
    DiskFull,
    EngineUnusable,
    FolderUnusable,
    MissingPackage,
    PipelineError,
)
from pipeline.executors.base import WorkerLost
from pipeline.records import Failure
from pipeline.runner.runner import Runner


@pytest.fixture
def engines() -> UnloadableEngines:
    return UnloadableEngines(StubGenerator(), error=EngineUnusable("device: cuda can't be used"))


@pytest.fixture
def runner(setup: RunnerSetup, engines: UnloadableEngines) -> Runner:
    return setup.runner(engines=engines)


def test_nothing_is_claimed_and_work_continues_once_the_engine_can_be_loaded(
    setup: RunnerSetup, runner: Runner, engines: UnloadableEngines
) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav")

    for _ in range(3):
        with pytest.raises(EngineUnusable, match="cuda can't be used"):
            runner.drain()
    assert setup.states(hashes) == [("queued", 0)] * 2
    assert [setup.outcomes(sha256) for sha256 in hashes] == [[], []]
    assert sorted(path.name for path in setup.workspace.inbox.rglob("*")) == ["a.wav", "b.wav"]

    engines.error = None
    runner.drain()
    assert setup.states(hashes) == [("done", 0)] * 2


def test_a_rater_that_cannot_be_loaded_costs_no_track_an_attempt(setup: RunnerSetup) -> None:
    class WithoutRater(StubEngines):
        def rater(self) -> StubRater:
            raise EngineUnusable("no weights")

    hashes = setup.add_tracks("a.wav")
    with pytest.raises(EngineUnusable, match="no weights"):
        setup.runner(engines=WithoutRater(StubGenerator())).drain()
    assert (setup.states(hashes), setup.outcomes(hashes[0])) == ([("queued", 0)], [])


@pytest.mark.parametrize("deaths", [2, 3])
def test_engines_whose_process_dies_three_times_while_they_are_loaded_cannot_be_used(
    setup: RunnerSetup, deaths: int
) -> None:
    lost = [WorkerLost("the process of the engines was ended by SIGKILL")] * deaths

    class Dying(StubEngines):
        def generator(self) -> StubGenerator:
            if lost:
                raise lost.pop()
            return super().generator()

    hashes = setup.add_tracks("a.wav")
    runner = setup.runner(engines=Dying(StubGenerator()))
    if deaths == 2:
        runner.drain()
        assert setup.states(hashes) == [("done", 0)]
        return
    with pytest.raises(EngineUnusable, match=r"can't be loaded: .* SIGKILL"):
        runner.drain()
    assert (setup.states(hashes), setup.outcomes(hashes[0])) == ([("queued", 0)], [])


def test_an_engine_that_no_due_track_needs_is_not_loaded(
    setup: RunnerSetup, runner: Runner, engines: UnloadableEngines
) -> None:
    [sha256] = setup.add_tracks("a.wav")
    setup.runner(StubGenerator()).drain()
    runner.drain()  # an empty queue needs no engine
    setup.store.requeue(sha256, now=setup.now)

    runner.drain()

    assert setup.states([sha256]) == [("done", 0)]


def test_weights_that_disappear_during_the_work_cost_no_track_an_attempt(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav")
    gone = BadCheckpoint("models/musicgen has no config.json")

    with pytest.raises(BadCheckpoint):
        setup.runner(StubGenerator(lambda request: Failure(request.request_id, gone))).drain()

    assert setup.states(hashes) == [("queued", 0)] * 2
    setup.runner(StubGenerator()).drain()
    assert setup.states(hashes) == [("done", 0)] * 2


def fail_with(error: Exception) -> Callable[[EngineSettings], StubGenerator]:
    def load(_: EngineSettings) -> StubGenerator:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ConfigError("int8 needs a CPU"), EngineUnusable, "int8 needs a CPU"),
        (MissingPackage("pip install x"), MissingPackage, "pip install x"),
        (ImportError("libcudart.so: cannot open"), EngineUnusable, "libcudart.so"),
        (MemoryError(), EngineUnusable, "remix can't be loaded: MemoryError"),
        (RuntimeError("damaged"), EngineUnusable, "remix can't be loaded: RuntimeError: damaged"),
        (OSError(28, "No space left on device"), DiskFull, "no space left"),
        (PermissionError(13, "Permission denied", "w.safetensors"), FolderUnusable, "w.safetensors"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_error_of_loading_is_an_environment_error(
    error: Exception, kind: type[PipelineError], says: str
) -> None:
    choice = Choice(replace(cards()["remix"], load=fail_with(error)), None, None, "test")
    wanted = choice, EngineSettings()
    engines = LoadedEngines(wanted, wanted, wanted)

    with pytest.raises(kind, match=says):
        engines.generator()
    with pytest.raises(kind, match=says):
        engines.rater()


def test_a_rater_is_loaded_once_and_only_if_it_is_wanted() -> None:
    made: list[StubRater] = []

    def load(_: EngineSettings) -> StubRater:
        made.append(StubRater(lambda audio: {}))
        return made[-1]

    others = Choice(cards()["remix"], None, None, "test"), EngineSettings()
    rater = Choice(replace(cards()["audiobox"], load=load), None, None, "test"), EngineSettings()
    assert LoadedEngines(others, others).rater() is None
    engines = LoadedEngines(others, others, rater)
    assert engines.rater() is engines.rater() is LoadedEngines(others, others, rater, engines).rater()
    assert len(made) == 1


def test_a_track_that_would_wait_longer_than_the_longest_backoff_is_due_now(
    setup: RunnerSetup, caplog: pytest.LogCaptureFixture
) -> None:
    now, years_ahead = setup.add_tracks("a.wav", "b.wav")
    setup.store.claim([setup.track(years_ahead)])
    setup.store.release(years_ahead, not_before=setup.now + 1e8)

    setup.runner(StubGenerator()).drain()

    assert setup.states([now, years_ahead]) == [("done", 0)] * 2
    assert "the clock was set back" in caplog.text


def test_the_longest_regular_wait_is_kept(tmp_path: Path) -> None:
    setup = RunnerSetup.at(tmp_path)
    [sha256] = setup.add_tracks("a.wav")
    setup.store.claim([setup.track(sha256)])
    setup.store.release(sha256, not_before=setup.now + 1.25 * setup.config.retry.max_backoff_s)

    assert setup.runner(StubGenerator()).drain() is False
    assert setup.states([sha256]) == [("queued", 0)]
