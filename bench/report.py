"""What the measurements of `musicgen` say, in lines and in tables in Markdown.

Ratios are printed only of runs that had the machine for themselves: `crowded` says which did not.
"""

from __future__ import annotations

from collections.abc import Sequence

import bandwidth
import numpy as np
from machine import BUSY_CORES, GIB
from peer_transformers import Decode
from steps import DURATION_S, OWN_STEPS, Missing, PeerRun


def whole_s(run: PeerRun, decode: Decode, duration_s: float = DURATION_S) -> float:
    """Seconds of all variations of a run, decoding included."""
    return run.lm_s(duration_s) + run.variations * decode.seconds * duration_s / decode.duration_s


def per_second(run: PeerRun, decode: Decode, duration_s: float = DURATION_S) -> float:
    """Seconds per second of audio."""
    return whole_s(run, decode, duration_s) / (run.variations * duration_s)


def title(run: PeerRun | Missing) -> str:
    return f"{run.name}, {run.variations} at once"


def describe(run: PeerRun | Missing, decode: Decode) -> list[str]:
    """Lines with everything that was measured, and the cost of whole pieces."""
    if isinstance(run, Missing):
        return [f"{title(run)}: not measured, {run.reason}"]
    lines = [f"{title(run)}: loaded in {run.load_s:.1f} s, prefill and first step {run.prefill_s:.2f} s"]
    for point in (run.untouched, *run.points):
        spread = f"{min(point.seconds):.3f} to {max(point.seconds):.3f}"
        lines.append(f"  {point.context:>5} positions: {point.median_s:.3f} s a step ({spread})")
    if run.left_out:
        steps = ", ".join(map(str, run.left_out))
        lines.append(f"  own steps {steps}: memory doesn't suffice; continued in a straight line")
    lines.append(
        f"  {DURATION_S:g} s each: {run.lm_s():.0f} s + EnCodec {run.variations} × {decode.seconds:.1f} s,"
        f" {per_second(run, decode):.2f} s per second of audio; peak {run.full_bytes() / GIB:.1f} GiB;"
        f" {run.others_cores:.2f} cores busy with other work"
    )
    return lines


def crowded(runs: Sequence[PeerRun], decode: Decode, at_end: float) -> list[str]:
    """A line for each measurement during which the machine was busy with other work."""
    others = {
        "EnCodec": decode.others_cores,
        **{title(run): run.others_cores for run in runs},
        "the end": at_end,
    }
    return [f"  {name}: {cores:.2f} cores" for name, cores in others.items() if cores > BUSY_CORES]


def figures(runs: Sequence[PeerRun], decode: Decode) -> list[str]:
    """All runs in one table: milliseconds a step by positions, and what whole pieces take."""
    first = runs[0]
    contexts = [
        first.untouched.context,
        *(first.untouched.context - first.untouched.own + own for own in OWN_STEPS),
    ]
    lines = [
        "Milliseconds a step by positions, seconds of the prefill, seconds per second of audio (tokens alone"
        " and with EnCodec), and peak memory in GiB:",
        "",
        f"| | variations | {' | '.join(map(str, contexts))} | prefill | tokens | with EnCodec | memory |",
        "|---|---|" + "---|" * (len(contexts) + 4),
    ]
    for run in runs:
        prefix = run.untouched.context - run.untouched.own
        steps = [f"{1000 * float(run.step_s(np.array(context - prefix))):.0f}" for context in contexts]
        tokens = run.lm_s() / (run.variations * DURATION_S)
        lines.append(
            f"| {run.name} | {run.variations} | {' | '.join(steps)} | {run.prefill_s:.1f} | {tokens:.2f}"
            f" | {per_second(run, decode):.2f} | {run.full_bytes() / GIB:.1f} |"
        )
    return lines


def ratios(
    base: Sequence[PeerRun], others: Sequence[PeerRun], decode: Decode, rates: bandwidth.Bandwidth
) -> list[str]:
    """How many times as long as `base` the others take, and the distance of `base` from int8's floor."""
    mine = {run.variations: run for run in base}
    found = {(run.name, run.variations): run for run in others}
    lines = [
        f"| times as long as {base[0].name} | {' | '.join(map(str, mine))} |",
        "|---|" + "---|" * len(mine),
    ]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [
            f"{found[name, count].lm_s() / run.lm_s():.1f}"
            f" ({per_second(found[name, count], decode) / per_second(run, decode):.1f})"
            if (name, count) in found
            else ""
            for count, run in mine.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for count, run in mine.items():
        least = bandwidth.floor(rates, count)
        distance = run.lm_s() / (least.per_second * count * DURATION_S)
        lines.append(f"{title(run)}: {distance:.2f} times the floor of {1000 * least.step_s:.0f} ms a step")
    return lines
