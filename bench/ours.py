"""The cost of a run of this engine at every length, measured with its own scheduler.

The scheduler prefills and steps as it does in use. To reach long contexts without minutes of steps,
the KV cache is filled with numbers and the requests are moved ahead: the cost of a step depends on
how many positions there are, not on their values. `steps` derives the cost of a whole piece from the
measured points.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from machine import total_bytes
from steps import DURATION_S, OWN_STEPS, TIMED_STEPS, PeerRun, Point
from true_size import FOLDER

STATE = FOLDER.parent / "state"  # the engine's files between starts
WARM_STEPS = 2
MEMORY_SHARE = 0.97  # of the machine's memory, so that all rows run at once
PROMPT = "warm piano"


def run(
    precision: Literal["float32", "int8"],
    variations: int,
    tracks: int = 1,
    *,
    folder: Path = FOLDER,
    timed: int = TIMED_STEPS,
    state: Path = STATE,
) -> PeerRun:
    """Measure `variations` in all at once, `variations / tracks` of each track."""
    from pipeline.engines.base import EngineSettings
    from pipeline.engines.musicgen import ENGINE, MusicgenSection
    from pipeline.records import Audio, VariationRequest

    began_s, memory_gb = time.perf_counter(), MEMORY_SHARE * total_bytes() / 1e9
    settings = EngineSettings(
        model=str(folder),
        state_dir=state,
        sections={ENGINE.name: MusicgenSection(precision=precision, max_memory_gb=memory_gb)},
    )
    engine: Any = ENGINE.load(settings)
    load_s = time.perf_counter() - began_s
    rng = np.random.default_rng(0)
    audio = [
        Audio(0.1 * rng.standard_normal((1, 32000 * 30), dtype=np.float32), 32000) for _ in range(tracks)
    ]
    params = {"prompt": PROMPT, "melody": "mix"}
    requests = [
        VariationRequest(str(n), str(n % tracks), audio[n % tracks], DURATION_S, n, params)
        for n in range(variations)
    ]
    states = engine.prepare(requests, lambda: False)
    scheduler = engine.scheduler(states, lambda state: None, lambda: None)
    if scheduler.rows < 2 * variations:
        raise MemoryError(f"only {scheduler.rows} rows fit")
    prefill_s, untouched, points = measure(engine, scheduler, states, timed)
    return PeerRun(
        name=f"this engine, {precision}" + (", a track each" if tracks > 1 else ""),
        variations=variations,
        rows=2 * variations,
        prefill_s=prefill_s,
        untouched=untouched,
        points=points,
        left_out=(),
        load_s=load_s,
        peak_bytes=0,
    )


def measure(
    engine: Any, scheduler: Any, states: list[Any], timed: int
) -> tuple[float, Point, tuple[Point, ...]]:
    """Seconds of the prefill, the times of the first steps, and those at `OWN_STEPS`."""
    from pipeline.engines.musicgen import codec

    rng = np.random.default_rng(0)
    warm_up(scheduler.decoder)
    began_s = time.perf_counter()
    for state in states:
        scheduler.begin(state, state.windows[0])
    scheduler.prefill()
    scheduler.step(states)
    prefill_s = time.perf_counter() - began_s
    prefix = int(scheduler.cache.prefix_lengths[0])

    def timed_steps() -> Point:
        for _ in range(WARM_STEPS):
            scheduler.step(states)
        seconds = []
        for _ in range(timed):
            start_s = time.perf_counter()
            scheduler.step(states)
            seconds.append(time.perf_counter() - start_s)
        own = states[0].position - timed // 2
        return Point(prefix + own, own, tuple(seconds))

    untouched = timed_steps()
    for array in scheduler.cache.rows.arrays:
        fill(array)
    points = []
    for own in OWN_STEPS:
        begin = min(own, states[0].delayed.steps - 3) - WARM_STEPS - timed
        for state in states:
            state.codes[:, :begin] = rng.integers(0, 2048, (len(state.codes), begin))
            state.codes[:, begin:] = -1
            state.position = begin
        points.append(timed_steps())
    del scheduler.cache, scheduler.prefixes  # as the scheduler does before the last requests are decoded
    codec.decode(engine.checkpoint, engine.checkpoint.codec(), np.abs(states[0].codes))  # for its memory
    return prefill_s, untouched, tuple(points)


def warm_up(decoder: Any) -> None:
    """Compile the kernels, or read the compiled ones."""
    cache = decoder.new_cache(1, 2, 1, 16)
    decoder.prefill(cache, {0: np.zeros((16, decoder.shape.hidden), np.float32)})


def fill(array: np.ndarray) -> None:
    """Numbers of the size that keys, values and scales have; every page is touched."""
    rng = np.random.default_rng(1)
    for part in array:
        if array.dtype == np.int8:
            part[:] = rng.integers(-127, 128, part.shape, dtype=np.int8)
        elif array.dtype == np.uint16:  # scales as bfloat16: 0.01
            part[:] = np.float32(0.01).view(np.uint32) >> 16
        else:
            part[:] = 0.01 * rng.standard_normal(part.shape, dtype=np.float32)
