"""What this engine's run costs at every length: its own batch, step by step.

`Batch` prefills and steps as it does for real. To reach long context without minutes of steps, the
memory's keys and values are filled with numbers and the voices are set forward; what a step costs
depends on how much is kept, not on what. `steps` says how a whole piece follows from the points.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from child import total_bytes
from steps import DURATION_S, OWN_STEPS, TIMED_STEPS, PeerRun, Point
from true_size import FOLDER

STATE = FOLDER.parent / "state"  # what the engine keeps between starts
WARM_STEPS = 2
MOST_OF_MEMORY = 0.97  # of the machine's, so that all rows go together
PROMPT = "warm piano"


def run(
    precision: str,
    variations: int,
    tracks: int = 1,
    *,
    folder: Path = FOLDER,
    timed: int = TIMED_STEPS,
    state: Path = STATE,
) -> PeerRun:
    """So many variations, `variations / tracks` of each of so many tracks, all at once."""
    from pipeline.engines.base import EngineSettings
    from pipeline.engines.musicgen import ENGINE
    from pipeline.records import Audio, VariationRequest

    began_s = time.perf_counter()
    settings = EngineSettings(
        model=str(folder),
        precision=precision,
        state_dir=state,
        max_memory_gb=MOST_OF_MEMORY * total_bytes() / 1e9,
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
    voices = engine.prepare(requests, lambda: False)
    batch = engine.batch(voices, lambda voice, new: None, lambda: None)
    if batch.rows < 2 * variations:
        raise MemoryError(f"only {batch.rows} rows fit")
    with batch.files() as files:
        prefill_s, untouched, points = measure(engine, batch, batch.memory(files), voices, timed)
    return PeerRun(
        name=f"this engine, {precision}, {tracks} × {variations // tracks}",
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
    engine: Any, batch: Any, memory: Any, voices: list[Any], timed: int
) -> tuple[float, Point, tuple[Point, ...]]:
    """Seconds of the prefill, the first steps' times, and those at `OWN_STEPS`."""
    from pipeline.engines.musicgen import codec
    from pipeline.engines.musicgen.scheduler import Prefixes

    rng = np.random.default_rng(0)
    prefixes, free = Prefixes(memory), list(range(batch.rows))
    warm_up(batch.decoder)
    began_s = time.perf_counter()
    for voice in voices:
        batch.begin(voice, voice.windows[0], memory, prefixes, free)
    batch.step(voices, memory)
    prefill_s = time.perf_counter() - began_s
    prefix = int(memory.held.lengths[0])

    def timed_steps() -> Point:
        for _ in range(WARM_STEPS):
            batch.step(voices, memory)
        seconds = []
        for _ in range(timed):
            start_s = time.perf_counter()
            batch.step(voices, memory)
            seconds.append(time.perf_counter() - start_s)
        own = voices[0].position - timed // 2
        return Point(prefix + own, own, tuple(seconds))

    untouched = timed_steps()
    for array in memory.rows.arrays:
        fill(array)
    points = []
    for own in OWN_STEPS:
        begin = min(own, voices[0].delayed.steps - 3) - WARM_STEPS - timed
        for voice in voices:
            voice.codes[:, : begin + 1] = rng.integers(0, 2048, (len(voice.codes), begin + 1))
            voice.codes[:, begin + 1 :] = -1
            voice.position = begin
        points.append(timed_steps())
    for slot in range(batch.rows):  # as the batch does before anybody gets what has ended
        memory.release(slot)
    codec.decode(engine.checkpoint, engine.checkpoint.codec(), np.abs(voices[0].codes))  # for its memory
    return prefill_s, untouched, tuple(points)


def warm_up(decoder: Any) -> None:
    """Compile, or read what was compiled."""
    memory = decoder.memory(1, 2, 1, 16)
    memory.prefill(0, np.zeros((16, decoder.shape.hidden), np.float32))


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
