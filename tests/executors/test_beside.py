"""Calls of a generator that several workers share, with an executor that does what the test says."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executor_setup import ENGINES

from pipeline.config import Gates
from pipeline.engines import cards
from pipeline.engines.selection import Choice
from pipeline.errors import EngineFailure, EngineUnusable, Stopped
from pipeline.executors import tasks
from pipeline.executors.beside import SharedGenerator, gpu_gb, workers_beside
from pipeline.executors.tasks import MadeTake, TakeRequest
from pipeline.records import Audio, MadeBy, Variation, VariationRequest

WAIT_S = 30.0  # after which a test that would hang fails
MADE_BY = MadeBy("scripted", "1")


def wanted(*tracks: str) -> list[TakeRequest]:
    """A take of each track."""
    audio = Audio(np.zeros((1, 10), np.float32), 10)
    requests = [VariationRequest(f"take of {track}", track, audio, 1.0, 0) for track in tracks]
    return [TakeRequest(one, one.track_id, 1.0, -14.0, Gates()) for one in requests]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@dataclass
class Scripted:
    """An executor whose first call waits until it is released."""

    act: Callable[[str], None] = lambda key: None  # before each take
    calls: list[list[str]] = field(default_factory=list)  # tracks
    began: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    loaded: list[str] = field(default_factory=lambda: ["scripted"])

    def run(self, task: Any, *args: Any, progress: Any, should_stop: Any) -> Iterator[Any]:
        assert task is tasks.generate
        asked, paths = args
        self.calls.append([one.request.track_id for one in asked])
        self.began.set()
        until = time.monotonic() + WAIT_S
        while not self.released.is_set():
            if should_stop():
                raise Stopped("asked to stop")
            assert time.monotonic() < until
            time.sleep(0.01)
        for one in asked:
            if should_stop():
                raise Stopped("asked to stop")
            self.act(one.request.track_id)
            if path := paths.get(one.request.request_id):
                path.touch()
            yield MadeTake(one.request.request_id, MADE_BY), "sound"


@dataclass
class Client:
    """A worker that waits for takes, in a thread."""

    shared: SharedGenerator
    asked: list[TakeRequest]
    paths: dict[str, Path] = field(default_factory=dict)
    should_stop: bool = False
    found: list[str] = field(default_factory=list)
    error: BaseException | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._wait)
        self.thread.start()

    def _wait(self) -> None:
        stop = lambda: self.should_stop  # noqa: E731
        try:
            for take, _ in self.shared.generate(self.asked, self.paths, lambda *_: None, stop):
                self.found.append(take.request_id)
        except BaseException as e:
            self.error = e

    def ended(self) -> Client:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self


def started(executor: Scripted, *asked: list[TakeRequest], most_tracks: int = 8) -> list[Client]:
    """A first call for a track of its own, in which others begin to wait; then it is released."""
    shared = SharedGenerator(executor, most_tracks)  # type: ignore[arg-type]
    first = Client(shared, wanted("first"))
    assert executor.began.wait(WAIT_S)
    others = []
    for one in asked:
        others.append(Client(shared, one))
        wait_until(lambda: len(shared.waiting) == len(others))
    return [first, *others]


def test_a_call_is_limited_by_its_tracks() -> None:
    executor = Scripted()
    clients = started(executor, wanted("a", "b"), wanted("c", "d"), wanted("e", "f"), most_tracks=4)
    executor.released.set()
    for one in clients:
        assert one.ended().found == [asked.request.request_id for asked in one.asked]
    assert executor.calls == [["first"], ["a", "b", "c", "d"], ["e", "f"]]


def test_a_worker_that_wants_more_than_a_call_has_room_for_gets_it_alone() -> None:
    executor = Scripted()
    clients = started(executor, wanted("a"), wanted("b", "c", "d"), wanted("e"), most_tracks=2)
    executor.released.set()
    for one in clients:
        one.ended()
    assert executor.calls == [["first"], ["a"], ["b", "c", "d"], ["e"]]


def test_only_the_cause_of_an_error_gets_it() -> None:
    def act(track: str) -> None:
        if track == "b":
            raise EngineFailure("no sound for b")

    executor = Scripted(act)
    clients = started(executor, wanted("a"), wanted("b"), wanted("c"))
    executor.released.set()
    errors = [str(one.ended().error) for one in clients]
    assert errors == ["None", "None", "no sound for b", "None"]
    assert executor.calls == [["first"], ["a", "b", "c"], ["b"], ["c"]]  # what a has is not made again


def test_an_error_of_the_machine_is_everybodys_and_nothing_is_tried_again() -> None:
    def act(track: str) -> None:
        if track == "b":
            raise EngineUnusable("no memory")

    executor = Scripted(act)
    clients = started(executor, wanted("b"), wanted("a"))
    executor.released.set()
    assert [str(one.ended().error) for one in clients] == ["None", "no memory", "no memory"]
    assert executor.calls == [["first"], ["b", "a"]]


def test_a_stop_of_one_worker_does_not_end_the_call_of_the_others() -> None:
    clients = list[Client]()

    def act(track: str) -> None:
        if track == "a":
            clients[1].should_stop = True

    executor = Scripted(act)
    clients += started(executor, wanted("a"), wanted("b"))
    executor.released.set()
    assert clients[2].ended().found == ["take of b"]
    assert executor.calls == [["first"], ["a", "b"]]


def test_after_an_error_a_stop_begins_no_other_call() -> None:
    clients = list[Client]()

    def act(track: str) -> None:
        if track != "first":
            for one in clients:
                one.should_stop = True
            raise EngineFailure("its process died")

    executor = Scripted(act)
    clients += started(executor, wanted("a"), wanted("b"))
    executor.released.set()
    assert clients[0].ended().error is None
    assert [type(one.ended().error) for one in clients[1:]] == [Stopped, Stopped]
    assert executor.calls == [["first"], ["a", "b"]]


def test_a_worker_that_has_all_its_takes_does_not_wait_for_those_of_others() -> None:
    made_a, may_go_on = threading.Event(), threading.Event()

    def act(track: str) -> None:
        if track == "b":
            made_a.set()
            assert may_go_on.wait(WAIT_S)

    executor = Scripted(act)
    clients = started(executor, wanted("a"), wanted("b"))
    executor.released.set()
    assert made_a.wait(WAIT_S)
    try:
        assert clients[1].ended().found == ["take of a"]
        assert clients[2].found == []
    finally:
        may_go_on.set()
    assert clients[2].ended().found == ["take of b"]


def test_sounds_for_which_nobody_waits_any_more_are_removed(tmp_path: Path) -> None:
    shared = SharedGenerator(executor := Scripted(), 8)  # type: ignore[arg-type]
    asked = wanted("a", "b")
    paths = {one.request.request_id: tmp_path / f"{one.source}.npy" for one in asked}
    second = threading.Event()

    def act(track: str) -> None:
        if track == "b":
            assert second.wait(WAIT_S)

    executor.act = act
    executor.released.set()
    sounds = shared.generate(asked, paths, lambda *_: None, lambda: False)
    assert next(sounds)[0].request_id == "take of a"
    threading.Timer(0.1, second.set).start()
    sounds.close()  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_known_for_one_when_a_sound_is_stored() -> None:
    sound = Variation("a", Audio(np.zeros((1, 100_000), np.float32), 32000))
    with pytest.raises(OSError, match="No space left") as caught:
        tasks._stored(sound, Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("cores", "gpu_gb", "plain", "with_models"),
    [
        (0.5, math.inf, 1, 1),
        (1, math.inf, 2, 1),
        (2, math.inf, 4, 2),
        (8, math.inf, 16, 8),
        (64, math.inf, 16, 8),
        (16, 85.5, 16, 8),  # H100
        (16, 25.8, 16, 3),  # RTX 4090
        (16, 8.6, 16, 1),
        (16, 0.0, 16, 1),
        (2, 25.8, 4, 2),
    ],
)
def test_there_are_two_workers_for_each_core_and_fewer_with_models(
    cores: float, gpu_gb: float, plain: int, with_models: int
) -> None:
    (_, settings), generator, _ = ENGINES
    clap = Choice(cards()["clap"], "a/model", None, "test")
    audiobox = Choice(cards()["audiobox"], "a/model", None, "test")
    assert workers_beside(cores, ENGINES, lambda: pytest.fail("asked for nothing")) == plain
    assert workers_beside(cores, ((clap, settings), generator, None), lambda: gpu_gb) == with_models
    rated = (ENGINES[0], generator, (audiobox, replace(settings)))
    assert workers_beside(cores, rated, lambda: gpu_gb) == with_models


@pytest.mark.parametrize(
    ("script", "gb"),
    [
        ("echo 81559", 85.52),
        ("echo 24564; echo 12288", 12.88),
        ("echo '[N/A]'", 0.0),
        ("echo 'no devices were found'; exit 6", 0.0),
        (None, 0.0),
    ],
)
def test_the_memory_of_the_smallest_gpu_is_asked_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, gb: float
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        program = tmp_path / "nvidia-smi"
        asked = "--query-gpu=memory.total --format=csv,noheader,nounits"
        program.write_text(f"#!/bin/sh\n[ \"$*\" = '{asked}' ] || exit 1\n{script}\n")
        program.chmod(0o755)
    assert gpu_gb() == pytest.approx(gb, abs=0.01)
