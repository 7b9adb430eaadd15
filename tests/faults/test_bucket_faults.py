"""Kills at random moments, and a network that fails, while inbox and outbox are in a bucket.

After each batch what is in the bucket is copied to folders and held against the same invariants as for
folders. How often a manifest was written is counted on the way to the server.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import KILLED, TIMEOUT_S, ForkServer, ProgramRun, new_home, why_not
from home_folder import Home
from invariants import Reference, check_finished, inputs_of, kills, states, tracks
from test_workers import workers_of

from pipeline.service.health import read_health

if TYPE_CHECKING:
    from bucket_proxy import Proxy
    from bucket_server import Bucket, BucketServer

pytestmark = pytest.mark.long  # minutes, and packages that only test-all installs

FILES = 12
KILLS = 30
LONGEST_RUN_S = 4.0  # of those that are killed; a whole batch takes about as long
KILLS_WITH_WORKERS = 12
LONGEST_WORK_S = 8.0  # of a run with workers after they have been started, which takes seconds
LONGEST_REST_S = 2.0  # of a run after a worker was killed
CHECK_EVERY_S = 0.1


@dataclass
class Batches:
    """Homes with the same tracks in the bucket, and what becomes of them without faults."""

    bucket: Bucket
    proxy: Proxy
    fork_server: ForkServer
    folder: Path
    executor: Any = "inline"
    n: int = 0
    reference: Reference | None = None

    def new(self) -> Batch:
        from bucket_server import configure, upload

        self.n += 1
        self.proxy.passed.clear()
        home = new_home(self.folder / f"home {self.n}", tracks=FILES)
        self.bucket.clear()  # not another one, as its name is in the configuration and so in the manifests
        upload(self.bucket, home.inbox)
        retry = {"max_attempts": 100, "backoff_s": 0}
        pages = {"enabled": True}
        intake = {"settle_s": 0, "poll_s": 0.2}
        configure(home, self.bucket, retry=retry, intake=intake, gallery=pages, executor=self.executor)
        return Batch(self, home, self.bucket)


@dataclass
class Batch:
    batches: Batches
    home: Home
    bucket: Bucket
    runs: list[ProgramRun] = field(default_factory=list)
    killed_workers: int = 0

    def start(self, verb: str) -> ProgramRun:
        run = self.batches.fork_server.start(self.home, verb)
        self.runs.append(run)
        return run

    def is_over(self) -> bool:
        n_done = sum(state == "done" for state in states(self.home).values())
        return n_done == FILES and len(self.bucket.listed("in/done")) == FILES

    def ends_by_itself(self, verb: str) -> int:
        """A run to the end: `once` ends, `watch` gets a signal when all is done."""
        run = self.start(verb)
        for _ in range(round(TIMEOUT_S / CHECK_EVERY_S)):
            if run.wait(CHECK_EVERY_S) is not None or (verb == "watch" and self.is_over()):
                break
        if verb == "watch":
            run.signal(signal.SIGTERM)
        return run.end()

    def check(self) -> None:
        """Nothing is lost, published twice or torn."""
        assert self.batches.reference is not None
        self.bucket.mirror(self.home)
        check_finished(self.home, self.batches.reference, self.runs)
        begin, end = f"PUT /{self.bucket.name}/out/", "/manifest.json"
        passed = self.batches.proxy.passed.items()
        written = [n for line, n in passed if line.startswith(begin) and line.endswith(end)]
        assert written == [1] * FILES, "a manifest was written twice"

    def kill_a_worker(self, run: ProgramRun, rng: random.Random) -> None:
        """Kill one of the run's workers, if it has any."""
        if workers := workers_of(run):
            with suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                self.killed_workers += 1

    def check_attempts(self) -> int:
        """No more attempts are counted than workers were killed; returns how many were."""
        counted = sum(attempts for _, attempts in tracks(self.home).values())
        assert counted <= self.killed_workers, f"{counted} attempts for {self.killed_workers} workers"
        return counted


@contextmanager
def batches_in(server: BucketServer, folder: Path, executor: Any = "inline") -> Iterator[Batches]:
    from bucket_proxy import proxy_to

    if reason := why_not():
        pytest.skip(reason)
    with proxy_to(server.port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables(port=proxy.port).items():
            patch.setenv(name, value)
        with ForkServer(folder / "fork_server") as fork_server:
            made = Batches(server.made_bucket(folder.name), proxy, fork_server, folder, executor)
            undisturbed = made.new()
            inputs = inputs_of(undisturbed.home)
            assert undisturbed.ends_by_itself("once") == 0, undisturbed.runs[0].out
            undisturbed.bucket.mirror(undisturbed.home)
            made.reference = Reference.of(undisturbed.home, inputs)
            undisturbed.check()
            yield made


@pytest.fixture(scope="module")
def batches(server: BucketServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batches]:
    with batches_in(server, tmp_path_factory.mktemp("batches")) as made:
        yield made


@pytest.fixture(scope="module")
def batches_with_workers(server: BucketServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batches]:
    two_processes = {"kind": "process", "workers": 2}
    with batches_in(server, tmp_path_factory.mktemp("batches-with-workers"), two_processes) as made:
        yield made


@pytest.fixture
def batch(batches: Batches) -> Iterator[Batch]:
    made = batches.new()
    batches.proxy.met.clear()
    yield made
    batches.proxy.share, batches.proxy.fault = 0.0, None
    shutil.rmtree(made.home.folder)


@pytest.mark.parametrize("verb", ["once", "watch"])
def test_kills_lose_nothing(batches: Batches, figures: list[str], verb: str) -> None:
    rng, n_kills, n_batches, n_runs = random.Random(7), 0, 0, 0
    while n_kills < KILLS:
        batch, n_batches = batches.new(), n_batches + 1
        while n_kills + kills(batch.runs) < KILLS and not batch.is_over():
            run = batch.start(verb)
            run.wait(rng.uniform(0.1, LONGEST_RUN_S))
            run.signal(signal.SIGKILL)
            run.end()
        assert batch.ends_by_itself(verb) == 0, batch.runs[-1].out
        batch.check()
        n_kills += kills(batch.runs)
        n_runs += len(batch.runs)
        assert {run.code for run in batch.runs} <= {0, KILLED}
    figures.append(
        f"{verb} over S3: {n_kills} kills over {n_batches} batches of {FILES} files, {n_runs} runs:"
        " 0 lost, 0 published twice, 0 torn"
    )


@pytest.mark.parametrize("verb", ["once", "watch"])
def test_kills_of_owners_and_workers_lose_nothing(
    batches_with_workers: Batches, figures: list[str], verb: str
) -> None:
    rng, batch, counted = random.Random(8), batches_with_workers.new(), 0
    while kills(batch.runs) < KILLS_WITH_WORKERS and not batch.is_over():
        run = batch.start(verb)
        while run.wait(CHECK_EVERY_S) is None and not workers_of(run):
            pass
        run.wait(rng.uniform(0, LONGEST_WORK_S))
        if rng.random() < 0.5:
            batch.kill_a_worker(run, rng)
            run.wait(rng.uniform(0, LONGEST_REST_S))
        run.signal(signal.SIGKILL)
        run.end()
        counted = max(counted, batch.check_attempts())
    assert batch.ends_by_itself(verb) == 0, batch.runs[-1].out
    if verb == "watch":  # on a busy machine its stop may be cut off before it has written the list of tracks
        assert batch.ends_by_itself("once") == 0, batch.runs[-1].out
    batch.check()
    assert {run.code for run in batch.runs} <= {0, KILLED}
    figures.append(
        f"{verb} over S3 with processes: {kills(batch.runs)} kills of owners and {batch.killed_workers} of"
        f" workers, {FILES} files, {counted} attempts counted at the same time: 0 lost, 0 published twice,"
        " 0 torn"
    )


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_network_that_fails_loses_nothing(
    batches: Batches, batch: Batch, figures: list[str], share: float
) -> None:
    from bucket_proxy import PASS

    batches.proxy.share = share
    assert batch.ends_by_itself("watch") == 0, batch.runs[-1].out
    batches.proxy.share = 0.0
    batch.check()
    met = dict(sorted(batches.proxy.met.items()))
    n_passed = met.pop(PASS)
    faults = f"{share:.0%} of the requests fail: {n_passed} passed, {met}"
    figures.append(f"watch over S3, {faults}: 0 lost, 0 published twice, 0 torn")


def conditions(home: Home) -> list[dict[str, Any]]:
    """What `status` calls degraded."""
    report = read_health(home.folder / "state" / "health.json") or {}
    return list(report.get("conditions", ()))


@pytest.mark.parametrize("fault", ["cut before", "503", "expired"])
def test_a_bucket_that_is_away_is_waited_for(batches: Batches, batch: Batch, fault: str) -> None:
    run = batch.start("watch")
    while not batch.bucket.listed("out"):
        assert run.wait(CHECK_EVERY_S) is None, run.out
    batches.proxy.fault = fault
    while not any(one["what"] in ("folders", "inbox") for one in conditions(batch.home)):
        assert run.wait(CHECK_EVERY_S) is None, run.out
    batches.proxy.fault = None
    while not batch.is_over():
        assert run.wait(CHECK_EVERY_S) is None, run.out
    while conditions(batch.home):
        assert run.wait(CHECK_EVERY_S) is None, run.out
    run.signal(signal.SIGTERM)
    assert run.end() == 0, run.out
    batch.check()
