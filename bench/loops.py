"""How good the seams of loops are, beside those of PyMusicLooper's best candidate for the same sound.

    pip install pymusiclooper==3.6.0
    python bench/loops.py FILE…

Ours are asked for loops as long as the peer's. A seam is played as both would play it: the peer's loop is
cut, ours is crossfaded. The measures are made with librosa, which our choice does not use:

- chroma: mean cosine of the chroma of 2 s before and after the seam with that of 2 s before the loop's start
  and after its end in the source, which the seam stands for; 1 is the same music
- level: by how many dB the step of the level (0.2 s to either side) differs from the step at the loop's start
- onset: by how much the onset strength at the seam exceeds that at the loop's start and end in the source, in
  strengths of the source's strong onsets (95th percentile)
- click: by how many dB the largest second difference within 10 ms exceeds that at both places in the source
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.music.analysis import analyse
from pipeline.music.loops import cut_loop, find_loop
from pipeline.records import Audio

AROUND_S = 2.0
RATE_HZ = 22050  # of the measures of chroma and onsets
HOP = 512
SHARES = (0.35, 0.2, 0.1)  # of the track: its least length of a loop; its default, then less if there is none

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Seam:
    """The measures of one seam."""

    length_s: float
    chroma: float
    level_db: float
    onset: float
    click_db: float


def measure(source: Doubles, loop: Doubles, start: int, stop: int, rate: int) -> Seam:
    """The seam of `loop`, (samples,), which was made of `source` from sample `start` to `stop`."""
    n = round(AROUND_S * rate)
    seam = np.concatenate([loop[-n:], loop[:n]])
    padded = np.pad(source, n)
    at_start, at_stop = (padded[at : at + 2 * n] for at in (start, stop))
    strong = np.percentile(
        librosa.onset.onset_strength(y=_slow(source, rate), sr=RATE_HZ, hop_length=HOP), 95
    )
    onset = _onset(seam, rate) - max(_onset(at_start, rate), _onset(at_stop, rate))
    click = _brightest(seam, rate) - max(_brightest(at_start, rate), _brightest(at_stop, rate))
    return Seam(
        length_s=(stop - start) / rate,
        chroma=_chroma_agreement(seam, at_start, at_stop, rate),
        level_db=abs(_step_db(seam, rate) - _step_db(at_start, rate)),
        onset=max(0.0, onset / float(strong)),
        click_db=max(0.0, click),
    )


def _slow(mono: Doubles, rate: int) -> Doubles:
    return np.asarray(librosa.resample(mono, orig_sr=rate, target_sr=RATE_HZ))


def _chroma_agreement(seam: Doubles, at_start: Doubles, at_stop: Doubles, rate: int) -> float:
    made, start, stop = (
        librosa.feature.chroma_cqt(y=_slow(sound, rate), sr=RATE_HZ, hop_length=HOP)
        for sound in (seam, at_start, at_stop)
    )
    half = made.shape[1] // 2
    before = _cosines(made[:, :half], start[:, :half])
    after = _cosines(made[:, half:], stop[:, half:])
    return float(np.mean([*before, *after] or [1.0]))  # in silence, everything agrees


def _cosines(a: Doubles, b: Doubles) -> list[float]:
    """Cosine of each frame, without frames of silence."""
    norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    return list((a * b).sum(axis=0)[norms > 0] / norms[norms > 0])


def _step_db(around: Doubles, rate: int) -> float:
    middle, n = len(around) // 2, round(0.2 * rate)
    before, after = (
        np.mean(part**2) + 1e-10 for part in (around[middle - n : middle], around[middle : middle + n])
    )
    return float(10 * np.log10(after / before))


def _onset(around: Doubles, rate: int) -> float:
    strengths = librosa.onset.onset_strength(y=_slow(around, rate), sr=RATE_HZ, hop_length=HOP)
    middle = len(strengths) // 2
    return float(strengths[middle - 2 : middle + 3].max())


def _brightest(around: Doubles, rate: int) -> float:
    middle, n = len(around) // 2, round(0.01 * rate)
    return float(20 * np.log10(np.abs(np.diff(around[middle - n : middle + n], 2)).max() + 1e-6))


def peers(path: Path) -> tuple[Any, float]:
    """PyMusicLooper's best loop and the seconds that it took; None if it found none."""
    from pymusiclooper.core import MusicLooper
    from pymusiclooper.exceptions import LoopNotFoundError

    began_s = time.perf_counter()
    looper = MusicLooper(str(path))
    for share in SHARES:
        with suppress(LoopNotFoundError):
            [best, *_] = looper.find_loop_pairs(min_duration_multiplier=share)
            return best, time.perf_counter() - began_s
    return None, time.perf_counter() - began_s


def compare(path: Path) -> tuple[Seam, Seam] | None:
    """The peer's seam and ours, of the same length; None if the peer finds no loop."""
    samples, rate = soundfile.read(path, always_2d=True, dtype="float32")
    audio = Audio(np.ascontiguousarray(samples.T), rate)
    mono = samples.mean(axis=1, dtype=np.float64)
    theirs, theirs_s = peers(path)
    if theirs is None:
        return None
    start, stop = int(theirs.loop_start), int(theirs.loop_end)
    peer = measure(mono, mono[start:stop], start, stop, rate)
    began_s = time.perf_counter()
    found = find_loop(audio, analyse(audio), (stop - start) / rate)
    made = cut_loop(audio, found)
    ours_s = time.perf_counter() - began_s
    ours = measure(mono, made.samples.mean(axis=0, dtype=np.float64), found.start, found.stop, rate)
    for name, seam, seconds in (("PyMusicLooper", peer, theirs_s), ("ours", ours, ours_s)):
        figures = (f"{value:9.3f}" for value in astuple(seam))
        print(f"{path.name[:24]:24} {name:13} {' '.join(figures)} {seconds:6.1f}", flush=True)
    return peer, ours


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    names = ("length, s", "chroma", "level, dB", "onset", "click, dB", "took, s")
    print(f"{'track':24} {'by':13} {' '.join(f'{name:>9}' for name in names)}")
    pairs = [pair for path in arguments.files if (pair := compare(path))]
    for name in ("chroma", "level_db", "onset", "click_db"):
        sign = -1 if name == "chroma" else 1
        better = sum(sign * getattr(ours, name) <= sign * getattr(peer, name) for peer, ours in pairs)
        print(f"{name}: ours is at least as good on {better} of {len(pairs)}")


if __name__ == "__main__":
    main()
