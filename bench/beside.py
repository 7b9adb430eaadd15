"""How much of the time a generator on a GPU works, while workers beside it do everything else.

    python bench/beside.py [--tracks 20] [--seconds 120] [--cores 16]
    python bench/beside.py --musicgen FOLDER [--device cuda]

The first form needs no GPU. The engine `batched` of tests/faults/drive.py stands for MusicGen on an NVIDIA
H200: a call takes as long as it took there, and no processor time. Everything else is real: four variations
of 30 s for each track, default gates and formats. More cores than there are here are emulated: the workers
are as many as there would be with them, and share the cores that there are, so the generator is slowed by the
same factor. What is printed is in the seconds of the emulated machine. The owner and the disk are not slowed.

The second form runs MusicGen itself, and CLAP of the true size with random weights. `bench/gpu.py --folder`
and `bench/true_size.py --folder` make such a checkpoint of MusicGen.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("", "engines", "faults"))]

from checkpoints import build_clap  # noqa: E402
from drive import BESIDE, CORES, SLOWER, log_of, start  # noqa: E402
from home_folder import Home, write_music  # noqa: E402
from test_workers import SITE  # noqa: E402

VARIATIONS, DURATION_S = 4, 30
CALL = re.compile(r"^(.{23}) DEBUG a call made (\d+) takes, \d+ s of sound, in ([\d.]+) s$", re.MULTILINE)


def main() -> None:
    here = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tracks", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each track")
    parser.add_argument("--cores", type=int, default=here, help="of the machine that is emulated")
    parser.add_argument("--musicgen", type=Path, help="a checkpoint, instead of the stand-in")
    parser.add_argument("--device", default="cuda", help="of that checkpoint")
    options = parser.parse_args()
    slower = options.cores / here
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder) / "home")
        env = {CORES: str(options.cores), SLOWER: str(slower)}
        if options.musicgen is None:
            configure(home, options, {"engine": "batched"})
        else:
            clap = {"engine": "clap", "model": str(true_size_clap(Path(folder) / "clap"))}
            musicgen = {"engine": "musicgen", "model": str(options.musicgen.resolve())}
            configure(home, options, musicgen, embed=clap, device=options.device)
        on_gpu = options.musicgen is not None and options.device != "cpu"
        began = datetime.now()
        with (
            gpu_memory_watched() if on_gpu else nullcontext(),
            start(home, "once", env={**SITE, **BESIDE, **env}) as child,
        ):
            child.ended(tries=100_000)
        took_s = (datetime.now() - began).total_seconds()
        assert len(home.folders) == options.tracks, child.text()
        report(began, took_s, log_of(home), options, slower)


def configure(home: Home, options: argparse.Namespace, generate: Mapping[str, Any], **sections: Any) -> None:
    prompt = {"prompt": "warm analog synths"} if options.musicgen else {}
    home.configure(
        {"name": "one", "count": VARIATIONS, **prompt},
        executor={"kind": "process", "workers": 1},
        generate={**generate, "duration_s": DURATION_S},
        gates={"max_shared": None, "retries": 0},  # the stand-in repeats its source
        normalize={},
        gallery={},
        **sections,
    )
    for n in range(options.tracks):
        write_music(home.inbox / f"{n}.wav", seed=n, seconds=options.seconds)


@contextmanager
def gpu_memory_watched() -> Iterator[None]:
    """Print how much of the GPU's memory all processes together use: at first, and at most."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    ended, used = threading.Event(), list[int]()

    def watch() -> None:
        while not ended.wait(0.5):
            used.append(int(subprocess.check_output(command, text=True).split()[0]))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
    if used:
        first, most = used[0] / 1024, max(used) / 1024
        print(f"GPU memory of all processes: {first:.1f} GiB at first, {most:.1f} GiB at most")


def true_size_clap(folder: Path) -> Path:
    from transformers import ClapConfig

    return build_clap(folder, config=ClapConfig())


def report(began: datetime, took_s: float, text: str, options: argparse.Namespace, slower: float) -> None:
    """Print what the log says of the calls of the generator."""
    ends_s, durations_s, takes = list[float](), list[float](), list[str]()
    for at, n, seconds in CALL.findall(text):
        ends_s.append((datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f") - began).total_seconds())
        durations_s.append(float(seconds))
        takes.append(n)
    first_s, last_s, busy_s = ends_s[0] - durations_s[0], ends_s[-1], sum(durations_s)
    print(f"{options.cores} cores, {options.tracks} tracks of {options.seconds:g} s")
    print(f"variations of the calls of the generator: {' '.join(takes)}")
    for name, seconds in (
        ("before the first call", first_s),
        ("from the first call to the end of the last", last_s - first_s),
        ("of which the generator works", busy_s),
        ("after the last call", took_s - last_s),
    ):
        print(f"{name}: {seconds / slower:.1f} s")
    print(f"the generator works {busy_s / (last_s - first_s):.0%} of the time between")
    print(f"audio per second: {options.tracks * VARIATIONS * DURATION_S * slower / took_s:.1f} s")


if __name__ == "__main__":
    main()
