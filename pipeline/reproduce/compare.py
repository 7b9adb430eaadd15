"""What is found out about a take that was made again."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.executors.versions import PROGRAM
from pipeline.reproduce.recorded import Recorded

State = Literal["same", "different", "untried"]


@dataclass(frozen=True)
class Outcome:
    """A take that was made again, or why that can't be tried."""

    file: str  # or the folder of a track without a readable manifest
    name: str | None  # of the variation
    track: str | None  # SHA-256 of its source
    state: State
    why: str = ""  # it is different or can't be tried, or what is odd though it is the same
    versions: Mapping[str, tuple[str, str]] | None = None  # those that differ: as recorded, and now
    peak_difference: float | None = None  # of the two sounds, of full scale; None: they can't be compared
    content: bytes = b""  # of the file that was made

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "name": self.name,
            "track": self.track,
            "state": self.state,
            "why": self.why or None,
            "versions": {
                name: {"recorded": then, "now": now} for name, (then, now) in (self.versions or {}).items()
            },
            "peak_difference": self.peak_difference,
            "sha256": hashlib.sha256(self.content).hexdigest() if self.content else None,
        }


def outcome_of(take: Recorded, state: State, why: str, **found: Any) -> Outcome:
    """An outcome; `found`: its other fields."""
    return Outcome(take.file, take.name, take.source_sha256, state, why, **found)


def compared(
    take: Recorded, published: bytes | None, content: bytes, versions: Mapping[str, tuple[str, str]]
) -> Outcome:
    """Compare a file that was made again with the published one; None: that is missing.

    It is the same if it has the bytes of the published file, and those that the manifest lists.
    """
    is_listed = take.listed in (None, hashlib.sha256(content).hexdigest())
    if is_listed and published in (None, content):
        why = "its file is missing" if published is None else ""
        return outcome_of(take, "same", why, versions=versions, peak_difference=0.0, content=content)
    peak = None if published is None else peak_difference(published, content)
    if published is None:
        why = "it is not what the manifest lists, and its file is missing"
    elif published == content:
        why = "its file is the same, but not what the manifest lists"
    elif is_listed and take.listed:
        why = f"its file is not the one that was published: {_sound_text(peak)}"
    else:
        why = _sound_text(peak)
    if take.listed and "made_with" not in take.facts:
        why += " (its record is older than the settings in records, so the default ones were taken)"
    return outcome_of(take, "different", why, versions=versions, peak_difference=peak, content=content)


def _sound_text(peak: float | None) -> str:
    if peak is None:
        return (
            "the sounds can't be compared: their lengths, rates or channels differ, or one can't be decoded"
        )
    if peak == 0.0:
        return "the sound is the same, but other bytes of the file differ"
    return f"the sound differs by up to {20 * math.log10(peak):.1f} dBFS"


def peak_difference(one: bytes, other: bytes) -> float | None:
    """The largest difference of two files' samples, of full scale.

    None: they have another length, rate or number of channels, or one can't be decoded.
    """
    import numpy as np
    import soundfile

    try:
        (a, a_rate), (b, b_rate) = (soundfile.read(io.BytesIO(file), always_2d=True) for file in (one, other))
    except soundfile.LibsndfileError:
        return None
    if a_rate != b_rate or a.shape != b.shape:
        return None
    return float(np.max(np.abs(a - b), initial=0.0))


def versions_of(facts: Mapping[str, Any], program: str | None) -> dict[str, str]:
    """The versions that a take was made with, as far as its record names them; `program`: this program's."""
    engine, details = facts["engine"], facts.get("details", {})
    found = {
        PROGRAM: program,
        f"engine {engine}": facts.get("version"),
        "model": facts.get("model"),
        "model revision": facts.get("revision"),
        "precision": details.get("precision"),
        **{name: have for name, have in facts.get("made_with", {}).items() if name != PROGRAM},
    }
    return {name: str(have) for name, have in found.items() if have}


def differing(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The versions that are known in both and not the same."""
    return {name: (have, now[name]) for name, have in then.items() if now.get(name, have) != have}
