"""The log file, which is rotated and opened anew after a move, and the lines on standard error."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from home_folder import ROOT, Home, write_music
from rich.console import Console

from pipeline.logs import LOG_BYTES, is_journal, log_facts, logging_to

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


# -- JSON lines ------------------------------------------------------------------------------------


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_have_the_facts_that_are_known(tmp_path: Path, isolated: None) -> None:
    out = io.StringIO()
    with logging_to(tmp_path / "log", Console(file=out), as_json=True):
        log.info("a :smile: [red]b[/] é")
        with log_facts(track="a.wav", worker=lambda: "process 1"):
            log.warning("%s failed", "it", extra={"stage": "embed", "attempt": 2, "seconds": 1.23456})
        with pytest.raises(ZeroDivisionError), log_facts(track="b.wav"):
            log.exception("with a traceback", exc_info=ZeroDivisionError())
            raise ZeroDivisionError
        log.error("last \udcff")
        log.debug("only in the file")
    first, second, third, last = json_lines(out.getvalue())
    assert datetime.fromisoformat(first.pop("time")).utcoffset() == timedelta(0)
    assert first == {"level": "INFO", "message": "a :smile: [red]b[/] é"}
    del second["time"]
    assert second == {
        "level": "WARNING",
        "message": "it failed",
        "track": "a.wav",
        "worker": "process 1",
        "stage": "embed",
        "attempt": 2,
        "seconds": 1.235,
    }
    assert (third["track"], third["message"]) == ("b.wav", "with a traceback")
    assert ("track" in last, last["message"]) == (False, "last \udcff")
    assert '"message"' not in (tmp_path / "log").read_text()


def test_facts_hold_in_their_own_thread_alone(tmp_path: Path, isolated: None) -> None:
    out = io.StringIO()
    with logging_to(tmp_path / "log", Console(file=out), as_json=True), log_facts(track="a.wav"):
        other = threading.Thread(target=log.info, args=["elsewhere"])
        other.start()
        other.join()
    [line] = json_lines(out.getvalue())
    assert "track" not in line


@pytest.mark.parametrize("is_its_socket", [True, False])
def test_under_systemd_and_only_there_lines_are_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_its_socket: bool
) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        stream = os.fstat(stderr.fileno())
        inode = stream.st_ino + (not is_its_socket)
        assert is_journal({"JOURNAL_STREAM": f"{stream.st_dev}:{inode}"}) == is_its_socket
        assert not is_journal({})


def test_a_run_logs_who_did_what_at_which_attempt_and_how_long_it_took(home: Home) -> None:
    home.configure(executor={"kind": "process", "workers": 1}, intake={"settle_s": 0})
    write_music(home.inbox / "song.wav")
    (home.inbox / "letter.mp3").write_text("Dear all, this is not music.\n" * 20)
    said = home.folder / "said"
    with said.open("w") as stderr:
        stream = os.fstat(stderr.fileno())
        env = {**os.environ, "JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino}"}
        command = [sys.executable, str(ROOT / "run_pipeline.py"), *home.arguments("once")]
        subprocess.run(command, stderr=stderr, stdout=subprocess.DEVNULL, env=env, check=False)
    lines = json_lines(said.read_text())
    took = {line["stage"]: line for line in lines if line.get("track") == "song.wav" and "seconds" in line}
    assert took.keys() == {"normalize", "embed", "generate", "embed-variations"}
    for line in took.values():
        assert (line["attempt"], line["level"]) == (1, "INFO")
        assert line["seconds"] >= 0
        assert line["worker"].startswith("process ")
    [failed] = [line for line in lines if line["level"] == "ERROR"]
    assert (failed["track"], failed["stage"]) == ("letter.mp3", "normalize")
