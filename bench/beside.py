"""How much of the time a generator on a GPU works, while workers beside it do everything else.

    python bench/beside.py [--tracks 20] [--seconds 120] [--cores 16] [--batch 8]

The engine `batched` of tests/faults/drive.py stands for MusicGen on an NVIDIA H200: a call takes as long as
it took there, and no processor time. Everything else is real: four variations of 30 s for each track, default
gates and formats. More cores than there are here are emulated: the workers are as many as there would be with
them, and share the cores that there are, so the generator is slowed by the same factor. What is printed is in
the seconds of the emulated machine. The owner and the disk are not slowed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from drive import BESIDE, CALLS, CORES, SLOWER, start  # noqa: E402
from home_folder import Home, write_music  # noqa: E402
from test_workers import SITE  # noqa: E402

VARIATIONS, DURATION_S = 4, 30


def main() -> None:
    here = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tracks", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each track")
    parser.add_argument("--cores", type=int, default=16, help="of the machine that is emulated")
    parser.add_argument("--batch", type=int, default=8, help="generate.batch_tracks")
    options = parser.parse_args()
    slower = options.cores / here
    with tempfile.TemporaryDirectory() as folder:
        home, calls_file = Home(Path(folder) / "home"), Path(folder) / "calls"
        home.configure(
            {"name": "one", "count": VARIATIONS},
            executor={"kind": "process", "workers": 1},
            generate={"engine": "batched", "duration_s": DURATION_S, "batch_tracks": options.batch},
            gates={"max_shared": None},  # the stand-in repeats its source
            normalize={},
            gallery={},
        )
        for n in range(options.tracks):
            write_music(home.inbox / f"{n}.wav", seed=n, seconds=options.seconds)
        env = {CORES: str(options.cores), SLOWER: str(slower), CALLS: str(calls_file)}
        began_s = time.monotonic()
        with start(home, "once", env={**SITE, **BESIDE, **env}) as child:
            child.ended(tries=100_000)
        ended_s = time.monotonic()
        assert len(home.folders) == options.tracks, child.text()
        calls = [[float(part) for part in line.split()] for line in calls_file.read_text().splitlines()]
    first_s, last_s = calls[0][0], calls[-1][1]
    busy_s = sum(end_s - call_s for call_s, end_s, _ in calls)
    audio_s = options.tracks * VARIATIONS * DURATION_S
    print(f"{options.cores} cores, {options.tracks} tracks of {options.seconds:g} s, {len(calls)} calls")
    print("variations of the calls: " + " ".join(f"{n:.0f}" for *_, n in calls))
    for name, seconds in (
        ("before the first call", first_s - began_s),
        ("from the first call to the end of the last", last_s - first_s),
        ("of which the generator works", busy_s),
        ("after the last call", ended_s - last_s),
    ):
        print(f"{name}: {seconds / slower:.1f} s")
    print(f"the generator works {busy_s / (last_s - first_s):.0%} of the time between")
    print(f"audio per second: {audio_s * slower / (ended_s - began_s):.1f} s")


if __name__ == "__main__":
    main()
