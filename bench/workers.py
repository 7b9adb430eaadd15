"""How the time of a batch falls with the number of workers on Ray.

    python bench/workers.py simulated [--units 1000]
    python bench/workers.py remix [--repeats 3]

`simulated`: an engine that sleeps for a fixed time per step, 0.9 s per variation, with 1 and 8 workers on
this machine; one worker makes a fifth of the variations. `remix`: the real engine over copies of the bundled
track, on one and on two machines of one core: all processes, the owner's and Ray's among them, have one core
or two. `watch` runs in each case, and its workers make a few tracks before. The time is from the start of the
first attempt at the others to the end of the last.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import soundfile  # noqa: E402
from drive import IMPORTS, counts, small_wav, start, stop, wait_until  # noqa: E402
from home_folder import Home  # noqa: E402
from ray_setup import add_node, ray_head  # noqa: E402

from pipeline.executors.ray_cluster import OBJECT_STORE_BYTES  # noqa: E402
from pipeline.executors.ray_environment import AUTO, set_environment  # noqa: E402

FAULTS = ROOT / "tests" / "faults"
PACE_S = 0.0225  # per step; the engine `paced` has 40
SITE = {"PYTHONPATH": os.pathsep.join([str(FAULTS / "site"), str(FAULTS), IMPORTS]), "PACE_S": str(PACE_S)}
CORES = os.sched_getaffinity(0)
PER_TRACK = 5  # variations
FIRST, LATER = "first", "later"  # folders of the inbox
TRIES = 40_000  # of a twentieth of a second


def measured(home: Home, n_first: int, n_later: int, write: Any) -> float:
    """Seconds for the later tracks, with workers that have made the first ones."""
    for i in range(n_first):
        write(home.inbox / FIRST / f"{i}.wav", i)
    with start(home, "watch", env=SITE) as child:
        wait_until(
            lambda: counts(home).get("done") == n_first, "the first are done", tries=TRIES, child=child
        )
        for i in range(n_later):
            write(home.folder / LATER / f"{i}.wav", n_first + i)
        (home.folder / LATER).rename(home.inbox / LATER)
        n = n_first + n_later
        wait_until(lambda: counts(home).get("done") == n, "all are done", tries=TRIES, child=child)
        stop(child)
    store = home.store()
    known = [store.attempts(track.sha256) for track in store.tracks()]
    store.close()
    latest = sorted(known, key=lambda attempts: attempts[0].started_at)[n_first:]
    ended = [attempt.ended_at or 0.0 for attempts in latest for attempt in attempts]
    return max(ended) - min(attempts[0].started_at for attempts in latest)


def simulated(folder: Path, n_workers: int, n_units: int) -> float:
    def write(path: Path, seed: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_wav(seed))

    home = Home(folder / f"simulated-{n_workers}")
    home.configure(
        {"name": "one", "count": PER_TRACK},
        executor={"kind": "ray", "workers": n_workers, "resources_per_worker": {"cpu": 0.25}},
        intake={"settle_s": 0.2, "rescan_s": 1, "after": "keep"},
        normalize={"sample_rate": 8000},
        embed={"engine": "free-vectors"},
        generate={"engine": "paced", "duration_s": 1},
        gates={"max_shared": None},
    )
    return measured(home, 3 * n_workers, n_units // PER_TRACK, write)


def remix(folder: Path, n_nodes: int, n_tracks: int) -> float:
    samples, rate = soundfile.read(ROOT / "pipeline" / "demo" / "paper-lanterns.ogg")

    def write(path: Path, seed: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples * (1 - seed / 100), rate)

    home = Home(folder / f"remix-{n_nodes}")
    os.sched_setaffinity(0, sorted(CORES)[:n_nodes])  # of all that is started, the owner and Ray among them
    with ray_head(**SITE) as cluster:
        for _ in range(n_nodes):
            add_node(cluster, store_bytes=OBJECT_STORE_BYTES)
        home.configure(
            executor={"kind": "ray", "address": cluster.address},
            intake={"settle_s": 0.2, "rescan_s": 1, "after": "keep"},
            normalize={},
            generate={"duration_s": 30},
        )
        return measured(home, 2 * n_nodes, n_tracks, write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["simulated", "remix"])
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--tracks", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    set_environment(AUTO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.what == "simulated":
            n_units = {1: options.units // 5, 8: options.units}
            rates = {n: units / simulated(folder, n, units) for n, units in n_units.items()}
            print(f"1 worker {rates[1]:.2f} units/s, 8 workers {rates[8]:.2f}: ", end="")
            print(f"{rates[8] / rates[1] / 8:.2f} of linear")
            return
        for k in range(options.repeats):
            one_s, two_s = (remix(folder / str(k), n, options.tracks) for n in (1, 2))
            print(
                f"remix: 1 node {one_s:.1f} s, 2 nodes {two_s:.1f} s, {one_s / two_s:.2f} times", flush=True
            )


if __name__ == "__main__":
    main()
