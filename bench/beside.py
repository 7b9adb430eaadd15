"""How long a generator waits, with everything else in its process or in workers beside it.

    python bench/beside.py [--tracks 8]

The engine `paced` of tests/faults/drive.py stands for a GPU: it takes 2 s for a variation and no processor
time. Everything else is real: four variations of 30 s for each track of 40 s, default gates and formats. The
time is that of `once`, from its start to its end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from drive import BESIDE, PACE_S, PACE_STEPS, start  # noqa: E402
from home_folder import Home, write_music  # noqa: E402
from test_workers import SITE  # noqa: E402

VARIATIONS = 4


def measured(home: Home, n_tracks: int, env: dict[str, str]) -> float:
    """Seconds of `once`."""
    home.configure(
        {"name": "one", "count": VARIATIONS},
        executor={"kind": "process", "workers": 1},
        generate={"engine": "paced", "duration_s": 30, "batch_tracks": 2},
        gates={"max_shared": None},
        normalize={},
    )
    for n in range(n_tracks):
        write_music(home.inbox / f"{n}.wav", seed=n, seconds=40.0)
    began = time.monotonic()
    with start(home, "once", env={**SITE, **env}) as child:
        child.ended(tries=100_000)
    took_s = time.monotonic() - began
    assert len(home.folders) == n_tracks, child.text()
    return took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tracks", type=int, default=8)
    n_tracks = parser.parse_args().tracks
    least_s = n_tracks * VARIATIONS * PACE_STEPS * PACE_S
    with tempfile.TemporaryDirectory() as folder:
        both = [
            measured(Home(Path(folder) / name), n_tracks, env)
            for name, env in (("one", {}), ("beside", BESIDE))
        ]
    for name, took_s in zip(("in one process", "with workers beside it"), both, strict=True):
        print(f"{name}: {took_s:.1f} s, of which the generator works {least_s / took_s:.0%}")
    print(f"ratio {both[0] / both[1]:.2f}")


if __name__ == "__main__":
    main()
