"""Estimates of the time left, against a simulation of workers whose times are known, with passed-in times."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.pace import Pace, Wanted, makespan_s, rough, stage_left_s, times_left
from pipeline.records import Stage
from pipeline.store.schema import AttemptOutcome, FileState, SourceFile, Track, TrackState, Unfinished, Work
from pipeline.store.store import Store

TAKES, TAKE_S = 4, 30.0  # of each track, and the length of each
WANTED = Wanted("engine", None, TAKES, TAKES * TAKE_S, 0, 1.0)
BYTES_PER_S = 20_000
Facts = dict[str, Any]


@dataclass
class SimulatedWorkers:
    """Workers that need a certain time for each stage, and the queue that they work off.

    Times are those of the engine remix, give or take 15 %.
    """

    store: Store
    n: int
    model: str | None = None
    again: float = 0.0  # share of the takes that fail a gate
    seed: int = 0
    now: float = 1000.0
    slower: float = 1.0
    facts: list[Facts] = field(default_factory=list)  # of each worker, see `Runner.workers`

    def __post_init__(self) -> None:
        self.wanted = replace(WANTED, model=self.model)
        self.random = random.Random(self.seed)
        self.facts = [idle(k) for k in range(self.n)]

    def add(self, n_tracks: int, *, shortest_s: float = 40.0, longest_s: float = 120.0) -> None:
        n_before = len(self.store.tracks())
        for k in range(n_before, n_before + n_tracks):
            length_s = self.random.uniform(shortest_s, longest_s)
            size = round(length_s * BYTES_PER_S)
            file = SourceFile(
                Path(f"/in/{k}.ogg"), f"{k:064x}", Path("/in"), f"{k}.ogg", size, 0, 0, FileState.WAITING
            )
            self.store.add_file(file, name=f"{k}.ogg", folder=f"{k}", now=self.now)

    def run(self) -> Iterator[float]:
        """Works until all is done; yields the time whenever something has happened."""
        workers = {k: self._work(k) for k in range(self.n)}
        due = dict.fromkeys(workers, self.now)
        while workers:
            k = min(workers, key=lambda one: due[one])
            self.now = due[k]
            try:
                due[k] += next(workers[k])
            except StopIteration:
                del workers[k], due[k]
            yield self.now

    def _work(self, k: int) -> Iterator[float]:
        """One worker, which yields how long each step takes."""
        while True:
            tracks = self.store.claim(self.store.tracks(TrackState.QUEUED, limit=1))
            if not tracks:
                self.facts[k] = idle(k)
                return
            yield from self._process(k, tracks[0])

    def _process(self, k: int, track: Track) -> Iterator[float]:
        source_s, vary = track.bytes / BYTES_PER_S, lambda: self.slower * self.random.uniform(0.85, 1.15)
        for stage, per_s in ((Stage.NORMALIZE, 0.015), (Stage.EMBED, 0.008)):
            attempt = self._begin(k, track, stage)
            seconds = per_s * source_s * vary()
            yield seconds
            self._finish(track, stage, stage, seconds, duration_s=source_s)
            self._end(attempt)
        attempt = self._begin(k, track, Stage.GENERATE)
        wanted, n = TAKES, 0
        while wanted:
            self.facts[k] |= {"since": self.now, "done": 0.0, "total": float(wanted), "stepped_at": self.now}
            again = 0
            for done in range(wanted):
                analysis_s = 0.035 * source_s if done == 0 and not self.model else 0.0
                seconds = (analysis_s + 1.1) * vary()
                yield seconds
                self.facts[k] |= {"done": float(done + 1), "total": float(wanted), "stepped_at": self.now}
                is_published, n = self.random.random() >= self.again, n + 1
                again += not is_published
                file = {"file": f"{n}.wav"} if is_published else {}
                self._finish(track, f"take {n}", Stage.GENERATE, seconds, duration_s=TAKE_S, **file)
            wanted = again
        self._end(attempt)
        self.store.finish(track.sha256, plan_key="", recipe_key="", source={}, now=self.now)

    def _begin(self, k: int, track: Track, stage: Stage) -> int:
        self.facts[k] = idle(k) | {
            "track": track.name,
            "stage": stage,
            "since": self.now,
            "stepped_at": self.now,
        }
        return self.store.begin_attempt(track.sha256, stage, now=self.now)

    def _end(self, attempt: int) -> None:
        self.store.end_attempt(attempt, outcome=AttemptOutcome.DONE, now=self.now)

    def _finish(self, track: Track, what: str, stage: Stage, seconds: float, **result: Any) -> None:
        made = {**result, "engine": "engine", "model": self.model}
        self.store.finish_unit(
            f"{track.sha256} {what}", sha256=track.sha256, stage=stage, result=made, seconds=seconds,
            now=self.now,
        )  # fmt: skip


def idle(k: int) -> Facts:
    return {
        "track": None, "stage": None, "since": None, "done": 0.0, "total": 0.0, "stepped_at": None,
        "makes": True,
    }  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "pipeline.db")
    yield made
    made.close()


def ratios(workers: SimulatedWorkers, *, every: int = 1) -> list[float]:
    """Estimate by truth of the time left, from the first finished track until a fifth of the time is left."""
    found, first = [], None
    for n, now in enumerate(workers.run()):
        if not workers.store.counts()["done"]:
            continue
        first = first or now
        if n % every == 0:
            _, left_s = times_left(workers.store, workers.wanted, workers.facts, now=now)
            assert left_s is not None
            found.append((now, left_s))
    assert first is not None
    return [
        left_s / (workers.now - at)
        for at, left_s in found
        if workers.now - at > (workers.now - first) / 5
    ]  # fmt: skip


def test_results_are_embedded_at_the_pace_of_sources(store: Store) -> None:
    pace = Pace(0.01, 0.02, 0.03, 0.04, 1.0, {})
    track = Unfinished("a.ogg", 1, 100.0, True, Stage.GENERATE)
    embeds = replace(WANTED, embeds=True)
    assert pace.rest_s(track, WANTED) == 0.0
    assert pace.rest_s(track, embeds) == pytest.approx(0.02 * TAKES * TAKE_S)
    assert pace.rest_s(replace(track, stage=Stage.EMBED_VARIATIONS), embeds) == 0.0
    worker = idle(0) | {"stage": Stage.EMBED_VARIATIONS, "since": 10.0}
    assert stage_left_s(worker, pace, embeds, 100.0, now=11.0) == pytest.approx(0.02 * TAKES * TAKE_S - 1.0)


@pytest.mark.parametrize("n_workers", [1, 2, 4])
def test_the_time_left_for_the_queue_is_right_to_a_quarter_once_a_track_is_done(
    store: Store, n_workers: int
) -> None:
    workers = SimulatedWorkers(store, n_workers)
    workers.add(20)
    found = ratios(workers, every=3)
    assert 0.75 < min(found) < max(found) < 1.25


def test_where_a_fifth_of_the_takes_is_made_again_it_is_so_at_most_times(tmp_path: Path) -> None:
    found = []
    for seed in range(8):
        store = Store(tmp_path / f"{seed}.db")
        workers = SimulatedWorkers(store, 2, seed=seed, again=0.2)
        workers.add(20)
        found += ratios(workers, every=7)
        store.close()
    assert sum(0.75 < ratio < 1.25 for ratio in found) > 0.8 * len(found)
    assert 0.85 < sum(found) / len(found) < 1.15


def test_an_engine_with_a_model_does_not_take_longer_for_longer_sources(store: Store) -> None:
    workers = SimulatedWorkers(store, 1, model="some/model")
    workers.add(1, shortest_s=60, longest_s=60)
    workers.add(1, shortest_s=1000, longest_s=1000)
    found = ratios(workers)
    assert 0.75 < min(found) < max(found) < 1.25


def test_a_slower_machine_is_noticed_in_the_stage_that_runs(store: Store) -> None:
    workers = SimulatedWorkers(store, 1)
    workers.add(3)
    left: list[tuple[float, float]] = []
    for now in workers.run():
        if store.counts()["done"] == 2:
            workers.slower = 3.0
            [stage_s], _ = times_left(store, WANTED, workers.facts, now=now)
            if workers.facts[0]["done"] == TAKES - 1:
                left.append((now, stage_s or 0.0))
    [(at, stage_s)] = left
    assert 0.5 * (workers.now - at) < stage_s < 1.5 * (workers.now - at)


def test_before_any_track_the_stage_s_own_pace_is_all_there_is(store: Store) -> None:
    working = idle(0) | {"track": "a", "stage": "generate", "since": 100.0, "stepped_at": 130.0}
    assert times_left(store, WANTED, [working], now=110.0) == ([None], None)
    one_of_four = working | {"done": 1.0, "total": 4.0}
    assert times_left(store, WANTED, [one_of_four], now=130.0) == ([90.0], None)
    assert times_left(store, WANTED, [idle(0)], now=130.0) == ([0.0], None)


def test_a_source_that_is_not_decoded_is_as_long_as_others_of_its_format_with_as_many_bytes() -> None:
    numbers = {"normalize_s": 1.0, "embed_s": 1.0, "generate_s": 4.0, "shortest_take_s": 1.0}
    sizes = {"takes": 4, "takes_s": 120.0, "results": 4}
    work = [Work("a.wav", 1000, 10.0, **numbers, **sizes), Work("b.MP3", 100, 10.0, **numbers, **sizes)]
    pace = Pace.of(work, WANTED)
    assert pace is not None
    assert pace.length_s("c.wav", 2000) == pytest.approx(20.0)
    assert pace.length_s("c.mp3", 2000) == pytest.approx(200.0)
    assert pace.length_s("c.flac", 2000) == pytest.approx(110.0)


def test_a_long_queue_is_as_long_as_its_beginning_says(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = SimulatedWorkers(store, 2)
    workers.add(40, shortest_s=60, longest_s=60)
    now = next(at for at in workers.run() if store.counts()["done"] == 2)
    _, whole_s = times_left(store, WANTED, workers.facts, now=now)
    monkeypatch.setattr("pipeline.pace.COSTED", 10)
    _, by_beginning_s = times_left(store, WANTED, workers.facts, now=now)
    assert by_beginning_s == pytest.approx(whole_s, rel=0.05)


def test_what_workers_report_counts_where_the_database_is_ahead_of_it(store: Store) -> None:
    workers = SimulatedWorkers(store, 1)
    workers.add(2, shortest_s=60, longest_s=60)
    before, left = workers.facts[0], list[float]()
    for now in workers.run():
        if store.counts()["done"] == 1 and workers.facts[0]["stage"] == "generate" != before["stage"]:
            for facts in (before, workers.facts[0]):
                left.append(times_left(store, WANTED, [facts], now=now)[1] or 0.0)
        before = dict(workers.facts[0])
    stale, fresh = left
    assert stale == pytest.approx(fresh, abs=0.5)


def test_work_goes_to_the_worker_that_is_free_first() -> None:
    assert makespan_s([5.0, 0.0], [3.0, 3.0, 3.0]) == 8.0
    assert makespan_s([5.0, 1.0], []) == 5.0
    assert makespan_s([], [1.0, 2.0]) == 3.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (9000, "2.5 h")],
)
def test_a_time_in_a_word_or_two(seconds: float, text: str) -> None:
    assert rough(seconds) == text
