"""Runs of the program that end at a chosen file operation, or whose disk fails at one.

    fault_injector.c  counts the file operations below a home, and kills the process or fails at the k-th
    fork_server.py    forks one process per run
    this module       builds and starts both; a test uses it to start a run and to read its trace
    invariants.py     what must hold afterwards

A *run* is one process of the program, from its command line to its end. Its *trace* lists its
file operations with their outcome.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from home_folder import ROOT, Home, write_music

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 120.0  # for one run; ends a test that would hang
TRACEBACK = 70  # see fork_server.py
KILLED = -signal.SIGKILL


def why_not() -> str | None:
    """Why the harness can't work on this machine; None if it can."""
    if sys.platform != "linux":
        return "the fault harness interposes the C library's calls by LD_PRELOAD, as Linux has it"
    if shutil.which("cc") is None:
        return "the fault harness needs a C compiler (cc)"
    return None


class Mode(IntEnum):
    """What happens at the k-th operation; as in fault_injector.c."""

    COUNT = 0
    KILL_BEFORE = 1
    KILL_AFTER = 2
    KILL_TORN = 3  # half of a write is done; for other calls the same as KILL_BEFORE
    FAIL = 4


class Kind(IntFlag):
    """Which operations are counted; as in fault_injector.c."""

    CHANGE = 1
    SPACE = 2  # those that can need space on the disk, which overwriting in place does not
    READ = 4


@dataclass(frozen=True)
class Fault:
    """The fault that a run meets."""

    mode: Mode = Mode.COUNT
    at: int = 0  # the operation's number, from 1
    error: int = 0  # errno
    sticky: bool = False  # all later operations fail too
    kinds: Kind = Kind.CHANGE
    gate: Path | None = None  # if given, a sticky fault lasts while this file exists

    @classmethod
    def full_disk(cls, at: int, *, sticky: bool, gate: Path | None = None) -> Fault:
        return cls(Mode.FAIL, at, errno.ENOSPC, sticky, Kind.SPACE, gate)

    @classmethod
    def broken_disk(cls, at: int, *, sticky: bool) -> Fault:
        return cls(Mode.FAIL, at, errno.EIO, sticky, Kind.CHANGE | Kind.READ)


@dataclass(frozen=True)
class Operation:
    """A line of a trace."""

    n: int  # 0: not of the counted kinds
    outcome: str  # done, refused (by the system), failed (by the fault), killed before | torn | after
    call: str
    path: str
    target: str

    @property
    def happened(self) -> bool:
        return self.outcome in ("done", "killed after")


def read_trace(path: Path) -> list[Operation]:
    if not path.exists():
        return []
    lines = path.read_text(errors="surrogateescape").splitlines()
    parts = [line.split("\t") for line in lines if line.count("\t") == 4]
    return [Operation(int(n), outcome, call, where, target) for n, outcome, call, where, target in parts]


@dataclass
class ProgramRun:
    """One process of the program."""

    server: ForkServer
    number: int
    pid: int
    out_path: Path
    trace_path: Path
    code: int | None = None  # negative: the signal that ended it; None while it runs

    def wait(self, timeout_s: float = TIMEOUT_S) -> int | None:
        """Its exit code, or None if it still runs after so long."""
        if self.code is None:
            self.server.listen(timeout_s, until=lambda: self.code is not None)
        return self.code

    def end(self) -> int:
        """Its exit code; a run that doesn't end is killed and fails the test."""
        if self.wait() is None:
            self.signal(signal.SIGKILL)
            self.wait()
            raise AssertionError(f"still running after {TIMEOUT_S:g} s:\n{self.out}")
        assert self.code is not None
        return self.code

    def signal(self, number: int) -> None:
        """Send a signal, unless `wait` has returned a code: its pid may be another process's by then."""
        if self.code is None:
            with suppress(ProcessLookupError):  # it has ended, and the message about that has not arrived yet
                os.kill(self.pid, number)

    @property
    def out(self) -> str:
        return self.out_path.read_text(errors="replace") if self.out_path.exists() else ""

    @property
    def trace(self) -> list[Operation]:
        return read_trace(self.trace_path)

    @property
    def fault_hit(self) -> bool:
        return any(op.outcome.startswith(("killed", "failed")) for op in self.trace)


class ForkServer:
    """The process that is forked for each run; one for all tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[int, ProgramRun] = {}
        self._number = 0
        self._message: dict[str, Any] = {}
        injector = build_fault_injector(folder)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {k: v for k, v in os.environ.items() if k not in ("DEVICE", "PIPELINE_HOME")}
        env = {k: v for k, v in env.items() if not k.startswith(("COV_", "COVERAGE_"))}
        env |= {"LD_PRELOAD": str(injector), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "fork_server.py"), str(theirs.fileno()), str(ROOT)]
        self._process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            self._import_modules()
        except BaseException:
            self.close()
            raise

    def _import_modules(self) -> None:
        """Make one whole run, then have the server import all modules that the run imported."""
        home = new_home(self.folder / "warm", tracks=1)
        modules = self.folder / "modules.json"
        run = self.start(home, "once", modules_to=str(modules))
        assert run.end() == 0, run.out
        self._ask({"import": json.loads(modules.read_text())}, "imported")
        assert self._message["threads"] == 1, "the fork server must not have threads when it forks"

    def start(self, home: Home, *words: str, fault: Fault | None = None, **extras: str) -> ProgramRun:
        """Begin a run; `extras`: `deadly`, stage and hash of the track that kills it (fork_server.py)."""
        self._number += 1
        number = self._number
        out, trace = (
            home.folder.parent / f"{home.folder.name}.{number:05}.{what}" for what in ("out", "trace")
        )
        request: dict[str, Any] = {"number": number, "home": str(home.folder), "out": str(out), **extras}
        request["words"] = home.arguments(*words)
        given = fault or Fault()
        request["fault"] = {
            "root": str(home.folder.resolve()),
            "at": given.at,
            "mode": int(given.mode),
            "error": given.error,
            "sticky": int(given.sticky),
            "kinds": int(given.kinds),
            "gate": str(given.gate or ""),
            "trace": str(trace),
        }
        self._ask(request, "started")
        run = ProgramRun(self, number, self._message["process"], out, trace)
        self._runs[number] = run
        return run

    def run(self, home: Home, *words: str, fault: Fault | None = None, **extras: str) -> ProgramRun:
        run = self.start(home, *words, fault=fault, **extras)
        run.end()
        return run

    def _ask(self, request: dict[str, Any], answer: str) -> None:
        self._message = {}
        self._control.send(json.dumps(request).encode())
        if not self.listen(TIMEOUT_S, until=lambda: answer in self._message):
            raise AssertionError(f"the fork server doesn't answer: {answer}")

    def listen(self, timeout_s: float, *, until: Any) -> bool:
        """Receive the fork server's messages until a condition holds; False if it does not in that time."""
        while not until():
            ready, _, _ = select.select([self._control], [], [], timeout_s)
            if not ready:
                return False
            data = self._control.recv(1 << 16)
            assert data, f"the fork server ended with {self._process.wait()}"
            message = json.loads(data)
            if "ended" in message:
                self._runs.pop(message["ended"]).code = message["code"]
            else:
                self._message = message
        return True

    def close(self) -> None:
        self._control.close()
        self._process.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build_fault_injector(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "fault_injector.so"
    flags = ["-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE"]  # fortified headers redefine open() inline
    subprocess.run(["cc", *flags, "-o", str(library), str(HERE / "fault_injector.c"), "-ldl"], check=True)
    return library


def new_home(folder: Path, *, tracks: int, first: int = 0, **sections: Any) -> Home:
    """A home with so many short tracks in its inbox: 3 s each, of which two variations of 2 s are made.

    Crashes count as attempts, so there are many of those, without a wait between them. Each variation has one
    take, as units of work are counted: so short a track has no two that differ enough for the gate.
    """
    home = Home(folder)
    one_take = {"max_shared": None}
    home.configure(
        **{
            "retry": {"max_attempts": 100, "backoff_s": 0},
            "gates": one_take,
            "gallery": {"enabled": True},
            **sections,
        }
    )
    for n in range(first, first + tracks):
        write_music(home.inbox / f"track {n:02}.wav", seed=n)
    return home


def copy_of(home: Home, folder: Path) -> Home:
    """The same home elsewhere, before anything was run in it."""
    shutil.copytree(home.folder, folder)
    return Home(folder)
