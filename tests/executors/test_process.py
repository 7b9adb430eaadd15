"""Tasks in a worker process: what comes back, and what a stop, a death and an idle time do."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worker_tasks
from home_folder import ROOT

from pipeline.engines import cards
from pipeline.engines.base import EngineSettings
from pipeline.engines.selection import Choice
from pipeline.errors import BadAudio, Stopped
from pipeline.executors import process
from pipeline.executors.base import Task, WorkerLost
from pipeline.executors.process import THREADS, ProcessExecutor, shares_of_machine

HERE = Path(__file__).parent
ENGINES = (
    (Choice(cards()["descriptors"], None, None, "test"), EngineSettings()),
    (Choice(cards()["remix"], None, None, "test"), EngineSettings()),
    None,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def executor(clock: Clock) -> Iterator[ProcessExecutor]:
    made = ProcessExecutor(ENGINES, idle_s=60, clock=clock)
    yield made
    made.close()


def run(executor: ProcessExecutor, task: Task, *args: Any, stop: bool = False) -> list[Any]:
    return list(executor.run(task, *args, progress=lambda *_: None, should_stop=lambda: stop))


def test_values_and_progress_come_in_their_order(executor: ProcessExecutor) -> None:
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


def test_another_task_runs_between_two_results(executor: ProcessExecutor) -> None:
    outer = executor.run(worker_tasks.echo, "a", "b", progress=lambda *_: None, should_stop=lambda: False)
    assert next(outer) == "a"
    assert run(executor, worker_tasks.echo, "c", "d") == ["c", "d"]
    with pytest.raises(BadAudio, match="is no sound"):
        run(executor, worker_tasks.refuse, "is no sound")
    assert list(outer) == ["b"]


def test_a_task_between_two_results_that_ends_the_process_ends_both(executor: ProcessExecutor) -> None:
    outer = executor.run(worker_tasks.echo, "a", "b", progress=lambda *_: None, should_stop=lambda: False)
    assert next(outer) == "a"
    with pytest.raises(WorkerLost):
        run(executor, worker_tasks.die, signal.SIGKILL)
    [alive] = run(executor, worker_tasks.process_id)
    with pytest.raises(WorkerLost):
        next(outer)
    assert run(executor, worker_tasks.process_id) == [alive]


def test_a_mapped_file_is_mapped_by_the_process_and_a_part_of_one_is_copied(
    executor: ProcessExecutor, tmp_path: Path
) -> None:
    np.save(tmp_path / "sound.npy", np.arange(12, dtype=np.float32).reshape(2, 6))
    whole = np.load(tmp_path / "sound.npy", mmap_mode="r")
    [(values, file), (part, none)] = run(executor, worker_tasks.describe, whole, whole[:, 2:5])
    assert (values, Path(file)) == (whole.tolist(), tmp_path / "sound.npy")
    assert (part, none) == ([[2, 3, 4], [8, 9, 10]], None)


def test_the_process_gets_no_credentials(executor: ProcessExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    [variables] = run(executor, worker_tasks.variables)
    assert "PATH" in variables
    assert "AWS_SECRET_ACCESS_KEY" not in variables


def test_an_exit_of_an_engine_is_an_error_and_not_the_end(executor: ProcessExecutor) -> None:
    with pytest.raises(RuntimeError, match="SystemExit: 0"):
        run(executor, worker_tasks.leave)


def test_a_process_that_has_died_unnoticed_is_replaced_when_settings_change(
    executor: ProcessExecutor,
) -> None:
    [before] = run(executor, worker_tasks.process_id)
    os.kill(before, signal.SIGKILL)
    assert executor._worker is not None
    executor._worker.process.wait()
    executor.use(ENGINES, idle_s=1)
    executor.use(ENGINES, idle_s=1)
    assert run(executor, worker_tasks.process_id) != [before]


def test_one_process_runs_all_tasks_and_keeps_its_engines(executor: ProcessExecutor) -> None:
    [first], [second] = run(executor, worker_tasks.process_id), run(executor, worker_tasks.process_id)
    assert first == second != os.getpid()
    engine = run(executor, worker_tasks.embedder_of)
    executor.use(ENGINES, idle_s=1)
    assert run(executor, worker_tasks.embedder_of) == engine
    assert engine[0][0] == "descriptors"


def test_what_a_task_raises_is_raised_here_with_its_own_traceback(executor: ProcessExecutor) -> None:
    with pytest.raises(BadAudio, match="is no music") as caught:
        run(executor, worker_tasks.refuse, "is no music")
    assert "worker_tasks.py" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
        run(executor, worker_tasks.raise_unpicklable)
    assert run(executor, worker_tasks.echo, 1) == [1]


def test_a_stop_ends_the_task_and_not_the_process(executor: ProcessExecutor) -> None:
    [process] = run(executor, worker_tasks.process_id)
    with pytest.raises(Stopped):
        run(executor, worker_tasks.wait_for_stop, stop=True)
    assert run(executor, worker_tasks.process_id) == [process]


@pytest.mark.parametrize(
    ("number", "says"),
    [(signal.SIGKILL, "SIGKILL, as happens where memory is short"), (signal.SIGSEGV, "SIGSEGV")],
)
def test_a_death_is_reported_and_the_next_task_has_a_new_process(
    executor: ProcessExecutor, number: int, says: str
) -> None:
    [before] = run(executor, worker_tasks.process_id)
    results = executor.run(worker_tasks.die, number, progress=lambda *_: None, should_stop=lambda: False)
    assert next(results) == "begun"
    with pytest.raises(WorkerLost, match=says):
        next(results)
    assert run(executor, worker_tasks.process_id) != [before]


def test_a_task_of_which_no_more_is_wanted_is_closed(executor: ProcessExecutor, tmp_path: Path) -> None:
    results = executor.run(
        worker_tasks.note_its_end, tmp_path / "file", progress=lambda *_: None, should_stop=lambda: False
    )
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert (tmp_path / "file").read_text() == "ended"
    assert run(executor, worker_tasks.echo, 1) == [1]


def test_an_error_of_the_owner_between_two_results_leaves_nothing_for_the_next_task(
    executor: ProcessExecutor,
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal is gone"):
        list(executor.run(worker_tasks.echo, 1, 2, progress=fail, should_stop=lambda: False))
    assert run(executor, worker_tasks.echo, 3) == [3]


def test_an_idle_process_ends_and_the_next_task_starts_another(
    executor: ProcessExecutor, clock: Clock
) -> None:
    [before] = run(executor, worker_tasks.process_id)
    clock.now = 60.0
    executor.release_if_idle()
    assert run(executor, worker_tasks.process_id) == [before]
    clock.now = 120.1
    executor.release_if_idle()
    assert not is_running(before)
    assert run(executor, worker_tasks.process_id) != [before]


def test_its_log_is_the_owners(executor: ProcessExecutor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pipeline"):
        run(executor, worker_tasks.say, "half a second\nlater")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "half a second\nlater")
    ]


def test_several_processes_share_the_cores_and_no_cache_of_compiled_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process, "n_cores", lambda: 8)
    first, second, third = shares_of_machine(3, tmp_path, divides_cores=True)
    assert {first[name] for name in THREADS} == {"2"}
    assert "NUMBA_CACHE_DIR" not in first
    assert second["NUMBA_CACHE_DIR"] != third["NUMBA_CACHE_DIR"]
    assert shares_of_machine(1, tmp_path, divides_cores=True) == [{}]
    assert shares_of_machine(2, tmp_path, divides_cores=False)[0] == {}

    executor = ProcessExecutor(ENGINES, 60, second)
    try:
        assert run(executor, worker_tasks.variable, "NUMBA_CACHE_DIR") == [second["NUMBA_CACHE_DIR"]]
    finally:
        executor.close()


OWNER = """
import sys
from pathlib import Path
from test_process import ENGINES
import worker_tasks
from pipeline.executors.process import ProcessExecutor
executor = ProcessExecutor(ENGINES, 60)
list(executor.run(worker_tasks.sleep, Path(sys.argv[1]), progress=print, should_stop=lambda: False))
"""


def test_the_death_of_the_owner_ends_the_process_in_the_middle_of_a_task(tmp_path: Path) -> None:
    file, paths = tmp_path / "worker", [HERE, ROOT, ROOT / "tests"]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    try:
        assert eventually(lambda: file.exists() and file.read_text())
    finally:
        owner.kill()
        owner.wait()
    assert eventually(lambda: not is_running(int(file.read_text())))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition: Any) -> bool:
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False
