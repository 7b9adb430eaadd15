"""The bundled instrumental, rendered from its score and encoded.

    python -m pipeline.demo.compose OUT.ogg

The samples are the same to the bit on one machine; another processor or libm may round differently. The
file is the same except for the random serial number that libsndfile gives to every Ogg stream, and the
checksums of the pages, which include it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyloudnorm
import soundfile
from scipy import signal

from pipeline.demo import TITLE, synth
from pipeline.demo.score import (
    ARPEGGIO,
    BASS,
    CHORDS,
    COMP,
    DRUMS,
    FILLS,
    LAST_CHORD,
    LAST_NOTE,
    TEMPO_BPM,
    Bar,
    bars,
    events,
)
from pipeline.demo.synth import RATE, Signal, add_at, note_hz, panned, tone

Buses = dict[str, Signal]  # by part, (2, samples)

STEP = RATE * 15 // TEMPO_BPM  # samples in a sixteenth: 5250
BAR = 16 * STEP
SWING = STEP // 12  # how late every second sixteenth is
TAIL_S = 3.4  # from the last chord's start to the end
LOUDNESS_LUFS = -14.0
CEILING = 10 ** (-1.6 / 20)  # leaves Vorbis 0.6 dB to overshoot within -1 dBTP
SEED = 20
OGG_COMPRESSION = 0.6  # libsndfile: 0 best quality, 1 smallest

# part: gain in dB, sends to reverb and echo, depth of the ducking by the kick
MIX = {
    "kick": (-7.5, 0.0, 0.0, 0.0),
    "drums": (-7.0, 0.1, 0.0, 0.0),
    "bass": (-14.5, 0.0, 0.0, 0.35),
    "piano": (-18.5, 0.18, 0.08, 0.4),
    "pad": (-25.5, 0.3, 0.0, 0.55),
    "arpeggio": (-18.5, 0.22, 0.45, 0.4),
    "vibes": (-14.0, 0.22, 0.22, 0.0),
    "lead": (-20.0, 0.25, 0.3, 0.0),
}
CYMBALS = {"clap": synth.CLAP, "hat": synth.HAT, "open": synth.OPEN_HAT}


class Note(NamedTuple):
    """One note of a line, in time."""

    start: int  # sample
    length_s: float
    velocity: float
    half: int  # of the bar, for its chord
    token: str


def notes(start: int, line: str) -> Iterator[Note]:
    """A line's notes, the bar starting at a sample; beats are louder than eighths, those than sixteenths."""
    for step, length, token in events(line):
        velocity = (1.0, 0.76, 0.86, 0.76)[step % 4]
        yield Note(start + step * STEP + step % 2 * SWING, length * STEP / RATE, velocity, step // 8, token)


def play_bass(bar: Bar, start: int, buses: Buses) -> None:
    for note in notes(start, BASS[bar.section.bass]):
        root = note_hz(CHORDS[bar.halves[note.half]][0])
        hz = {"R": root, "5": 1.5 * root, "8": 2 * root, ">": note_hz(bar.next_root, -100)}[note.token]
        add_at(buses["bass"], note.start, tone(synth.BASS, hz, note.length_s, note.velocity))


def play_chords(bar: Bar, start: int, buses: Buses) -> None:
    """Piano and pad."""
    voicings = [CHORDS[chord][1].split() for chord in bar.halves]
    for note in notes(start, COMP[bar.section.comp]):
        for name in voicings[note.half]:
            sound = synth.electric_piano(note_hz(name), note.length_s, note.velocity)
            add_at(buses["piano"], note.start, sound)
    halves = (0,) if bar.halves[0] == bar.halves[1] else (0, 1)
    for half in halves:
        for name in voicings[half]:
            add_at(buses["pad"], start + half * BAR // 2, synth.pad(name, BAR / RATE / len(halves)))


def play_arpeggio(bar: Bar, start: int, buses: Buses) -> None:
    """The chord's voices one by one, an octave up, alternating between the sides."""
    for i, note in enumerate(notes(start, ARPEGGIO)):
        name = CHORDS[bar.halves[note.half]][1].split()[int(note.token) - 1]
        sound = tone(synth.PLUCK, 2 * note_hz(name), note.length_s, note.velocity)
        add_at(buses["arpeggio"], note.start, panned(sound, 0.6 if i % 2 else -0.6))


def play_melody(bar: Bar, start: int, buses: Buses) -> None:
    """The tune, on the vibraphone, the lead or both."""
    for note in notes(start, bar.melody):
        hz = note_hz(note.token)
        if "vibes" in bar.section.parts:
            sound = synth.vibraphone(hz, note.length_s, note.velocity)
            add_at(buses["vibes"], note.start, panned(sound, 0.12))
        if "lead" in bar.section.parts:
            sound = tone(synth.LEAD, hz, note.length_s, note.velocity)
            add_at(buses["lead"], note.start, panned(sound, -0.12))


def play_drums(bar: Bar, start: int, buses: Buses, rng: np.random.Generator) -> list[int]:
    """The drums, with a crash after a section's end; returns where the kicks are."""
    lines = DRUMS[bar.section.drums] | (FILLS.get(bar.section.drums, {}) if bar.last else {})
    kicks = []
    for kind, line in lines.items():
        for step, digit in enumerate(line):
            if digit == ".":
                continue
            when = start + step * STEP + step % 2 * SWING
            velocity = int(digit) / 9
            if kind == "kick":
                add_at(buses["kick"], when, synth.drum(48, 142, 0.13, velocity))
                kicks.append(when)
            elif kind == "tom":
                falling = synth.drum(105 * 2 ** ((15 - step) / 12), 60, 0.11, velocity)
                add_at(buses["drums"], when, panned(falling, (step - 12) / 6))
            else:
                add_at(buses["drums"], when, synth.noise(CYMBALS[kind], rng, velocity))
    if bar.last:
        add_at(buses["drums"], start + BAR, synth.noise(synth.CRASH, rng, 0.8))
    return kicks


def play_end(start: int, buses: Buses) -> None:
    """The last chord, until it has decayed."""
    root, voicing = CHORDS[LAST_CHORD]
    for note in voicing.split():
        add_at(buses["piano"], start, synth.electric_piano(note_hz(note), 2.4, 0.9))
        add_at(buses["pad"], start, synth.pad(note, 1.6))
    add_at(buses["bass"], start, tone(synth.BASS, note_hz(root), 2.2, 0.9))
    add_at(buses["vibes"], start, panned(synth.vibraphone(note_hz(LAST_NOTE), 1.2, 0.7), 0.12))
    add_at(buses["kick"], start, synth.drum(48, 142, 0.13, 0.9))


def mix(buses: Buses, kicks: list[int], rng: np.random.Generator) -> Signal:
    """All parts at their levels, ducked by the kick, with a shared echo and reverb."""
    dry, to_reverb, to_echo = np.zeros((3, *buses["kick"].shape))
    for part, (gain_db, reverb_send, echo_send, dip) in MIX.items():
        sound = 10 ** (gain_db / 20) * synth.ducking(dry.shape[1], kicks, dip) * buses[part]
        dry += sound
        to_reverb += reverb_send * sound
        to_echo += echo_send * sound
    echoes = synth.echo(to_echo, 3 * STEP, 5, 0.5)
    return np.asarray(dry + echoes + synth.reverb(to_reverb + 0.2 * echoes, rng, 1.6))


def mastered(bus: Signal) -> Signal:
    """High-passed, faded to zero, at LOUDNESS_LUFS (BS.1770-4) under the true-peak ceiling."""
    bus = signal.sosfilt(signal.butter(2, 28, "highpass", fs=RATE, output="sos"), bus)
    bus *= synth.ramps(bus.shape[1], 0.002, 1.2)
    measure = pyloudnorm.Meter(RATE).integrated_loudness
    loud = bus
    for _ in range(3):  # limiting lowers the loudness a little, so the gain is found iteratively
        bus = bus * 10 ** ((LOUDNESS_LUFS - measure(loud.T)) / 20)
        loud = synth.limited(bus, CEILING)
    return loud


def render() -> Signal:
    """The whole piece, float64, (2, samples) at RATE."""
    rng = np.random.default_rng(SEED)
    form = bars()
    end = len(form) * BAR
    buses = {part: np.zeros((2, end + round(TAIL_S * RATE))) for part in MIX}
    kicks = [end]
    for start, bar in zip(range(0, end, BAR), form, strict=True):
        play_bass(bar, start, buses)
        play_chords(bar, start, buses)
        play_melody(bar, start, buses)
        if "arpeggio" in bar.section.parts:
            play_arpeggio(bar, start, buses)
        kicks += play_drums(bar, start, buses, rng)
    play_end(end, buses)
    return mastered(mix(buses, kicks, rng))


def encode(samples: Signal) -> bytes:
    """Ogg Vorbis with the title in its tags."""
    buffer = io.BytesIO()
    options = {"format": "OGG", "subtype": "VORBIS", "compression_level": OGG_COMPRESSION}
    with soundfile.SoundFile(buffer, "w", RATE, 2, **options) as file:
        file.title = TITLE
        # in pieces: libsndfile's Vorbis writer overruns its stack on long writes
        for start in range(0, samples.shape[1], RATE):
            file.write(samples[:, start : start + RATE].T)
    return buffer.getvalue()


def main() -> None:
    Path(sys.argv[1]).write_bytes(encode(render()))


if __name__ == "__main__":
    main()
