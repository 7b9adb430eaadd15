"""Figures of the fault harness stand at the end of the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Zygote, why_not
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
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if reason := why_not():
        pytest.skip(reason)
    folder: Path = tmp_path_factory.mktemp("zygote")
    with Zygote(folder) as made:
        yield made


@pytest.fixture(scope="session")
def one_track(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(zygote, tmp_path_factory.mktemp("one"), tracks=1)
