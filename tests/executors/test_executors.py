"""What holds for every executor that has its engines in another process, on this machine or on Ray."""

from __future__ import annotations

import hashlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import worker_tasks
from executor_setup import ENGINES, cluster_at, run
from ray_setup import NEEDS_RAY

from pipeline.config import Output
from pipeline.errors import BadAudio, Stopped
from pipeline.executors import tasks
from pipeline.executors.base import Executor, WorkerLost
from pipeline.executors.encode import FileForm
from pipeline.executors.process import ProcessExecutor
from pipeline.executors.ray_cluster import RayCluster
from pipeline.executors.ray_environment import AUTO
from pipeline.executors.ray_nodes import Resources
from pipeline.records import Audio


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    made = cluster_at(AUTO, Resources(cpu=0.25, gpu=0))
    yield made
    made.close()


@pytest.fixture(params=["process", pytest.param("ray", marks=[pytest.mark.long, NEEDS_RAY])])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "ray":
        yield request.getfixturevalue("cluster").ready()[0]
        return
    made = ProcessExecutor(ENGINES, idle_s=60)
    yield made
    made.close()


def test_values_and_progress_come_in_their_order(executor: Executor) -> None:
    steps: list[tuple[str, int, int]] = []
    sound = np.arange(6, dtype=np.float32).reshape(2, 3)
    seen = []
    for value in executor.run(
        worker_tasks.echo, "a", sound, progress=lambda *step: steps.append(step), should_stop=lambda: False
    ):
        seen.append((value, len(steps)))

    assert [n_steps for _, n_steps in seen] == [1, 2]  # a result is made when it is asked for
    assert seen[0][0] == "a"
    np.testing.assert_array_equal(seen[1][0], sound)
    assert steps == [("echo", 1, 2), ("echo", 2, 2)]


def test_it_is_known_which_engines_are_loaded(executor: Executor) -> None:
    assert executor.loaded == []
    [(name, _)] = run(executor, worker_tasks.embedder_of)
    assert executor.loaded == [name] == ["descriptors"]
    executor.close()
    assert executor.loaded == []


def test_a_worker_of_this_machine_writes_a_file_at_its_place(executor: Executor, tmp_path: Path) -> None:
    tone, form = Audio(np.full((2, 100), 0.1, np.float32), 44100), FileForm(Output(), {"title": "a"})
    place = tmp_path / "track" / "variations" / ".01-a.wav.part"
    [content] = run(executor, tasks.encode, tone, form)
    for _ in range(2):  # the second time over what a killed run has left
        [written] = run(executor, tasks.encode, tone, form, None, place)
        assert (written.path, written.sha256) == (place, hashlib.sha256(content).hexdigest())
        assert place.read_bytes() == content
    assert executor.shares_disk


def test_another_task_runs_between_two_results(executor: Executor) -> None:
    outer = executor.run(worker_tasks.echo, "a", "b", progress=lambda *_: None, should_stop=lambda: False)
    assert next(outer) == "a"
    assert run(executor, worker_tasks.echo, "c", "d") == ["c", "d"]
    with pytest.raises(BadAudio, match="is no sound"):
        run(executor, worker_tasks.refuse, "is no sound")
    assert list(outer) == ["b"]


def test_a_task_between_two_results_that_ends_the_process_ends_both(executor: Executor) -> None:
    outer = executor.run(worker_tasks.echo, "a", "b", progress=lambda *_: None, should_stop=lambda: False)
    assert next(outer) == "a"
    with pytest.raises(WorkerLost):
        run(executor, worker_tasks.die, signal.SIGKILL)
    [alive] = run(executor, worker_tasks.process_id)
    with pytest.raises(WorkerLost):
        next(outer)
    assert run(executor, worker_tasks.process_id) == [alive]


def test_what_a_task_raises_is_raised_here_with_its_own_traceback(executor: Executor) -> None:
    with pytest.raises(BadAudio, match="is no music") as caught:
        run(executor, worker_tasks.refuse, "is no music")
    assert "worker_tasks.py" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
        run(executor, worker_tasks.raise_unpicklable)
    with pytest.raises(RuntimeError, match="SystemExit: 0"):
        run(executor, worker_tasks.leave)
    assert run(executor, worker_tasks.echo, 1) == [1]


def test_after_an_error_that_lasts_as_long_as_its_process_another_one_is_started(executor: Executor) -> None:
    """Of a GPU, torch's and Triton's; a full one can be used again."""
    for sentence, is_replaced in (
        ("CUDA error: an illegal memory access was encountered", True),
        ("HIP error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
    ):
        [before] = run(executor, worker_tasks.process_id)
        with pytest.raises(BadAudio, match=r"CUDA|HIP"):
            run(executor, worker_tasks.refuse, sentence)
        [after] = run(executor, worker_tasks.process_id)
        assert (after != before) == is_replaced


def test_a_task_of_which_no_more_is_wanted_is_closed(executor: Executor, tmp_path: Path) -> None:
    results = executor.run(
        worker_tasks.note_its_end, tmp_path / "file", progress=lambda *_: None, should_stop=lambda: False
    )
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert (tmp_path / "file").read_text() == "ended"
    assert run(executor, worker_tasks.echo, 1) == [1]


def test_an_error_of_the_owner_between_two_results_leaves_nothing_for_the_next_task(
    executor: Executor,
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal is gone"):
        list(executor.run(worker_tasks.echo, 1, 2, progress=fail, should_stop=lambda: False))
    assert run(executor, worker_tasks.echo, 3) == [3]


def test_its_log_is_the_owners(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    run(executor, worker_tasks.echo, 1)  # it is started
    with caplog.at_level(logging.DEBUG, "pipeline"):
        run(executor, worker_tasks.say, "half a second\nlater")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "half a second\nlater")
    ]


def test_a_stop_ends_the_task_and_not_the_process(executor: Executor) -> None:
    [process] = run(executor, worker_tasks.process_id)
    with pytest.raises(Stopped):
        run(executor, worker_tasks.wait_for_stop, stop=True)
    assert run(executor, worker_tasks.process_id) == [process]
