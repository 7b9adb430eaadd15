"""What the melody of a track is taken from: the whole mix, or the mix without drums and bass.

MusicGen's chroma names the strongest pitch class at each moment, and the model was trained on
recordings whose drums and bass were removed: audiocraft separates them with demucs and keeps the
stems "vocals" and "other". In a whole mix the strongest pitch often is that of the kick drum or the
bass. Music that has no drums is better left as it is (audiocraft #478).

- `mix`: the track as it is.
- `harmonic`: its harmonic part above the bass, see `hpss`.
- `demucs`: its stems "vocals" and "other", see `demucs`.
- `auto`: `mix` if the track is hardly percussive (`percussive_share`), else `demucs` where it is
  installed with its weights on this machine, else `harmonic`.

The result is used for chroma only, which is taken from the mean of the channels, so both filters
return one channel. The same audio gives the same bits; with demucs, on the same machine and build
of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.engines.base import StopFn
from pipeline.engines.musicgen.demucs import Separator, open_separator, separator_if_any, without_rhythm
from pipeline.engines.musicgen.hpss import harmonic, percussive_share
from pipeline.records import Audio

Melody = Literal["auto", "mix", "harmonic", "demucs"]
Source = Literal["mix", "harmonic", "demucs"]

MELODIC = 0.085  # a track with a smaller percussive share has no drums to speak of: see docs/musicgen.md


@dataclass(frozen=True, eq=False)
class MelodySource:
    """The audio that the chroma is computed of."""

    audio: Audio  # of the track's length and rate; one channel unless it is the track itself
    source: Source
    percussive_share: float | None = None  # in [0, 1]; None: not computed, or the track is silent


def melody_source(audio: Audio, wanted: Melody, *, should_stop: StopFn, device: str = "cpu") -> MelodySource:
    """The part of a track that its melody is taken from.

    `device` is for demucs.

    Raises:
        Stopped: soon after `should_stop` turned true.
        MissingPackage, MissingWeights, BadCheckpoint: `wanted` is demucs, and it can't be used; `auto`
            does without it.
    """
    share: float | None = None
    separator: Separator | None = None
    is_percussive = wanted == "harmonic"
    if wanted == "demucs":
        separator = open_separator(device)
    elif wanted == "auto":
        share = percussive_share(audio)
        is_percussive = share is not None and share >= MELODIC
        separator = separator_if_any(device) if is_percussive else None
    if separator:
        return MelodySource(without_rhythm(audio, separator, should_stop), "demucs", share)
    if is_percussive:
        return MelodySource(harmonic(audio, should_stop), "harmonic", share)
    return MelodySource(audio, "mix", share)
