"""Metrics for Prometheus, parsed as Prometheus reads them, and the dashboard that is made of them."""

from __future__ import annotations

import json
import logging
import re
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from home_folder import ROOT
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from set_clock import SetClock

from pipeline.config import Folders
from pipeline.pace import Wanted
from pipeline.service.health import CONDITIONS, Health
from pipeline.service.metrics import LOOPBACK, WRITE_S, Metrics
from pipeline.store.schema import AttemptOutcome, FileState, SourceFile
from pipeline.store.store import Store
from pipeline.workspace import Workspace

Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Labels]


@pytest.fixture
def clock() -> SetClock:
    return SetClock(now=1000.0)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace.of(tmp_path, Folders())
    made.prepare()
    return made


@pytest.fixture
def store(workspace: Workspace) -> Iterator[Store]:
    made = Store(workspace.database)
    yield made
    made.close()


@pytest.fixture
def metrics(workspace: Workspace, store: Store, clock: SetClock) -> Metrics:
    return Metrics(workspace, workspace.state / "metrics.prom", clock)


def samples(text: str) -> dict[Sample, float]:
    """All samples of a text in Prometheus's format, by name and labels."""
    families = text_string_to_metric_families(text)
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in families
        for one in family.samples
    }


def collected(metrics: Metrics) -> dict[Sample, float]:
    return samples(generate_latest(metrics.registry).decode())


def add_track(store: Store, number: int, *, now: float) -> str:
    sha256 = f"{number:064x}"
    path = Path(f"/in/{number}.wav")
    file = SourceFile(path, sha256, path.parent, path.name, 1000, 0, 0, FileState.WAITING)
    store.add_file(file, name=path.name, folder=str(number), now=now)
    return sha256


def attempt(store: Store, sha256: str, stage: str, took_s: float, **end: Any) -> None:
    number = store.begin_attempt(sha256, stage, now=100.0)
    store.end_attempt(number, now=100.0 + took_s, **{"outcome": AttemptOutcome.DONE, **end})


def test_the_queue_by_state_and_how_long_the_oldest_track_waits(metrics: Metrics, store: Store) -> None:
    assert collected(metrics)["variations_oldest_queued_seconds", ()] == 0
    for number, queued_at in enumerate((400.0, 300.0, 500.0)):
        add_track(store, number, now=queued_at)
    store.claim(store.tracks(limit=1))
    found = collected(metrics)
    assert found["variations_tracks", (("state", "queued"),)] == 2
    assert found["variations_tracks", (("state", "running"),)] == 1
    assert found["variations_oldest_queued_seconds", ()] == 600


def test_durations_of_each_stage_are_a_histogram_that_a_restart_continues(
    workspace: Workspace, store: Store, metrics: Metrics
) -> None:
    sha256 = add_track(store, 1, now=0.0)
    for took_s in (0.05, 3.0, 4.0, 9000.0):
        attempt(store, sha256, "embed", took_s)
    attempt(store, sha256, "embed", 2.0, outcome=AttemptOutcome.STOPPED)
    store.begin_attempt(sha256, "embed", now=0.0)

    for one in (metrics, Metrics(workspace, workspace.state / "metrics.prom")):
        found = {
            dict(labels)["le"]: n
            for (name, labels), n in collected(one).items()
            if name == "variations_stage_duration_seconds_bucket"
        }
        assert [found[bound] for bound in ("0.1", "2.0", "5.0", "3600.0", "+Inf")] == [1, 1, 3, 3, 4]
        assert list(found.values()) == sorted(found.values())
        total = collected(one)["variations_stage_duration_seconds_sum", (("stage", "embed"),)]
        assert total == pytest.approx(9007.05)


def test_failures_by_cause_and_the_sound_that_was_made(metrics: Metrics, store: Store) -> None:
    sha256 = add_track(store, 1, now=0.0)
    for cause in ("BadAudio", "BadAudio", "unexpected"):
        attempt(store, sha256, "normalize", 1.0, outcome=AttemptOutcome.FAILED, cause=cause)
    attempt(
        store, sha256, "generate", 1.0, outcome=AttemptOutcome.FAILED, cause="EngineFailure", sound_s=30.0
    )
    attempt(store, sha256, "generate", 1.0, sound_s=120.0)
    store.begin_attempt(sha256, "generate", now=0.0)
    store.release_all(now=5.0, outcome=AttemptOutcome.CRASHED)

    found = collected(metrics)

    failures = {labels: n for (name, labels), n in found.items() if name == "variations_failures_total"}
    assert failures == {
        (("cause", "BadAudio"), ("stage", "normalize")): 2,
        (("cause", "unexpected"), ("stage", "normalize")): 1,
        (("cause", "EngineFailure"), ("stage", "generate")): 1,
        (("cause", "crash"), ("stage", "generate")): 1,
    }
    assert found["variations_sound_seconds_total", ()] == 150


def test_what_the_instance_reports(metrics: Metrics, workspace: Workspace, clock: SetClock) -> None:
    health = Health(workspace.health, clock=clock)
    health.on_report = metrics.on_report
    busy, idle = {"stage": "generate"}, {"stage": None}
    health.workers = lambda: [busy, idle, idle]
    clock.now = 1100.0
    health.scanned(waiting=0)
    clock.now = 1200.0
    health.progress()
    health.degraded("disk", "1 MB is free")

    found = collected(metrics)

    assert found["variations_workers", (("state", "busy"),)] == 1
    assert found["variations_workers", (("state", "idle"),)] == 2
    assert found["variations_started_timestamp_seconds", ()] == 1000
    assert found["variations_scanned_timestamp_seconds", ()] == 1100
    assert found["variations_progress_timestamp_seconds", ()] == 1200
    degraded = {
        dict(labels)["condition"]: n for (name, labels), n in found.items() if name.endswith("degraded")
    }
    assert degraded == dict.fromkeys(CONDITIONS, 0) | {"disk": 1}
    assert found["variations_disk_free_bytes", (("folder", str(workspace.state)),)] > 0


def test_the_real_time_factor_and_the_time_left_come_from_the_last_work(
    metrics: Metrics, store: Store
) -> None:
    first = add_track(store, 1, now=0.0)
    store.claim(store.tracks())
    add_track(store, 2, now=0.0)
    facts = {"engine": "remix", "model": None, "duration_s": 10.0}
    store.finish_unit("n", sha256=first, stage="normalize", result={"duration_s": 60.0}, seconds=1, now=1.0)
    for n in range(2):
        made = {**facts, "file": f"{n}.wav"}
        store.finish_unit(f"{n}", sha256=first, stage="generate", result=made, seconds=5.0, now=1.0)
    store.finish(first, plan_key="", recipe_key="", source={}, now=1.0)

    metrics.report = {"wanted": asdict(Wanted("remix", None, 2, 20.0, 0, 1.0)), "workers": []}
    found = collected(metrics)

    assert found["variations_realtime_factor", ()] == 0.5
    assert 11 <= found["variations_time_left_seconds", ()] <= 12.5


def test_the_text_file_is_written_whole_at_most_every_15_seconds_and_at_the_end(
    metrics: Metrics, store: Store, clock: SetClock
) -> None:
    metrics.on_report({"workers": [{"stage": None}]})
    assert samples(metrics.textfile.read_text())["variations_workers", (("state", "idle"),)] == 1
    add_track(store, 1, now=0.0)
    queued: Sample = ("variations_tracks", (("state", "queued"),))
    for later_s, n in ((WRITE_S - 1, 0), (WRITE_S, 1)):
        clock.now = 1000.0 + later_s
        metrics.on_report({"workers": [{"stage": None}]})
        assert samples(metrics.textfile.read_text())[queued] == n
    add_track(store, 2, now=0.0)
    clock.now = 500.0  # it was set back
    metrics.on_report({"workers": [{"stage": None}]})
    assert samples(metrics.textfile.read_text())[queued] == 2
    add_track(store, 3, now=0.0)
    metrics.end()
    last = samples(metrics.textfile.read_text())
    assert last[queued] == 3
    assert last["variations_workers", (("state", "idle"),)] == 0
    assert [path.name for path in metrics.textfile.parent.glob("metrics*")] == ["metrics.prom"]


def test_a_text_file_that_cannot_be_written_is_told_once_and_ends_no_work(
    metrics: Metrics, clock: SetClock, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.textfile = Path("/dev/null/metrics.prom")  # below what is no folder
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        for clock.now in (1000.0, 2000.0, 3000.0):
            metrics.on_report({})
    assert len(caplog.messages) == 1
    assert "/dev/null/metrics.prom (metrics.textfile) can't be written" in caplog.messages[0]


def test_the_port_serves_this_machine_the_same_metrics_until_the_end(metrics: Metrics, store: Store) -> None:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    add_track(store, 1, now=0.0)
    address = f"http://{LOOPBACK}:{port}/metrics"
    with metrics.served(port):
        with urllib.request.urlopen(address, timeout=10) as answer:
            found = samples(answer.read().decode())
        with pytest.raises(OSError), metrics.served(port):
            pass
    assert found["variations_tracks", (("state", "queued"),)] == 1
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=10)


def test_the_dashboard_shows_only_metrics_that_exist_and_no_two_panels_in_one_place(metrics: Metrics) -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    metrics.report = {"wanted": asdict(Wanted("remix", None, 2, 20.0, 0, 1.0))}
    text = generate_latest(metrics.registry).decode()
    known = set(re.findall(r"# TYPE (\w+) (?!histogram)", text)) | {"variations_realtime_factor"}
    known |= {"variations_time_left_seconds"}  # as soon as something was made
    known |= {
        f"{name}{end}"
        for name in re.findall(r"# TYPE (\w+) histogram", text)
        for end in ("_bucket", "_count")
    }
    known |= {f"variations_{what}_timestamp_seconds" for what in ("started", "progress", "scanned")}
    places = set()
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert max(x for x, _ in cells) < 24 and not cells & places
        places |= cells
        for target in panel["targets"]:
            named = set(re.findall(r"variations_\w+", target["expr"]))
            assert named and named <= known, panel["title"]
            assert target["datasource"]["uid"] == "${datasource}"
    assert [one["name"] for one in dashboard["templating"]["list"]] == ["datasource"]
