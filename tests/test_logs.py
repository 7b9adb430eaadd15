"""The log file: rotated by size, and opened anew when somebody has moved or removed it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.logs import logging_to

log = logging.getLogger("pipeline")


@pytest.fixture
def path(tmp_path: Path, quiet: None) -> Iterator[Path]:
    with logging_to(tmp_path / "pipeline.log", Console(quiet=True)):
        yield tmp_path / "pipeline.log"


def test_lines_go_to_a_new_file_after_the_old_one_was_moved(path: Path) -> None:
    log.info("first")
    moved = path.rename(path.with_suffix(".1"))
    log.info("second")

    assert "first" in moved.read_text()
    assert "second" not in moved.read_text()
    assert "second" in path.read_text()


def test_lines_go_to_a_new_file_after_the_old_one_was_removed(path: Path) -> None:
    log.info("first")
    path.unlink()
    log.info("second")
    assert "second" in path.read_text()


def test_a_line_that_cannot_be_written_raises_nothing(path: Path) -> None:
    path.unlink()
    path.mkdir()
    log.info("first")
    path.rmdir()
    log.info("second")
    assert "second" in path.read_text()
