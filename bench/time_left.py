"""How right the time left of `status` is: estimate by truth, once a second over one run of `once`.

    python bench/time_left.py FOLDER

The first run of a home has no history, so the first estimates come from the first track alone. Other programs
at work on the machine make the estimates worse, as nothing tells when they end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parents[1] / "run_pipeline.py"


def status(home: Path) -> dict[str, Any]:
    command = [sys.executable, PROGRAM, "--home", home, "status", "--json"]
    facts: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with at least three tracks")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        (home / "inbox").mkdir()
        command = [sys.executable, PROGRAM, "--home", home, "once", folder]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = []  # time, tracks done, estimate
        while child.poll() is None:
            facts = status(home)
            seen.append((time.time(), facts["tracks"]["done"], facts["time_left_s"]))
            time.sleep(1)
    end = time.time()
    ratios = []
    for at, done, left_s in seen:
        if done and left_s is not None and end - at > 5:
            ratios.append(left_s / (end - at))
            print(f"{done} done, {end - at:.0f} s left, estimate {left_s:.0f} s: {ratios[-1]:.2f}")
    within = sum(0.75 <= ratio <= 1.25 for ratio in ratios)
    print(f"after the first track: {ratios[0]:.2f}; median {statistics.median(ratios):.2f};")
    print(f"{within} of {len(ratios)} estimates are right to a quarter")


if __name__ == "__main__":
    main()
