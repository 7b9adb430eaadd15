"""A fork server: it imports everything once, then forks one process per run of the program.

Run by harness.ForkServer, with fault_injector.c loaded, over a socket of JSON messages. A run is the real
program from the command line on (`pipeline.cli.commands.main`), in a forked process; only the start of
the interpreter and the imports are shared. Nothing here may start a thread or open the database.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MESSAGE_BYTES = 1 << 16
TRACEBACK = 70  # exit code of a run that ended with an exception nobody caught (sysexits: EX_SOFTWARE)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path.insert(0, sys.argv[2])
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and then the closed socket ends this
    runs: dict[int, int] = {}  # process -> number
    while True:
        ready, _, _ = select.select([control, wake_read], [], [])
        if wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 4096)
        for number, code in _ended(runs):
            _send(control, {"ended": number, "code": code})
        if control in ready and not _serve(control, runs, (wake_read, wake_write)):
            break
    for process in runs:
        os.kill(process, signal.SIGKILL)


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the tests have ended: the loop ends by itself
        control.send(json.dumps(message).encode())


def _ended(runs: dict[int, int]) -> Iterator[tuple[int, int]]:
    for process in list(runs):
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            yield runs.pop(process), os.waitstatus_to_exitcode(status)


def _serve(control: socket.socket, runs: dict[int, int], ours: tuple[int, int]) -> bool:
    """Serve one request; False once the socket is closed."""
    data = control.recv(MESSAGE_BYTES)
    if not data:
        return False
    request = json.loads(data)
    if modules := request.get("import"):
        for name in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        threads = len(list(Path("/proc/self/task").iterdir()))
        _send(control, {"imported": len(sys.modules), "threads": threads})
        return True
    process = os.fork()
    if process == 0:
        control.close()
        for fd in ours:
            os.close(fd)
        _run_program(request)
    runs[process] = request["number"]
    _send(control, {"started": request["number"], "process": process})
    return True


def _run_program(request: dict[str, Any]) -> None:
    """One run, in the forked child; doesn't return."""
    code = TRACEBACK
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, source in ((0, nothing), (1, out), (2, out)):
            os.dup2(source, fd)
        code = _program(request)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else TRACEBACK
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _program(request: dict[str, Any]) -> int:
    from pipeline.cli.commands import main as program

    if deadly := request.get("deadly"):
        _make_deadly(*deadly.split(":"))
    sys.argv = ["run_pipeline.py", *request["words"]]
    if fault := request.get("fault"):
        _arm(fault)
    code = program(default_home=Path(request["home"]))
    if path := request.get("modules_to"):
        Path(path).write_text(json.dumps(sorted(sys.modules)))
    return code


def _arm(fault: dict[str, Any]) -> None:
    arm = ctypes.CDLL(None).fault_arm
    arm.argtypes = [
        ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
        ctypes.c_char_p, ctypes.c_char_p,
    ]  # fmt: skip
    root, gate, trace = (os.fsencode(fault[name]) for name in ("root", "gate", "trace"))
    numbers = (fault[name] for name in ("at", "mode", "error", "sticky", "kinds"))
    if arm(root, *numbers, gate, trace) != 0:
        raise RuntimeError("the fault injector can't be armed")


def _make_deadly(stage: str, sha256: str) -> None:
    """Let the track of that hash kill the process, as a bug in a decoder or an engine would.

    The engine `deadly` is remix otherwise; it is there for either stage, so that the results compare.
    """
    from pipeline.engines import cards
    from pipeline.engines.base import EngineCard, EngineSettings, Generator, ProgressFn, StopFn
    from pipeline.records import VariationRequest

    remix = cards()["remix"]

    class Deadly:
        name, version = "deadly", "1"

        def __init__(self, settings: EngineSettings) -> None:
            self._remix: Generator = remix.load(settings)  # type: ignore[assignment]
            self.sample_rate = self._remix.sample_rate

        def generate(
            self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
        ) -> Iterator[Any]:
            for request in requests:
                if stage == "generate" and request.track_id == sha256:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield from self._remix.generate([request], progress=progress, should_stop=should_stop)

    cards()["deadly"] = EngineCard(
        name="deadly",
        stage="generate",
        version="1",
        summary="remix, but for one track",
        params=remix.params,
        load=Deadly,
    )
    if stage == "decode":
        _kill_in_decode(sha256)


def _kill_in_decode(sha256: str) -> None:
    from pipeline import audio

    decode = audio.decode

    def deadly(path: Path, **settings: Any) -> Any:
        if hashlib.sha256(Path(path).read_bytes()).hexdigest() == sha256:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path, **settings)

    audio.decode = deadly


if __name__ == "__main__":
    main()
