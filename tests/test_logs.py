"""The log file: it is rotated by size, opened anew after a move, and ignored while it can't be written."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.logs import LOG_BYTES, logging_to

log = logging.getLogger("pipeline")


def test_a_line_that_cannot_be_written_is_dropped_without_a_message(
    isolated: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(Path("/dev/full"), Console(quiet=True)):
        log.info("first")
    assert capsys.readouterr().err == ""


def test_the_file_is_rotated_by_size(tmp_path: Path, isolated: None) -> None:
    path = tmp_path / "pipeline.log"
    with logging_to(path, Console(quiet=True)):
        log.info("a" * LOG_BYTES)
        log.info("second")
    assert "second" in path.read_text()
    assert path.stat().st_size < LOG_BYTES


def test_a_log_file_that_was_moved_away_is_opened_anew(tmp_path: Path, isolated: None) -> None:
    path, moved = tmp_path / "pipeline.log", tmp_path / "pipeline.log.old"
    with logging_to(path, Console(quiet=True)):
        log.info("first")
        path.rename(moved)
        log.info("second")
    assert "first" in moved.read_text()
    assert "second" in path.read_text()
