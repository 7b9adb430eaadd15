"""What a take is asked for with, and what is said of it: for takes that are made, and made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.audio import DecodeLimits
from pipeline.config import Gates, Normalize, Output
from pipeline.engines.selection import Choice
from pipeline.executors.encode import FileForm
from pipeline.executors.tasks import MadeTake, TakeRequest
from pipeline.outbox import manifest
from pipeline.outbox.manifest import SOFTWARE, Json
from pipeline.outbox.settings import Settings
from pipeline.plan import Take
from pipeline.records import Audio, VariationRequest
from pipeline.stages import NORMALIZE_VERSION, OUTPUT_VERSIONS, engine_duration_s

LEVELS = ("loudness_lufs", "peak_dbfs", "true_peak_dbtp")


@dataclass(frozen=True, eq=False)
class Source:
    """What a take is made from."""

    track: str  # SHA-256 of the source file
    key: str  # equal for equal sounds
    audio: Audio  # normalized, in the key and tempo that are asked for
    loudness_lufs: float  # of the source file, as it is recorded


def limits_of(settings: Normalize) -> DecodeLimits:
    """What is refused when a source is decoded."""
    return DecodeLimits(
        min_duration_s=settings.min_duration_s,
        max_duration_s=settings.max_duration_s,
        max_bytes=round(settings.max_size_mb * 1e6),
        accept_truncated=settings.accept_truncated,
    )


def take_request(take: Take, source: Source, length_s: float, output: Output, gates: Gates) -> TakeRequest:
    """The request for a take that will be `length_s` long when it is finished."""
    request = VariationRequest(
        request_id=take.key,
        track_id=source.track,
        audio=source.audio,
        duration_s=engine_duration_s(length_s, output),
        seed=take.seed,
        params=take.params,
    )
    return TakeRequest(request, source.key, length_s, source.loudness_lufs, gates)


def record_of(take: Take, made: MadeTake, choice: Choice, settings: Settings, device: str) -> Json:
    """What the manifest says of a take that has a sound; `device`: of an engine with weights."""
    assert made.facts is not None and made.verdict is not None
    facts = manifest.take_facts(take, made.made_by, choice, settings)
    if made.prompt != take.params.get("prompt", ""):
        facts["prompt"] = made.prompt
    facts["made_with"] = {
        **made.made_with,
        "normalization": NORMALIZE_VERSION,
        "output": OUTPUT_VERSIONS[settings.output.format],
        **({"device": device} if choice.model else {}),
    }
    return manifest.take_record(facts, made.facts, made.verdict.scores)


def at_album_loudness(record: Mapping[str, Any], album_lufs: float) -> tuple[Json, float]:
    """The record of a take at the loudness of all results of its track, and the gain to it in dB."""
    gain_db = album_lufs - record["loudness_lufs"]
    scores = _raised(record["scores"], gain_db)
    return {**_raised(record, gain_db), "album_lufs": album_lufs, "scores": scores}, gain_db


def _raised(record: Mapping[str, Any], gain_db: float) -> Json:
    """A record with the levels that are in it raised by a gain."""
    levels = {name: record[name] for name in LEVELS if record.get(name) is not None}
    return {**record, **{name: round(level + gain_db, 2) for name, level in levels.items()}}


def file_form(
    track: str, sha256: str, name: str, record: Mapping[str, Any], output: Output, *, software: str = SOFTWARE
) -> FileForm:
    """The file of a take; `track` and `name` are those of the source and of the variation."""
    tags = manifest.tags(track, sha256, name, record, output_format=output.format, software=software)
    return FileForm(output, tags, manifest.markers(record))
