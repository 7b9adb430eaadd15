"""Tasks in a worker process: what comes back, and what a stop, a death and an idle time do."""

from __future__ import annotations

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
from executor_setup import ENGINES, run, with_threads
from home_folder import ROOT
from set_clock import SetClock

from pipeline.executors import process
from pipeline.executors.base import WorkerLost
from pipeline.executors.process import THREADS, ProcessExecutor, shares_of_machine

HERE = Path(__file__).parent


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def executor(clock: SetClock) -> Iterator[ProcessExecutor]:
    made = ProcessExecutor(ENGINES, idle_s=60, clock=clock)
    yield made
    made.close()


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


def test_one_process_runs_all_tasks_and_keeps_its_engines(executor: ProcessExecutor) -> None:
    [first], [second] = run(executor, worker_tasks.process_id), run(executor, worker_tasks.process_id)
    assert first == second != os.getpid()
    engine = run(executor, worker_tasks.embedder_of)
    executor.use(ENGINES, idle_s=1)
    assert run(executor, worker_tasks.embedder_of) == engine
    assert engine[0][0] == "descriptors"


def test_other_engines_have_another_process_and_are_not_loaded_before_it_says_so(
    executor: ProcessExecutor,
) -> None:
    """torch's number of threads, once set, lasts as long as the process."""
    [before], _ = run(executor, worker_tasks.process_id), run(executor, worker_tasks.embedder_of)
    assert executor.loaded == ["descriptors"]
    executor.use(with_threads(2), idle_s=1)
    assert executor.loaded == []
    assert not is_running(before)
    run(executor, worker_tasks.embedder_of)
    assert executor.loaded == ["descriptors"]
    os.kill(run(executor, worker_tasks.process_id)[0], signal.SIGKILL)
    executor.use(ENGINES, idle_s=1)
    [after] = run(executor, worker_tasks.process_id)
    assert after != before


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


def test_an_idle_process_ends_and_the_next_task_starts_another(
    executor: ProcessExecutor, clock: SetClock
) -> None:
    [before] = run(executor, worker_tasks.process_id)
    clock.now = 60.0
    executor.release_if_idle()
    assert run(executor, worker_tasks.process_id) == [before]
    clock.now = 120.1
    executor.release_if_idle()
    assert not is_running(before)
    assert run(executor, worker_tasks.process_id) != [before]


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
from executor_setup import ENGINES
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
