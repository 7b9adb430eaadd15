"""The start of `watch`: it waits while something prevents it and reports that; a signal ends the wait."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from home_folder import Home, run

from pipeline.app import App
from pipeline.errors import DiskFull, EngineUnusable, MissingWeights
from pipeline.service.health import read_health
from pipeline.service.signals import Signals
from pipeline.session import watch_inbox


@pytest.fixture
def app(home: Home, isolated: None) -> App:
    return App.open(home.folder, home.folder / "settings.yaml")


def test_an_engine_without_its_weights_at_the_start_is_waited_for_with_growing_pauses(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, pauses, reported = Signals(), [], []

    def missing(_: App) -> None:
        raise MissingWeights("the weights of some/model are not on this machine")

    def wait(seconds: float) -> None:
        report: dict[str, Any] = read_health(app.workspace.health) or {}
        pauses.append(seconds)
        reported.extend((one["what"], one["text"]) for one in report["conditions"])
        if len(pauses) == 5:
            signals.stop(signal.SIGTERM)

    monkeypatch.setattr(App, "fetch_missing", missing)
    signals.wait = wait  # type: ignore[method-assign]
    watch_inbox(app, signals)

    assert pauses == [10.0, 20.0, 40.0, 60.0, 60.0]
    assert set(reported) == {("engine", "the weights of some/model are not on this machine")}


@pytest.mark.parametrize("error", [DiskFull("1 MB is free"), EngineUnusable("no device")])
def test_a_stop_that_came_before_the_start_failed_is_not_forgotten(
    app: App, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    signals, tries = Signals(), []

    def fail(_: App) -> None:
        tries.append(1)
        signals.stop(signal.SIGTERM)
        raise error

    monkeypatch.setattr(App, "fetch_missing", fail)
    watch_inbox(app, signals)
    assert len(tries) == 1


def test_a_hangup_during_the_start_of_watch_does_not_end_it(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isolated: None
) -> None:
    open_app, reloads = App.open, []

    def hang_up(*arguments: Any) -> App:
        os.kill(os.getpid(), signal.SIGHUP)
        return open_app(*arguments)

    def watch(_: App, signals: Signals, _view: object) -> None:
        assert signals._woken.wait(10)  # the listening thread has passed the signal on
        reloads.append(signals.take_reload())

    monkeypatch.setattr(App, "open", hang_up)
    monkeypatch.setattr("pipeline.session.watch_inbox", watch)

    assert run(capsys, monkeypatch, home, "watch").code == 0
    assert reloads == [True]
