"""How fast other libraries generate: transformers' `generate()`, and audiocraft's where it is installed.

    python bench/peers.py [--variations 1,2,4,8] [--audiocraft 1,8]

Each runs in a process of its own, on random weights of the true size (`true_size`), one process
after the other; `steps` says how 30 s of audio follow from seconds of measuring.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peer_audiocraft
import peer_transformers
from child import GIB, ChildDied, in_child
from peer_transformers import Decode
from steps import DURATION_S, TIMED_STEPS, Missing, PeerRun
from true_size import FOLDER, ensure

BUSY_CORES = 0.1  # with more cores busy with other work, a step waits for its slowest thread


def measure_transformers(variations: int, folder: Path = FOLDER, **options: Any) -> PeerRun | Missing:
    """`peer_transformers.run` in a process of its own."""
    name = f"transformers generate(), {variations} at once"
    return _measured(name, peer_transformers.run, variations, folder, **options)


def measure_audiocraft(variations: int, **options: Any) -> PeerRun | Missing:
    """`peer_audiocraft.run` in a process of its own; Missing where audiocraft is not installed."""
    return _measured(f"audiocraft, {variations} at once", peer_audiocraft.run, variations, **options)


def measure_decode(folder: Path = FOLDER, duration_s: float = DURATION_S) -> Decode:
    """`peer_transformers.decode` in a process of its own.

    Raises:
        ChildDied: it failed.
    """
    outcome = in_child(peer_transformers.decode, folder, duration_s)
    made: Decode = outcome.value
    return replace(made, peak_bytes=outcome.peak_bytes, others_cores=outcome.others_cores)


def whole_s(run: PeerRun, decode: Decode, duration_s: float = DURATION_S) -> float:
    """Seconds of all variations of a run, decoding included."""
    return run.lm_s(duration_s) + run.variations * decode.seconds * duration_s / decode.duration_s


def per_second(run: PeerRun, decode: Decode, duration_s: float = DURATION_S) -> float:
    """Seconds per second of audio."""
    return whole_s(run, decode, duration_s) / (run.variations * duration_s)


def describe(run: PeerRun | Missing, decode: Decode) -> list[str]:
    """Lines with everything that was measured, and the cost of whole pieces."""
    if isinstance(run, Missing):
        return [f"{run.name}: not measured, {run.reason}"]
    prefix = run.untouched.context - run.untouched.own
    lines = [
        f"{run.name} ({run.rows} rows), float32: loaded in {run.load_s:.1f} s,"
        f" prefill of {prefix} positions {run.prefill_s:.2f} s"
    ]
    notes = ("untouched", "cache copied", *("" for _ in run.points))
    for point, note in zip((run.untouched, *run.points), notes, strict=False):
        spread = f"{min(point.seconds):.3f} to {max(point.seconds):.3f}"
        line = f"  {point.context:>5} positions: {point.median_s:.3f} s a step ({spread})  {note}"
        lines.append(line.rstrip())
    if run.left_out:
        steps = ", ".join(map(str, run.left_out))
        lines.append(f"  own steps {steps}: memory doesn't suffice; continued in a straight line")
    if run.others_cores > BUSY_CORES:
        lines.append(
            f"  other processes kept {run.others_cores:.2f} cores busy: these times say little, measure again"
        )
    lines.append(
        f"  {DURATION_S:g} s each: {run.lm_s():.0f} s + EnCodec {run.variations} × {decode.seconds:.1f} s,"
        f" {per_second(run, decode):.2f} s per second of audio;"
        f" peak {run.peak_bytes / GIB:.1f} GiB measured, {run.full_bytes() / GIB:.1f} GiB for all steps"
    )
    return lines


def _measured(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> PeerRun | Missing:
    try:
        outcome = in_child(function, *args, **options)
    except ChildDied as died:
        return Missing(name, str(died))
    made: PeerRun | Missing = outcome.value
    if isinstance(made, Missing):
        return made
    return replace(made, peak_bytes=outcome.peak_bytes, others_cores=outcome.others_cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variations", default="1,2,4,8", help="at once, of transformers' generate()")
    parser.add_argument("--audiocraft", default="1,8", help="at once, of audiocraft; empty: not at all")
    parser.add_argument("--timed", type=int, default=TIMED_STEPS, help="steps per length")
    options = parser.parse_args()
    ensure()
    began_s = time.perf_counter()
    decode = measure_decode()
    peak = decode.peak_bytes / GIB
    print(
        f"EnCodec, {decode.duration_s:g} s: {decode.seconds:.2f} s, peak {peak:.1f} GiB with all weights,"
        f" {decode.others_cores:.2f} cores in others' use"
    )
    for measure, counts in (
        (measure_transformers, options.variations),
        (measure_audiocraft, options.audiocraft),
    ):
        for variations in filter(None, counts.split(",")):
            run = measure(int(variations), timed=options.timed)
            print("\n".join(describe(run, decode)), flush=True)
    print(f"measured in {time.perf_counter() - began_s:.0f} s")


if __name__ == "__main__":
    main()
