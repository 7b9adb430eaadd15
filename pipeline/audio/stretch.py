"""Another key or tempo of a sound by Signalsmith Stretch, a phase vocoder that keeps the channels in phase.

The library aligns its output with its input. A note is heard from up to half a block (60 ms) too early.
So silence is added at both ends before and cut off after, and the cuts are faded.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from pipeline.audio.offset import fade
from pipeline.errors import MissingPackage
from pipeline.records import Audio

REQUIREMENT = "python-stretch==0.3.1"
PAD_S = 0.25  # of silence at either end
FADE_S = 0.003  # at either end
SEED = 0  # of the phases that are random where time is stretched to twice its length


def check_installed() -> None:
    """Check that the library is there, without importing it.

    Raises:
        MissingPackage: it is not installed.
    """
    if find_spec("python_stretch") is None:
        raise MissingPackage(f"transpose and speed need {REQUIREMENT}: pip install {REQUIREMENT}.")


def stretch(audio: Audio, *, transpose: int = 0, speed: float = 1.0) -> Audio:
    """Change the key, the tempo or both; returns `audio` itself if neither is to change.

    Needs about three times the memory of the longer one of the two sounds.

    Args:
        transpose: semitones.
        speed: factor of the tempo; the result has round(n_samples / speed) samples.

    Raises:
        ImportError: the library is not installed.
    """
    if not transpose and speed == 1.0:
        return audio
    from python_stretch.Signalsmith import Stretch

    pad = round(PAD_S * audio.sample_rate)
    # The library takes no read-only array, and reads the memory in this order, whatever the array's strides.
    padded = np.zeros((audio.channels, audio.n_samples + 2 * pad), np.float32, order="C")
    padded[:, pad : pad + audio.n_samples] = audio.samples
    library = Stretch(SEED)
    library.preset(audio.channels, audio.sample_rate)
    library.setTransposeSemitones(transpose)
    library.setTimeFactor(speed)
    start, n_samples = round(pad / speed), round(audio.n_samples / speed)
    made = np.asarray(library.process(padded), np.float32)[:, start : start + n_samples]
    return fade(Audio(made, audio.sample_rate), in_s=FADE_S, out_s=FADE_S)
