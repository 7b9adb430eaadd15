"""Kills at random moments, and a network that fails, while inbox and outbox are in a bucket.

After each batch what is in the bucket is copied to folders and held against the same invariants as for
folders. How often a manifest was written is counted on the way to the server.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import KILLED, TIMEOUT_S, ForkServer, ProgramRun, new_home, why_not
from home_folder import Home
from invariants import Reference, check_finished, inputs_of, kills, states

from pipeline.service.health import read_health

if TYPE_CHECKING:
    from bucket_proxy import Proxy
    from bucket_server import Bucket, BucketServer

pytestmark = pytest.mark.long  # minutes, and packages that only test-all installs

FILES = 12
KILLS = 30
LONGEST_RUN_S = 4.0  # of those that are killed; a whole batch takes about as long
CHECK_EVERY_S = 0.1


@dataclass
class Batches:
    """Homes with the same tracks in the bucket, and what becomes of them without faults."""

    bucket: Bucket
    proxy: Proxy
    fork_server: ForkServer
    folder: Path
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
        configure(home, self.bucket, retry=retry, intake={"settle_s": 0, "poll_s": 0.2}, gallery=pages)
        return Batch(self, home, self.bucket)


@dataclass
class Batch:
    batches: Batches
    home: Home
    bucket: Bucket
    runs: list[ProgramRun] = field(default_factory=list)

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


@pytest.fixture(scope="module")
def batches(server: BucketServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batches]:
    from bucket_proxy import proxy_to

    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("batches")
    with proxy_to(server.port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables(port=proxy.port).items():
            patch.setenv(name, value)
        with ForkServer(folder / "fork_server") as fork_server:
            made = Batches(server.made_bucket("batches"), proxy, fork_server, folder)
            undisturbed = made.new()
            inputs = inputs_of(undisturbed.home)
            assert undisturbed.ends_by_itself("once") == 0, undisturbed.runs[0].out
            undisturbed.bucket.mirror(undisturbed.home)
            made.reference = Reference.of(undisturbed.home, inputs)
            undisturbed.check()
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
