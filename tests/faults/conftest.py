"""Fixtures of the fault harness; its figures are printed at the end of pytest's report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ForkServer, why_not
from invariants import Case

FIGURES = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(FIGURES, []):
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines for the end of the report."""
    return request.config.stash.setdefault(FIGURES, [])


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    if reason := why_not():
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("fork_server")
    with ForkServer(folder) as made:
        yield made


@pytest.fixture(scope="session")
def one_track(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(fork_server, tmp_path_factory.mktemp("one"), tracks=1)
