"""`score`: how close one sound file is to another, and what is wrong with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

from pipeline.app import App
from pipeline.audio import DecodeLimits, decode
from pipeline.engines.base import Embedder
from pipeline.engines.selection import select_engine
from pipeline.errors import BadAudio, os_reason
from pipeline.fs.names import printable
from pipeline.records import Audio
from pipeline.scores import Scores, analyse_source, score

PHRASES = {  # of each measure, for a reader who has not read docs/scores.md
    "similarity": "how close to the source: 0 unrelated music, 1 the same",
    "chroma": "share of the time with the same strongest note",
    "chroma_warped": "likeness of the harmony, wherever in the source it is from",
    "embedding": "likeness of the sound as a whole",
    "tempo_bpm": "beats a minute",
    "tempo_ratio": "of the source's tempo",
    "tempo_agrees": "the same, half or double tempo",
    "key": "",
    "key_agreement": "1 the source's key, 0.5 a fifth away, 0.3 relative, 0.2 parallel",
    "copy_longest_s": "seconds of the longest passage copied from the source",
    "copy_share": "share that is copied from the source",
    "worst_seam": "0 a cut that is heard, 1 none; and at which second",
    "silent_share": "share that is silent",
    "silent_longest_s": "seconds of the longest silence",
    "clipped_share": "share of the samples that are clipped",
    "dc_offset": "mean of the samples, of full scale",
    "flatness": "of the spectrum: 0 tones, 1 white noise",
    "entropy": "of the spectrum: 0 one tone, 1 white noise",
    "noise_share": "share that is noise",
    "stuck_share": "share in which the sound stands still",
    "true_peak_dbtp": "true peak, dBTP",
    "loudness_lufs": "loudness, LUFS",
}


def score_files(app: App, file: Path, source: Path) -> Scores:
    """The scores of one file against another; the configuration gives the sample rate and the embedder.

    Raises:
        BadAudio: a file can't be read.
    """
    made, reference = read_sound(app, file), read_sound(app, source)
    settings = app.settings("embed")
    engine = "clap" if app.config.embed.engine == "clap" else "descriptors"
    embedder = cast(Embedder, select_engine("embed", engine, settings).card.load(settings))
    source_vector, vector = (
        embedder.embed(audio, should_stop=lambda: False).track for audio in (reference, made)
    )
    return score(analyse_source(reference), made, source_vector=source_vector, vector=vector)


def score_text(scores: Scores) -> str:
    """A table of the measures: name, value, and what it says."""
    facts = scores.as_json()
    rows = [(name, _text(facts[name]), phrase) for name, phrase in PHRASES.items()]
    return "\n".join(f"{name:<17}{value:<14}{phrase}".rstrip() for name, value, phrase in rows)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['quality']:.2f} at {value['at_s']:.1f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def read_sound(app: App, path: Path) -> Audio:
    """A sound file of any length at the configuration's sample rate.

    Raises:
        BadAudio: it can't be read; the message has its name.
    """
    normalize = app.config.normalize
    limits = DecodeLimits(
        min_duration_s=0.0, max_duration_s=math.inf, accept_truncated=normalize.accept_truncated
    )
    try:
        return decode(path, sample_rate=normalize.sample_rate, limits=limits)[0]
    except BadAudio as e:
        raise BadAudio(f"{printable(path)} {e}") from e
    except OSError as e:
        raise BadAudio(f"{printable(path)} can't be read: {os_reason(e)}") from e
