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

import logging
from typing import Literal

from pipeline.engines.base import StopFn
from pipeline.engines.musicgen import demucs
from pipeline.engines.musicgen.hpss import harmonic, percussive_share
from pipeline.errors import BadCheckpoint, MissingPackage, MissingWeights
from pipeline.records import Audio

log = logging.getLogger("pipeline")

Melody = Literal["auto", "mix", "harmonic", "demucs"]
Source = Literal["mix", "harmonic", "demucs"]

MELODIC = 0.085  # a track with a smaller percussive share has no drums to speak of: see docs/musicgen.md


def melody_source(
    audio: Audio, wanted: Melody, *, should_stop: StopFn, device: str = "cpu"
) -> tuple[Audio, Source]:
    """The part of a track that its melody is taken from, and which part that is.

    The audio has the track's length and rate, and one channel unless it is the track itself. `device` is
    for demucs.

    Raises:
        Stopped: soon after `should_stop` turned true.
        MissingPackage, MissingWeights, BadCheckpoint: `wanted` is demucs, and it can't be used; `auto`
            does without it.
    """
    if wanted == "auto":
        share = percussive_share(audio)
        if share is None or share < MELODIC:
            wanted = "mix"
    if wanted == "mix":
        return audio, "mix"
    if wanted != "harmonic":
        try:
            model = demucs.open_model()
            return demucs.without_rhythm(audio, model, device, should_stop), "demucs"
        except (BadCheckpoint, MissingPackage, MissingWeights) as error:
            if wanted == "demucs":
                raise
            if isinstance(error, BadCheckpoint):
                log.warning("%s The melody is taken without demucs.", error)
    return harmonic(audio, should_stop), "harmonic"
