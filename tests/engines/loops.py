"""Synthesized music for the embedders' tests: five bands of instruments, at any tempo and in any key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.demo import synth
from pipeline.demo.synth import RATE, Signal
from pipeline.records import Audio

MAJOR_SEVENTH, MINOR_SEVENTH, DOMINANT, POWER = (0, 4, 7, 11), (0, 3, 7, 10), (0, 4, 7, 10), (0, 7, 12)


@dataclass(frozen=True)
class Band:
    """The patterns of one bar of sixteen steps; roots are semitones above the key."""

    chords: tuple[tuple[int, tuple[int, ...]], ...]
    voice: synth.Voice | None  # of the chords; None: electric piano
    comp: str
    kick: str
    clap: str
    hat: str
    octave: int = 0
    bass: bool = True


BANDS = {
    "house": Band(
        ((0, MINOR_SEVENTH), (5, MINOR_SEVENTH), (10, DOMINANT), (3, MAJOR_SEVENTH)),
        None, "x..x..x...x..x..", "x...x...x...x...", "....x.......x...", "..x...x...x...x.",
    ),
    "ballad": Band(
        ((0, MAJOR_SEVENTH), (9, MINOR_SEVENTH), (2, MINOR_SEVENTH), (7, DOMINANT)),
        None, "x.......x.......", "x.........x.....", "", "x...x...x...x...", octave=1,
    ),
    "rock": Band(
        ((0, POWER), (10, POWER), (5, POWER), (7, POWER)),
        synth.Voice(synth.SAW, (0.9, 0.08, 0.2), 2.0, 0.003, 0.05),
        "x.x.x.x.x.x.x.x.", "x.....x.x.......", "....x.......x...", "x.x.x.x.x.x.x.x.", octave=-1,
    ),
    "arps": Band(
        ((0, MINOR_SEVENTH), (8, MAJOR_SEVENTH)),
        synth.PLUCK, "xxxxxxxxxxxxxxxx", "", "", "", octave=1, bass=False,
    ),
    "drums": Band(
        ((0, POWER),),
        synth.LEAD, "x...............", "x..x..x...x.x...", "....x..x.x..x..x", "xxxxxxxxxxxxxxxx",
    ),
}  # fmt: skip


def play(name: str, *, tempo_bpm: float = 110.0, key: int = 0, seconds: float = 20.0, seed: int = 0) -> Audio:
    """A band's loop as stereo at 44.1 kHz; `key`: semitones above C; the seed varies the strokes' levels."""
    band, rng = BANDS[name], np.random.default_rng(seed)
    bus = np.zeros((2, round((seconds + 3) * RATE)))
    step_s = 15 / tempo_bpm
    for i in range(int(seconds / step_s)):
        root, intervals = band.chords[i // 16 % len(band.chords)]
        start, velocity = round(i * step_s * RATE), float(rng.uniform(0.7, 1.0))
        low = 65.406 * 2 ** ((key + root) / 12 + band.octave)
        if band.comp[i % 16] == "x":
            notes = intervals if band.comp.count("x") < 16 else intervals[i % len(intervals) :][:1]
            for interval in notes:
                synth.add_at(bus, start, 0.12 * chord_note(band, 4 * low * 2 ** (interval / 12), velocity))
        if band.bass and i % 4 in (0, 3):
            synth.add_at(
                bus, start, 0.25 * synth.tone(synth.BASS, low / 2**band.octave, 1.5 * step_s, velocity)
            )
        for line, stroke in ((band.kick, 0), (band.clap, 1), (band.hat, 2)):
            if line and line[i % 16] == "x":
                synth.add_at(bus, start, drum_stroke(stroke, rng, velocity))
    return Audio((0.7 * bus[:, : round(seconds * RATE)]).astype(np.float32), RATE)


def chord_note(band: Band, hz: float, velocity: float) -> Signal:
    if band.voice is None:
        return synth.electric_piano(hz, 0.6, velocity)
    return synth.tone(band.voice, hz, 0.25, velocity)


def drum_stroke(kind: int, rng: np.random.Generator, velocity: float) -> Signal:
    if kind == 0:
        return 0.6 * synth.drum(50, 140, 0.13, velocity)
    return 0.4 * synth.noise((synth.CLAP, synth.HAT)[kind - 1], rng, velocity)
