"""What the melody conditioning hears of a track: all of it, or what drums and bass leave.

MusicGen's chroma names the strongest pitch class of each moment, and the model learned it from
recordings without drums and bass: audiocraft separates them with demucs and keeps the stems
"vocals" and "other". Of the whole mix it often is the kick drum or the bass that is named. Music
that is melodic already is better left as it is (audiocraft #478).

- `mix`: the track as it is.
- `harmonic`: what is steady in time, above the bass; see `harmonic`.
- `demucs`: its stems "vocals" and "other"; see `separation`.
- `auto`: `mix` where there are hardly any strokes (`percussive_share`), else `demucs` where it is
  installed with its weights on this machine, else `harmonic`.

What is heard only becomes chroma, which is of the channels' mean: both filters give one channel.
The same audio gives the same bits; with demucs, on the same machine and build of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.engines.base import StopFn
from pipeline.engines.musicgen.demucs import Separator, open_separator, separator_if_any, without_rhythm
from pipeline.engines.musicgen.hpss import harmonic, percussive_share
from pipeline.records import Audio

Melody = Literal["auto", "mix", "harmonic", "demucs"]
Way = Literal["mix", "harmonic", "demucs"]

MELODIC = 0.085  # below this share of strokes there are no drums to speak of: see docs/musicgen.md


@dataclass(frozen=True, eq=False)
class Heard:
    """What the chroma is made of."""

    audio: Audio  # of the track's length and rate; one channel unless it is the track itself
    how: Way
    percussive_share: float | None = None  # what `auto` decided by, in [0, 1]; None: not asked, or silence


def listen(
    audio: Audio,
    how: Melody,
    *,
    should_stop: StopFn,
    device: str = "cpu",
    cache_dir: Path | None = None,
) -> Heard:
    """The part of a track that its melody is taken from.

    `device` is demucs', `cache_dir` the hub's cache its weights may be in (None: the library's).

    Raises:
        Stopped: soon after `should_stop` turned true.
        MissingPackage, MissingWeights, BadCheckpoint: `how` is demucs, and it can't be used; `auto`
            does without it.
    """
    share: float | None = None
    separator: Separator | None = None
    if how == "auto":
        how, share = "mix", percussive_share(audio)
        if share is not None and share >= MELODIC:
            separator = separator_if_any(device, cache_dir)
            how = "demucs" if separator else "harmonic"
    elif how == "demucs":
        separator = open_separator(device, cache_dir)
    heard = audio
    if separator:
        heard = without_rhythm(audio, separator, should_stop)
    elif how == "harmonic":
        heard = harmonic(audio, should_stop)
    return Heard(heard, how, share)
