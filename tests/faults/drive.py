"""The program as a child process, and engines that behave as a fault test needs.

`start` runs run_pipeline.py as people do. With `engines=True` this file itself is the program: the
same command line, with a few engines registered beside the real ones:

    free-vectors, free        cost next to nothing, so that what a run costs is the queue's own cost
    paced                     takes 2 s per variation in steps with progress, stops when asked
    batched                   takes as long for all variations of a call as MusicGen on an NVIDIA H200
    stuck                     makes no progress and ignores requests to stop

`wait_until` checks a condition a bounded number of times; nothing here measures time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from home_folder import Home

from pipeline.engines import cards
from pipeline.engines.base import EngineCard, EngineSettings, Params, ProgressFn, StopFn
from pipeline.errors import Stopped
from pipeline.records import Audio, Embedding, Variation, VariationRequest

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for this file as the program
CHECK_EVERY_S = 0.05
RATE_HZ, SECONDS, RESCAN_S = 8000, 1.2, 0.5  # of many small files
PACE_STEPS, PACE_S = 40, 0.05
AT_ONCE = {"PACE_S": "0"}  # environment: the paced engine without its pauses
BESIDE = {"BESIDE_GENERATOR": "1"}  # environment: any generator has workers beside it, as one on a GPU has
STUCK_AT = "STUCK_AT"  # environment: a file that the stuck engine makes when it begins
# Of the batched engine, seconds of a call and of each variation: 1, 8 and 32 took 3.4, 5.2 and 10.9 s.
CALL_S, VARIATION_S = 3.2, 0.24
SLOWER = "SLOWER"  # environment: how many times as long it takes
CORES = "CORES"  # environment: how many cores the program takes the machine to have


# -- engines ---------------------------------------------------------------------------------------


class FreeVectors:
    name, version, dim = "free-vectors", "1", 4

    def embed(self, audio: Audio, *, should_stop: StopFn) -> Embedding:
        vector = np.full(4, 0.5, np.float32)
        return Embedding(vector, vector[None], np.array([[0, audio.duration_s]], np.float32))


@dataclass
class Free:
    """The source itself, repeated to the asked length, quieter or louder by the seed."""

    sample_rate: int
    name: str = "free"
    version: str = "1"

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation]:
        for request in requests:
            if should_stop():
                raise Stopped("asked to stop")
            self.wait(request, progress, should_stop)
            n = round(request.duration_s * self.sample_rate)
            shift = request.seed % request.audio.n_samples
            samples = np.resize(np.roll(np.asarray(request.audio.samples), shift, axis=1), (1, n))
            yield Variation(request.request_id, Audio(np.ascontiguousarray(samples), self.sample_rate))

    def wait(self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn) -> None:
        progress(request.request_id, 1, 1)


class Paced(Free):
    def wait(self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn) -> None:
        for step in range(PACE_STEPS):
            if should_stop():
                raise Stopped("asked to stop")
            time.sleep(float(os.environ.get("PACE_S", PACE_S)))
            progress(request.request_id, step + 1, PACE_STEPS)


class Batched(Free):
    """All variations of a call are finished at its end."""

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation]:
        took_s = CALL_S + VARIATION_S * len(requests)
        for step in range(PACE_STEPS):
            if should_stop():
                raise Stopped("asked to stop")
            time.sleep(float(os.environ.get(SLOWER, "1")) * took_s / PACE_STEPS)
            for request in requests:
                progress(request.request_id, step + 1, PACE_STEPS)
        yield from super().generate(requests, progress=lambda *_: None, should_stop=should_stop)


class Stuck(Free):
    def wait(self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn) -> None:
        if "STUCK_AT" in os.environ:
            Path(os.environ[STUCK_AT]).touch()
        while True:
            time.sleep(3600)


def register() -> None:
    def card(name: str, stage: Any, load: Callable[[EngineSettings], Any]) -> EngineCard:
        return EngineCard(name, stage, "1", "for tests of faults", Params, load)

    cards()["free-vectors"] = card("free-vectors", "embed", lambda settings: FreeVectors())
    for name, kind in (("free", Free), ("paced", Paced), ("batched", Batched), ("stuck", Stuck)):
        cards()[name] = card(
            name, "generate", lambda settings, kind=kind, name=name: kind(settings.sample_rate, name)
        )
    if BESIDE.items() <= os.environ.items():
        from pipeline.app import App

        App._generates_on_gpu = True  # type: ignore[assignment]
    if CORES in os.environ:
        from pipeline.executors import process

        process.n_cores = lambda: int(os.environ[CORES])


# -- the child -------------------------------------------------------------------------------------


@dataclass
class Child:
    """The program in a child process."""

    home: Home
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def ended(self, tries: int = 1200) -> int:
        """The exit code; fails if the process is still there after all tries."""
        wait_until(lambda: self.process.poll() is not None, "the program ends", tries=tries, child=self)
        assert self.process.returncode is not None
        return self.process.returncode

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def cpu_s(self) -> float:
        """Processor time used so far, all threads, in seconds."""
        after_name = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def descriptors(self) -> Counter[str]:
        """What the open descriptors point to."""
        found: Counter[str] = Counter()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found[str(link.readlink()).split("[")[0]] += 1
        return found


@contextlib.contextmanager
def start(
    home: Home, *words: str | Path, engines: bool = False, env: dict[str, str] | None = None
) -> Iterator[Child]:
    """Run a command of the program as a child process, which is killed if it outlives the block."""
    program = Path(__file__) if engines else ROOT / "run_pipeline.py"
    n = len(list(home.folder.glob("child-*.txt")))
    output = home.folder / f"child-{n}.txt"
    kept = {key: value for key, value in os.environ.items() if key not in ("DEVICE", "PIPELINE_HOME")}
    with output.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(program), *home.arguments(*words)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**kept, "PYTHONPATH": IMPORTS, **(env or {})},
        )
    child = Child(home, process, output)
    try:
        yield child
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def stop(child: Child) -> int:
    """Ask it to end and return its exit code."""
    child.send(signal.SIGTERM)
    return child.ended()


def wait_until(
    condition: Callable[[], object], what: str, *, tries: int = 1200, child: Child | None = None
) -> None:
    """Check until the condition holds, at most `tries` times; a minute by default."""
    for _ in range(tries):
        is_over = child is not None and not child.is_alive()
        if condition():
            return
        if is_over:
            break
        time.sleep(CHECK_EVERY_S)
    text = f"\n{child.text()[-4000:]}" if child else ""
    raise AssertionError(f"did not happen: {what}{text}")


# -- many small files ------------------------------------------------------------------------------


def small_wav(seed: int) -> bytes:
    """A WAV that is different for each seed: 1.2 s, mono, 8 kHz, 16 bits, about 20 KB."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(SECONDS * RATE_HZ)) / RATE_HZ
    tone = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 1000, 3)) / 3
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes((tone * 20000).astype("<i2").tobytes())
    return out.getvalue()


def write_small_files(folder: Path, n: int) -> None:
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"{i:05d}.wav").write_bytes(small_wav(i))


def configure_for_small_files(home: Home) -> None:
    """Many small files, engines that cost nothing, and no events: files are found by scans only."""
    home.configure(
        {"name": "one"},
        intake={"settle_s": 0.2, "watch": "polling", "poll_s": RESCAN_S, "rescan_s": RESCAN_S},
        normalize={"sample_rate": RATE_HZ},
        embed={"engine": "free-vectors"},
        generate={"engine": "free", "duration_s": 1, "batch_tracks": 64},
    )


# -- what the program reports ----------------------------------------------------------------------


def status(home: Home) -> dict[str, Any]:
    """What `status --json` prints."""
    with start(home, "status", "--json", engines=True) as child:
        assert child.ended() == 0, child.text()
    facts: dict[str, Any] = json.loads(child.text())
    return facts


def counts(home: Home) -> dict[str, int]:
    """Tracks per state, from the store: the same as `status`, without starting a process each time."""
    if not (home.folder / "state" / "pipeline.db").exists():
        return {}
    store = home.store()
    try:
        return store.counts()
    except sqlite3.OperationalError:  # the database is being created
        return {}
    finally:
        store.close()


def is_idle(home: Home, *, done: int) -> bool:
    """Whether at least so many tracks are done and nothing is queued or running."""
    now = counts(home)
    return bool(now) and now["done"] >= done and not now["queued"] and not now["running"]


def log_of(home: Home) -> str:
    path = home.folder / "state" / "pipeline.log"
    return path.read_text(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    from pipeline.cli.commands import main

    register()
    sys.exit(main(default_home=ROOT))
