"""This engine against its peers, on random weights of the true size: `make bench`.

The peers are a decoder in plain torch (`peer_torch`) and one in OpenVINO (`peer_openvino`), which keep
keys and values as this engine does, and two libraries as they are, transformers and audiocraft. Each runs in
a process of its own, one after the other. It prints all measured points, then a table of all, ratios,
and the distance from the time that reading the weights, keys and values takes at the memory bandwidth
measured in the same run.

Times that were measured beside other work say little, so there are no ratios then: it ends at once if the
machine is busy at the start, and without ratios if it was busy later.

    python bench/musicgen.py [--variations 1,8] [--only engine-int8,torch-int8] [--figures-only]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import bandwidth
import machine
import ours
import peer_audiocraft
import peer_openvino
import peer_torch
import peer_transformers
import report
from child import ChildDied, in_child
from peer_transformers import Decode
from steps import DURATION_S, Missing, PeerRun
from true_size import FOLDER, ensure

BASE = "engine-int8"  # what ratios are of
TRACKS = "engine-int8-tracks"  # one variation each of several tracks

# What is measured: a function, and its arguments for a number of variations
CONTENDERS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]] = {
    BASE: (ours.run, lambda n: ("int8", n)),
    TRACKS: (ours.run, lambda n: ("int8", n, n)),
    "engine-float32": (ours.run, lambda n: ("float32", n)),
    "torch-int8": (peer_torch.run, lambda n: ("int8", n, FOLDER)),
    "torch-float32": (peer_torch.run, lambda n: ("float32", n, FOLDER)),
    "openvino-int8": (peer_openvino.run, lambda n: (n, FOLDER)),
    "transformers": (peer_transformers.run, lambda n: (n, FOLDER)),
    "audiocraft": (peer_audiocraft.run, lambda n: (n,)),
}


def main(words: Sequence[str] | None = None, busy_cores: Callable[[], float] = machine.busy_cores) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variations", default="1,8", help="at once")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="what is measured")
    parser.add_argument("--figures-only", action="store_true", help="no ratios, on a busy machine too")
    options = parser.parse_args(words)
    at_start = busy_cores()
    print(f"{machine.name()}\n{at_start:.2f} cores are busy with other work at the start", flush=True)
    if at_start > machine.BUSY_CORES and not options.figures_only:
        sys.exit(
            "The machine is busy: measure when it is not. --figures-only measures now, and gives no ratios."
        )
    ensure()
    decode = measure_decode()
    print(f"EnCodec, {DURATION_S:g} s of audio: {decode.seconds:.2f} s")
    found: dict[str, list[PeerRun]] = {}
    for count in map(int, options.variations.split(",")):
        for name in options.only.split(","):
            if (name, count) == (TRACKS, 1):
                continue  # the same as BASE
            run = measure(name, count)
            print("\n".join(report.describe(run, decode)), flush=True)
            if isinstance(run, PeerRun):
                found.setdefault(name, []).append(run)
    rates = bandwidth.measure()
    print("\n".join(bandwidth.describe(rates)))
    conclude(found, decode, rates, busy_cores(), figures_only=options.figures_only)


def measure(name: str, variations: int) -> PeerRun | Missing:
    """One of `CONTENDERS` in a process of its own."""
    function, arguments = CONTENDERS[name]
    try:
        outcome = in_child(function, *arguments(variations))
    except ChildDied as died:
        return Missing(name, variations, str(died))
    run: PeerRun | Missing = outcome.value
    if isinstance(run, Missing):
        return run
    return replace(run, peak_bytes=outcome.peak_bytes, others_cores=outcome.others_cores)


def measure_decode() -> Decode:
    """EnCodec in a process of its own. Raises ChildDied if it fails."""
    outcome = in_child(peer_transformers.decode, FOLDER)
    made: Decode = outcome.value
    return replace(made, peak_bytes=outcome.peak_bytes, others_cores=outcome.others_cores)


def conclude(
    found: dict[str, list[PeerRun]],
    decode: Decode,
    rates: bandwidth.Bandwidth,
    at_end: float,
    *,
    figures_only: bool = False,
) -> None:
    """Print the tables of all runs, by their names in `CONTENDERS`.

    Raises:
        SystemExit: the machine was busy with other work, so there are no ratios; or there are no runs.
    """
    runs = [run for of_name in found.values() for run in of_name]
    if not runs:
        sys.exit("Nothing could be measured.")
    print("\n" + "\n".join(report.figures(runs, decode)))
    print(f"\n{at_end:.2f} cores are busy with other work at the end")
    if figures_only or BASE not in found:
        return
    if busy := report.crowded(runs, decode, at_end):
        sys.exit("\n".join(["No ratios, as the machine was busy with other work:", *busy]))
    others = [run for name, of_name in found.items() if name != BASE for run in of_name]
    print("\n" + "\n".join(report.ratios(found[BASE], others, decode, rates)))


if __name__ == "__main__":
    main()
