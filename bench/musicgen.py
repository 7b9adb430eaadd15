"""This engine against its peers, on random weights of the true size: `make bench`.

Each runs in a process of its own, one after the other: transformers' `generate()` for one variation and
for several in a batch, audiocraft's where it is installed, and this engine in int8 and float32. It prints
all measured points, seconds per second of audio, ratios, peak memory, and the ratio to the time that
reading the weights, keys and values takes at the memory bandwidth measured in the same run.

    python bench/musicgen.py [--variations 1,2,4,8] [--precisions int8,float32] [--peers 1,2,4,8]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import bandwidth
import ours
import peers
from child import GIB, ChildDied, in_child
from steps import DURATION_S, Missing, PeerRun
from true_size import ensure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variations", default="1,2,4,8", help="of this engine, at once")
    parser.add_argument("--precisions", default="int8,float32")
    parser.add_argument("--peers", default="1,2,4,8", help="variations at once, of transformers' generate()")
    parser.add_argument("--audiocraft", default="1,8", help="variations at once; empty: not at all")
    options = parser.parse_args()
    ensure()
    decode = peers.measure_decode()
    print(f"EnCodec, {DURATION_S:g} s of audio: {decode.seconds:.2f} s")
    theirs: dict[int, PeerRun] = {}
    for count in counts(options.peers):
        run = peers.measure_transformers(count)
        print("\n".join(peers.describe(run, decode)), flush=True)
        if isinstance(run, PeerRun):
            theirs[count] = run
    for count in counts(options.audiocraft):
        print("\n".join(peers.describe(peers.measure_audiocraft(count), decode)), flush=True)
    runs = [
        (precision, count, tracks)
        for precision in options.precisions.split(",")
        for count in counts(options.variations)
        for tracks in ((1, count) if count == 8 else (1,))  # in turn: the machine's speed changes
    ]
    found: dict[tuple[str, int, int], PeerRun] = {}
    for precision, count, tracks in runs:
        measured = measure(precision, count, tracks)
        print("\n".join(describe(measured, decode)), flush=True)
        if isinstance(measured, PeerRun):
            found[precision, count, tracks] = measured
    rates = bandwidth.measure()
    print("\n".join(bandwidth.describe(rates)))
    print("\n".join(ratios(found, theirs, decode, rates)))


def measure(precision: str, variations: int, tracks: int) -> PeerRun | Missing:
    """`ours.run` in a process of its own."""
    try:
        outcome = in_child(ours.run, precision, variations, tracks)
    except ChildDied as died:
        return Missing(f"this engine, {precision}, {variations}", str(died))
    run: PeerRun = outcome.value
    return replace(run, peak_bytes=outcome.peak_bytes, others_cores=outcome.others_cores)


def describe(run: PeerRun | Missing, decode: peers.Decode) -> list[str]:
    """As `peers.describe`, without the lines on a copied cache."""
    if isinstance(run, Missing):
        return [f"{run.name}: not measured, {run.reason}"]
    lines = [f"{run.name}: loaded in {run.load_s:.1f} s, prefill and first step {run.prefill_s:.2f} s"]
    for point in (run.untouched, *run.points):
        spread = f"{min(point.seconds):.3f} to {max(point.seconds):.3f}"
        lines.append(f"  {point.context:>5} positions: {point.median_s:.3f} s a step ({spread})")
    if run.others_cores > peers.BUSY_CORES:
        lines.append(f"  other processes kept {run.others_cores:.2f} cores busy: measure again")
    lines.append(
        f"  {DURATION_S:g} s each: {run.lm_s():.0f} s + EnCodec,"
        f" {peers.per_second(run, decode):.2f} s per second of audio; peak {run.peak_bytes / GIB:.1f} GiB"
    )
    return lines


def ratios(
    found: dict[tuple[str, int, int], PeerRun],
    theirs: dict[int, PeerRun],
    decode: peers.Decode,
    rates: bandwidth.Bandwidth,
) -> list[str]:
    """Ratios of time per second of audio, and the distance from the floor."""
    lines = []
    for (precision, count, tracks), run in found.items():
        mine = peers.per_second(run, decode)
        name = f"{precision}, {tracks} × {count // tracks}"
        for other, peer in theirs.items():
            if other in (1, count):
                ratio = peers.per_second(peer, decode) / mine
                lines.append(f"{name}: {ratio:.1f}× transformers with {other} at once")
        least = bandwidth.floor(rates, count, precision)
        distance = run.lm_s() / (least.per_second * count * DURATION_S)
        lines.append(f"{name}: {distance:.2f}× the floor of {least.step_s * 1000:.0f} ms a step")
        if tracks > 1 and (precision, count, 1) in found:
            lines.append(
                f"{name}: {run.lm_s() / found[precision, count, 1].lm_s():.2f}× the time of 1 × {count}"
            )
    return lines


def counts(words: str) -> list[int]:
    return [int(word) for word in words.split(",") if word]


if __name__ == "__main__":
    main()
