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

`prepare` does this in a worker beside a generator on a GPU, which would wait for it otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

from pipeline.engines.base import StopFn
from pipeline.engines.musicgen import demucs
from pipeline.engines.musicgen.hpss import harmonic, percussive_share
from pipeline.engines.musicgen.windows import STRIDE
from pipeline.errors import BadCheckpoint, MissingPackage, MissingWeights
from pipeline.records import Audio, VariationRequest

log = logging.getLogger("pipeline")

Melody = Literal["auto", "mix", "harmonic", "demucs"]
Source = Literal["mix", "harmonic", "demucs"]

MELODIC = 0.085  # a track with a smaller percussive share has no drums to speak of: see docs/musicgen.md
WINDOW_S = 30.0  # of the published checkpoints
TAIL_S = 1.0  # of the track after the last window, so that the resampler's filter does not end inside


def prepare(
    requests: Sequence[VariationRequest], should_stop: StopFn
) -> dict[str, tuple[Audio | None, Source]]:
    """See `EngineCard.prepare`: what `melody_source` finds, without the audio if it is the track itself.

    What demucs is to do is left to the generator, on its GPU.
    """
    found: dict[tuple[Any, ...], tuple[Audio | None, Source]] = {}
    prepared = {}
    for request in requests:
        audio, wanted = request.audio, request.params["melody"]
        if wanted == "demucs" or (wanted == "auto" and _has_demucs()):
            continue
        n_samples = needed_samples(audio, request.duration_s)
        key = (id(audio), wanted, n_samples)
        if key not in found:
            source, name = melody_source(audio, wanted, should_stop=should_stop, n_samples=n_samples)
            found[key] = None if source is audio else source, name
        prepared[request.request_id] = found[key]
    return prepared


def _has_demucs() -> bool:
    try:
        demucs.find()
    except (MissingPackage, MissingWeights):
        return False
    return True


def needed_samples(audio: Audio, duration_s: float, window_s: float = WINDOW_S) -> int:
    """How much of a track's beginning the melody of a variation is taken from, at most; see `windows`."""
    last_s = window_s if duration_s <= window_s else duration_s + STRIDE * window_s
    return min(audio.n_samples, math.ceil((last_s + TAIL_S) * audio.sample_rate))


def melody_source(
    audio: Audio,
    wanted: Melody,
    *,
    should_stop: StopFn,
    device: str = "cpu",
    n_samples: int | None = None,
) -> tuple[Audio, Source]:
    """The part of a track that its melody is taken from, and which part that is.

    The audio has the track's rate, and one channel unless it is the track itself. It has at least `n_samples`
    of the track, or all of it. `device` is for demucs.

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
    return harmonic(audio, should_stop, n_samples), "harmonic"
