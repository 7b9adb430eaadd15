"""`status --watch`, and the bars of `once` and `watch`, which are the same."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from home_folder import ROOT, Home, run, write_music
from rich.console import Console

from pipeline.app import App
from pipeline.cli.live import BLOCK_S, bars, bars_on, view, watch_status
from pipeline.cli.status import health_text, status_facts
from pipeline.service.health import Health
from pipeline.store.schema import AttemptOutcome
from pipeline.store.store import Store

Facts = dict[str, Any]


@pytest.fixture
def app(home: Home, isolated: None) -> App:
    return App.open(home.folder, home.folder / "settings.yaml")


@pytest.fixture
def facts(app: App) -> Facts:
    """What `status` would know of a busy instance, with names that are long or look like markup."""
    worker = {"where": "process 1", "engine": "remix", "steps_per_s": 9.5, "makes": True}
    return status_facts(app) | {
        "tracks": {"queued": 8, "running": 2, "done": 5, "failed": 1},
        "instance": True,
        "mode": "events (a local file system)",
        "degraded": [
            {"what": "disk", "since": 0.0, "text": "1 MB is free, which is " + "very " * 20 + "little"}
        ],
        "disk_free_bytes": 12_345_678_900,
        "time_left_s": 240.0,
        "sound_s_per_minute": 143.0,
        "ended": 5,
        "workers": [
            {
                **worker,
                "track": "[red]a[/].wav",
                "stage": "generate",
                "done": 2.0,
                "total": 4.0,
                "left_s": 18.0,
            },
            {**worker, "track": "b" * 200, "stage": "embed", "done": 0.0, "total": 0.0, "left_s": None},
            {**worker, "track": None, "stage": None, "done": 0.0, "total": 0.0, "left_s": 0.0},
        ],
        "queue": [f"{n}.wav" for n in range(8)],
        "failures": [
            {"track": "letter.mp3", "sha256": "", "stage": "normalize", "attempts": 1, "error": "is no " * 30}
        ],
    }


def lines(renderable: Any, *, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def test_everything_has_a_line_of_at_most_80_columns(facts: Facts) -> None:
    shown = lines(view(facts))
    assert max(map(len, shown)) <= 80
    text = "\n".join(shown)
    for words in (
        "8 queued, 2 running, 5 done, 1 failed, about 4 min left",
        "143 s of sound a minute",
        "GB free",
        "degraded since",
        "generate: [red]a[/].wav",
        "2 of 4",
        "18 s left",
        "5 of 15",
        "next: 0.wav",
        "failed: letter.mp3 in normalize after 1 attempt: is no",
    ):
        assert words in text, words
    assert "next: 5.wav" not in text
    assert any(line.startswith("embed: bbb") and "…" in line for line in shown)


@pytest.mark.parametrize("width", [60, 80])
def test_a_long_name_is_cut_before_a_number_is(facts: Facts, width: int) -> None:
    counts = {**facts["tracks"], "queued": 12_000}
    shown = lines(bars({**facts, "tracks": counts, "time_left_s": 90_000.0}), width=width)
    assert "5 of 12007" in shown[0]
    assert shown[0].endswith("25.0 h left")


def test_the_bar_of_a_stage_is_as_long_as_its_share(facts: Facts) -> None:
    [tracks, generate, embed] = lines(bars(facts))
    assert [line.count("━") for line in (tracks, generate, embed)] == [6, 10, 0]
    assert set(lines(bars(facts))) <= set(lines(view(facts)))


def test_without_an_instance_there_are_no_bars(app: App) -> None:
    assert lines(bars(status_facts(app))) == []
    assert lines(view(status_facts(app)))[1] == "no instance is running"


def test_where_there_is_no_terminal_a_block_of_lines_comes_every_10_seconds(app: App) -> None:
    console, waited = Console(file=io.StringIO(), width=80), list[float]()
    watch_status(app, console, wait=waited.append, n_times=3)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert waited == [BLOCK_S] * 3
    assert shown.count("0 queued, 0 running, 0 done, 0 failed\n") == 3
    assert "\x1b" not in shown


def test_on_a_terminal_the_lines_are_replaced(app: App) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    watch_status(app, console, wait=lambda _: None, n_times=3)
    assert "\x1b[1A" in console.file.getvalue()  # type: ignore[attr-defined]


def test_json_is_not_for_watching(home: Home, capsys: Any, monkeypatch: Any, isolated: None) -> None:
    ended = run(capsys, monkeypatch, home, "status", "--watch", "--json")
    assert (ended.code, ended.out) == (2, "")


def test_a_database_that_cannot_be_read_for_a_moment_does_not_end_it(app: App) -> None:
    app.workspace.prepare()
    app.workspace.database.write_bytes(b"this is no database " * 1000)
    console = Console(file=io.StringIO(), width=80)
    watch_status(app, console, wait=lambda _: app.workspace.database.unlink(missing_ok=True), n_times=2)
    shown = " ".join(console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert "is damaged" in shown
    assert "0 queued, 0 running, 0 done, 0 failed" in shown


def test_an_instance_on_a_terminal_shows_its_bars_and_removes_them_at_the_end(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cli.live.REFRESH_S", 0.01)
    app.workspace.prepare()
    app.open_store().close()
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with app.workspace.locked(), bars_on(app, console):
        Health(app.workspace.health).open()
        wait_for(lambda: "0 of 0" in console.file.getvalue())  # type: ignore[attr-defined]
    assert console.file.getvalue().endswith("\x1b[1A\x1b[2K")  # type: ignore[attr-defined]


def test_once_on_a_terminal_prints_what_is_done_and_no_log_lines(home: Home) -> None:
    write_music(home.inbox / "song.wav")
    owner, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / "run_pipeline.py"), *home.arguments("once")]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    ended = subprocess.run(command, stderr=terminal, stdout=subprocess.PIPE, env=env, check=False)
    os.close(terminal)
    shown = bytearray()
    try:
        while part := os.read(owner, 65536):
            shown += part
    except OSError:  # all is read
        pass
    os.close(owner)
    text = shown.decode()
    assert ended.returncode == 0
    assert "song.wav: 2 variations in " in text
    assert "song.wav: normalize" not in text and " INFO " not in text


# -- facts -----------------------------------------------------------------------------------------


def test_status_estimates_the_time_left_of_what_runs(
    home: Home, app: App, capsys: Any, monkeypatch: Any
) -> None:
    write_music(home.inbox / "a.wav")
    assert run(capsys, monkeypatch, home, "once").code == 0
    wanted = json.loads(app.workspace.health.read_text())["wanted"]
    write_music(home.inbox / "b.wav", seed=1)
    store = Store(app.workspace.database)
    [done] = store.tracks()
    store.requeue(done.sha256, now=time.time())
    store.claim(store.tracks())
    worker = {
        "where": "process 1", "track": "a.wav", "stage": "generate", "engine": "remix", "steps_per_s": 1.0,
        "step": "variation 2 of 2, step 1 of 3",
        "since": time.time(), "done": 1.0, "total": 2.0, "stepped_at": time.time(), "makes": True,
    }  # fmt: skip
    health = Health(app.workspace.health)
    health.workers = lambda: [worker]
    health.note(wanted=wanted)
    health.progress()
    health.note(workers=[worker])
    with app.workspace.locked():
        facts = status_facts(app)
        text = run(capsys, monkeypatch, home, "status").out
    store.close()
    [shown] = facts["workers"]
    assert 0 < shown["left_s"] < 60
    assert 0 < facts["time_left_s"] < 60
    assert " left" in text.splitlines()[0]
    assert text.splitlines()[3].startswith(
        "worker (process 1): a.wav: generate by remix, variation 2 of 2, step 1 of 3, 1 steps/s, about "
    )


def test_show_has_a_bar_for_each_attempt_as_long_as_it_took(
    home: Home, app: App, capsys: Any, monkeypatch: Any
) -> None:
    write_music(home.inbox / "a.wav")
    assert run(capsys, monkeypatch, home, "once").code == 0
    store = Store(app.workspace.database)
    [track] = store.tracks()
    number = store.begin_attempt(track.sha256, "embed", now=1000.0, worker="process 7")
    store.end_attempt(number, now=2000.0, outcome=AttemptOutcome.FAILED, error="it broke")
    store.begin_attempt(track.sha256, "generate", now=3000.0)
    store.close()
    *_, last, failed, running = run(capsys, monkeypatch, home, "show", "a.wav").out.splitlines()
    assert " embed-variations " in last and last.count("━") == 1
    assert f"process {os.getpid()}" in last
    assert failed.count("━") == 12
    assert "1000.0 s" in failed and failed.endswith("failed, process 7: it broke")
    assert running.endswith("is running")


# -- health ----------------------------------------------------------------------------------------


def test_health_is_1_with_the_reason_unless_an_instance_is_at_work(
    home: Home, app: App, capsys: Any, monkeypatch: Any
) -> None:
    ended = run(capsys, monkeypatch, home, "health")
    assert (ended.code, ended.out) == (1, "no instance is running\n")
    app.workspace.prepare()
    health = Health(app.workspace.health)
    health.progress()
    with app.workspace.locked():
        ended = run(capsys, monkeypatch, home, "health")
        assert (ended.code, ended.out) == (0, "the last progress was 1 s ago\n")
        health.degraded("disk", "1 MB is free")
        ended = run(capsys, monkeypatch, home, "health")
        assert (ended.code, ended.out) == (1, "disk: 1 MB is free\n")


@pytest.mark.parametrize(("watchdog_s", "limit_s"), [(None, 600.0), (90.0, 90.0)])
def test_progress_is_recent_as_long_as_systemd_s_watchdog_would_not_act(
    app: App, watchdog_s: float | None, limit_s: float
) -> None:
    app.workspace.prepare()
    health = Health(app.workspace.health, clock=lambda: 1000.0)
    health.note(watchdog_s=watchdog_s)
    with app.workspace.locked():
        assert health_text(app, now=1000.0 + limit_s)[0]
        is_well, text = health_text(app, now=1001.0 + limit_s)
    assert not is_well
    assert text.startswith("the last progress was ")


def wait_for(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
