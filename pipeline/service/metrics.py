"""Metrics for Prometheus: a text file for node_exporter's collector and, if asked for, a port on loopback.

Counters and histograms are made of the attempts in the database whenever somebody asks, and nothing is
counted during the work. So they go on over restarts, and runs by cron add to them.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from pipeline.fs.atomic import write_atomically
from pipeline.fs.disk import environment_error
from pipeline.pace import Wanted, times_left
from pipeline.service.health import CONDITIONS
from pipeline.store.schema import AttemptOutcome, AttemptTotals
from pipeline.store.store import Store
from pipeline.workspace import Workspace

LOOPBACK = "127.0.0.1"
WRITE_S = 15.0  # between two writings of the text file, as Prometheus often reads it every 15 s
WRITE_SHARE = 0.01  # of the time, at most, that is spent on writing it
BUCKETS_S = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

log = logging.getLogger("pipeline")


@dataclass(eq=False)
class Metrics:
    """Collects the metrics of one home: a collector of prometheus_client."""

    workspace: Workspace
    textfile: Path
    clock: Callable[[], float] = time.time
    report: dict[str, Any] = field(default_factory=dict)  # the last one of `Health`
    _written_at: float = -float("inf")
    _rest_s: float = WRITE_S  # until the next writing
    _is_failing: bool = False

    def __post_init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    @contextmanager
    def served(self, port: int) -> Iterator[None]:
        """Serve the metrics at a port, to this machine only.

        Raises:
            OSError: the port can't be used.
        """
        server, thread = start_http_server(port, addr=LOOPBACK, registry=self.registry)
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def on_report(self, report: dict[str, Any]) -> None:
        """Note what an instance reports, and write the text file if that is due."""
        self.report, now = report, self.clock()
        if not 0 <= now - self._written_at < self._rest_s:  # the clock may have been set back
            self._write()
            self._written_at = now
            self._rest_s = max(WRITE_S, (self.clock() - now) / WRITE_SHARE)

    def end(self) -> None:
        """Write the text file for the last time, without workers."""
        self.report = {**self.report, "workers": []}
        self._write()

    def _write(self) -> None:
        """Replace the text file; an error is logged once."""
        part = self.textfile.with_name(f"{self.textfile.name}.part")
        try:
            write_atomically(self.textfile, part, generate_latest(self.registry))
        except Exception as e:
            fault = environment_error(e, in_track=False)
            if fault is None:
                raise
            if not self._is_failing:
                log.warning("%s (metrics.textfile) can't be written: %s", self.textfile, fault)
            self._is_failing = True
        else:
            self._is_failing = False

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now; in any thread."""
        with closing(Store(self.workspace.database, read_only=True)) as store:
            yield from self._of_queue(store)
            yield from _of_attempts(store.attempt_totals(BUCKETS_S))
        yield from self._of_instance()

    def _of_queue(self, store: Store) -> Iterator[Metric]:
        now, workers = self.clock(), self.report.get("workers", [])
        tracks = GaugeMetricFamily("variations_tracks", "Tracks by their state.", labels=["state"])
        for state, n in store.counts().items():
            tracks.add_metric([state], n)
        yield tracks
        oldest = store.oldest_queued()
        waited_s = 0.0 if oldest is None else max(now - oldest, 0.0)
        yield _gauge("oldest_queued_seconds", "Since when the oldest queued track waits; 0: none.", waited_s)
        if wanted := self.report.get("wanted"):
            what = Wanted(**wanted)
            _, left_s = times_left(store, what, workers, now=now)
            if left_s is not None:
                yield _gauge("time_left_seconds", "Estimate for all queued and running tracks.", left_s)
            work = store.work(what.generator, what.model)
            if made_s := sum(one.takes_s for one in work):
                factor = sum(one.generate_s for one in work) / made_s
                yield _gauge(
                    "realtime_factor", "Seconds that a worker takes to make a second of sound.", factor
                )

    def _of_instance(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily("variations_workers", "Workers by what they do.", labels=["state"])
        busy = [one["stage"] is not None for one in self.report.get("workers", [])]
        workers.add_metric(["busy"], sum(busy))
        workers.add_metric(["idle"], len(busy) - sum(busy))
        yield workers
        for what, text in (
            ("started", "When the instance has started."),
            ("progress", "When the instance last made progress."),
            ("scanned", "When the inbox was last scanned."),
        ):
            if at := self.report.get(f"{what}_at"):
                yield _gauge(f"{what}_timestamp_seconds", text, at)
        free = GaugeMetricFamily("variations_disk_free_bytes", "Free space.", labels=["folder"])
        for folder in self.workspace.disks:
            with suppress(OSError):
                free.add_metric([str(folder)], shutil.disk_usage(folder).free)
        yield free
        degraded = GaugeMetricFamily("variations_degraded", "1: it holds.", labels=["condition"])
        now = {one["what"] for one in self.report.get("conditions", [])}
        for what in sorted({*CONDITIONS, *now}):
            degraded.add_metric([what], what in now)
        yield degraded


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"variations_{name}", text, value)


def _of_attempts(totals: list[AttemptTotals]) -> Iterator[Metric]:
    durations = HistogramMetricFamily(
        "variations_stage_duration_seconds",
        "Time from begin to end of a stage of a track, which its batch shares.",
        labels=["stage"],
    )
    failures = CounterMetricFamily(
        "variations_failures", "Failed attempts; a cause is a kind of error.", labels=["stage", "cause"]
    )
    for one in totals:
        if one.outcome == AttemptOutcome.DONE:
            within = [(str(float(bound)), n) for bound, n in zip(BUCKETS_S, one.within, strict=True)]
            durations.add_metric([one.stage], buckets=[*within, ("+Inf", one.n)], sum_value=one.seconds)
        elif one.outcome in (AttemptOutcome.FAILED, AttemptOutcome.CRASHED):
            failures.add_metric([one.stage, one.cause], one.n)
    yield durations
    yield failures
    yield CounterMetricFamily(
        "variations_sound_seconds", "Seconds of sound made, takes that were not kept included.",
        value=sum(one.sound_s for one in totals),
    )  # fmt: skip
