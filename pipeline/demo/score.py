"""The score of the bundled instrumental, as data.

Paper Lanterns: 126 beats a minute, F major; the bridge stands in A flat, a minor third up, and returns
through C7b9. Intro (2 bars), A, A', B, A'' (4 bars each), and a last chord that decays. The
voicings move by steps, and the bars of A, A' and A'' share their rhythm, so that they can be exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

TEMPO_BPM = 126

# name: bass note, voicing without the root
CHORDS = {
    "Fmaj9": ("F1", "E3 G3 A3 C4"),
    "Dm9": ("D2", "F3 A3 C4 E4"),
    "Gm9": ("G1", "F3 A3 Bb3 D4"),
    "C9sus": ("C2", "F3 G3 Bb3 D4"),
    "C13": ("C2", "E3 A3 Bb3 D4"),
    "Am7": ("A1", "E3 G3 A3 C4"),
    "Bbmaj9": ("Bb1", "F3 A3 C4 D4"),
    "Dbmaj9": ("Db2", "F3 Ab3 C4 Eb4"),
    "Cm7": ("C2", "G3 Bb3 C4 Eb4"),
    "Bbm9": ("Bb1", "Ab3 C4 Db4 F4"),
    "C7b9": ("C2", "G3 Bb3 Db4 E4"),
}
# Lines of one bar: token/sixteenths, "-" rests
BASS = {
    "walk": "R/3 -/3 R/2 8/1 -/1 R/2 5/1 -/1 8/1 >/1",  # root, octave, fifth; > leads up to the next root
    "long": "R/6 R/2 5/4 8/2 >/2",
    "rest": "-/16",
}
COMP = {"push": "x/2 -/1 x/3 -/4 x/2 -/1 x/3", "hold": "x/6 x/8 -/2"}
ARPEGGIO = "1/2 3/2 2/2 4/2 3/2 4/2 2/2 3/2"  # voices of the chord, counted from below, an octave up
# Sixteen sixteenths, velocities 1 to 9
DRUMS = {
    "hats": {
        "hat": "5.3.5.3.5.3.5.34",
    },
    "four": {
        "kick": "9...8...9...8...",
        "clap": "....8.......9...",
        "hat": "42.342.442.342.4",
        "open": "..6...6...6...6.",
    },
    "broken": {
        "kick": "9.....7...8.....",
        "clap": "....8.......9...",
        "hat": "5.3.6.345.3.6.34",
    },
}
FILLS = {  # lines that replace those above in a section's last bar
    "four": {
        "clap": "....8.......8.67",
        "hat": "42.342.442......",
        "open": "..6...6.........",
        "tom": "..........8.65..",
    },
    "broken": {
        "clap": "....8...4.6.7.89",
        "hat": "5.3.6.34........",
        "tom": ".........7.7.6.6",
    },
}


class Section(NamedTuple):
    """Some bars: each has one chord or one for each half, and a line of melody."""

    chords: tuple[str, ...]
    melody: tuple[str, ...]
    parts: str  # instruments besides bass, piano, pad and drums
    bass: str = "walk"
    comp: str = "push"
    drums: str = "four"


INTRO = Section(("Bbmaj9", "C9sus"), ("-/16", "-/12 A4/2 C5/2"), "vibes arpeggio", "rest", "hold", "hats")
A = Section(
    ("Fmaj9", "Dm9", "Gm9", "C9sus"),
    (
        "D5/3 C5/3 A4/2 -/2 C5/2 D5/4",
        "C5/3 A4/3 G4/2 -/2 A4/2 C5/4",
        "Bb4/3 A4/3 F4/2 -/2 A4/2 Bb4/2 C5/2",
        "D5/6 C5/2 G4/6 -/2",
    ),
    "vibes",
)
A1 = Section(
    ("Fmaj9", "Am7 Dm9", "Gm9", "C13 Fmaj9"),
    (
        "D5/3 C5/3 A4/2 -/1 A4/1 C5/2 F5/4",
        "E5/3 C5/3 A4/2 -/2 D5/2 E5/2 F5/2",
        "F5/3 D5/3 Bb4/2 -/2 A4/2 G4/2 A4/2",
        "A4/3 G4/3 E4/2 A4/6 -/2",
    ),
    "vibes arpeggio",
)
B = Section(
    ("Dbmaj9", "Cm7", "Bbm9", "C7b9"),
    (
        "F5/6 Eb5/4 C5/4 Eb5/2",
        "Eb5/6 Bb4/4 G4/4 Bb4/2",
        "Db5/6 C5/4 Ab4/4 C5/2",
        "Db5/4 C5/4 Bb4/4 G4/1 Bb4/1 C5/1 E5/1",
    ),
    "lead",
    "long",
    "hold",
    "broken",
)
A2 = Section(
    ("Fmaj9", "Am7 Dm9", "Gm9 C13", "Fmaj9"),
    (A1.melody[0], A1.melody[1], "F5/3 D5/3 Bb4/2 A4/4 G4/2 E4/2", "A4/3 C5/3 E5/2 G5/6 -/2"),
    "vibes arpeggio lead",
)
FORM = (INTRO, A, A1, B, A2)  # and the last chord
LAST_CHORD, LAST_NOTE = "Fmaj9", "C6"


class Bar(NamedTuple):
    """One bar of the form, unrolled."""

    section: Section
    halves: tuple[str, str]  # the chord of each half
    melody: str
    last: bool  # of its section
    next_root: str


def bars() -> list[Bar]:
    """The form, bar by bar."""
    flat = [(section, i) for section in FORM for i in range(len(section.chords))]
    words = [section.chords[i].split() for section, i in flat]
    roots = [CHORDS[chords[0]][0] for chords in words[1:]] + [CHORDS[LAST_CHORD][0]]
    return [
        Bar(section, (word[0], word[-1]), section.melody[i], i == len(section.chords) - 1, root)
        for (section, i), word, root in zip(flat, words, roots, strict=True)
    ]


def events(line: str) -> Iterator[tuple[int, int, str]]:
    """(first sixteenth, sixteenths, token) of a line's notes; the line must fill its bar."""
    step = 0
    for word in line.split():
        token, length = word.split("/")
        if token != "-":
            yield step, int(length), token
        step += int(length)
    if step != 16:
        raise ValueError(f"A bar has 16 sixteenths, this line {step}: {line}.")
