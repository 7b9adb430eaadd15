"""The records of finished units of work, the manifest made of them, and the tags in each sound file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline import __version__, audio
from pipeline.engines.selection import Choice
from pipeline.outbox.outbox import VECTORS_RECORD, Published
from pipeline.outbox.settings import Settings
from pipeline.plan import Recipe, Take, TrackPlan
from pipeline.records import MadeBy, SourceInfo
from pipeline.stages import Normalized

SCHEMA = 1
FACTS = (  # for tags
    *("seed", "similarity", "transpose", "speed", "params", "prompt"),
    *("engine", "model", "revision", "version", "license"),
    *("tempo_bpm", "key", "bars", "loop"),
    *("settings", "album_lufs"),
)
OPUS_RATE_HZ = 48000  # in which positions in Ogg Opus are counted, whatever the sound's rate (RFC 7845)
SOFTWARE = f"instrumental-variations {__version__}"

Json = dict[str, Any]


def normalized_record(source: SourceInfo, normalized: Normalized) -> Json:
    """The source file's properties and those of the normalized audio."""
    return {
        "source": {
            "duration_s": round(source.duration_s, 6),
            "sample_rate": source.sample_rate,
            "channels": source.channels,
            "codec": source.codec,
            "loudness_lufs": round(normalized.source_lufs, 2),
            **({"notes": list(source.notes)} if source.notes else {}),
        },
        "duration_s": normalized.audio.duration_s,
        "sample_rate": normalized.audio.sample_rate,
        "channels": normalized.audio.channels,
        "loudness_lufs": round(normalized.levels.loudness_lufs, 2),
        "true_peak_dbtp": round(normalized.levels.true_peak_dbtp, 2),
    }


def embedding_record(published: Published, made_by: MadeBy, dim: int, choice: Choice) -> Json:
    return {
        **vars(published),
        "engine": made_by.name,
        "model": choice.model,
        "revision": choice.revision,
        "version": made_by.version,
        "dim": dim,
    }


def take_facts(take: Take, made_by: MadeBy, choice: Choice, settings: Settings) -> Json:
    """All that is needed to make the same sound again."""
    said = settings.said()
    return {
        **take.facts(),
        **({"settings": said} if said else {}),
        "engine": made_by.name,
        "model": choice.model,
        "revision": choice.revision,
        "version": made_by.version,
        "license": choice.license,
    }


def take_record(facts: Json, sound: Mapping[str, Any], scores: Json) -> Json:
    """A result that is judged, but not published yet; `sound`: see `Finished.facts`."""
    tempo_bpm = scores.get("tempo_bpm")
    return {
        **facts,
        "tempo_bpm": None if tempo_bpm is None else round(tempo_bpm, 2),
        "key": scores.get("key"),
        **sound,
        "scores": scores,
    }


def variation_record(
    published: Published, name: str, take: Mapping[str, Any], failed: Sequence[str], takes: list[Json]
) -> Json:
    """A published take, the gates that it fails nevertheless, and all takes if there were others."""
    return {
        **vars(published),
        "name": name,
        **take,
        **({"failed": list(failed)} if failed else {}),
        **({"takes": takes} if len(takes) > 1 else {}),
    }


def tags(
    track: str,
    sha256: str,
    name: str,
    take: Mapping[str, Any],
    *,
    output_format: str,
    software: str = SOFTWARE,
) -> dict[str, str]:
    """The facts for the file itself; without a date, so that the same request gives the same bytes.

    Those in capitals are for formats with free tags. Loops have LOOPSTART and LOOPLENGTH, in samples.
    """
    comment = {"source_sha256": sha256, "name": name, **{key: take[key] for key in FACTS if key in take}}
    free = {}
    if take["tempo_bpm"] is not None:
        free["BPM"] = f"{take['tempo_bpm']:.0f}"
    if take["key"] is not None:
        free["KEY"] = short_key(take["key"])
    if "loop" in take:
        rate = OPUS_RATE_HZ if output_format == "opus" else take["sample_rate"]
        free |= {"LOOPSTART": "0", "LOOPLENGTH": str(round(take["duration_s"] * rate))}
    return {
        "title": f"{track} ({name})",
        "comment": json.dumps(comment, sort_keys=True, ensure_ascii=False),
        "copyright": str(take["license"]),
        "software": software,
        **free,
    }


def short_key(key: str) -> str:
    """A key such as "A minor" as ID3v2 has it: "Am"."""
    tonic, mode = key.split()
    return f"{tonic}m" if mode == "minor" else tonic


def _rater_facts(choice: Choice) -> Json:
    return {
        "engine": choice.card.name,
        "model": choice.model,
        "revision": choice.revision,
        "version": choice.card.version,
        "license": choice.license,
    }


def markers(take: Mapping[str, Any]) -> list[audio.Marker]:
    """The joins of a variation whose engine tells them."""
    joins = enumerate(take["details"].get("joins", ()), 1)
    return [audio.Marker(round(join["out_s"] * take["sample_rate"]), f"join {i}") for i, join in joins]


def manifest(
    source: Json,
    normalized: Json,
    embedding: Json,
    variations: list[Json],
    recipe: Recipe,
    *,
    vectors: Json,
    plan: TrackPlan,
    now: float,
) -> Json:
    """Of the records above; `source` has what a track's row says of its file: name, names, sha256, bytes.

    `vectors`: the record of the variations' embedding; empty if they are not embedded.
    """
    return {
        "schema": SCHEMA,
        "source": {**source, **normalized["source"]},
        "normalized": {key: value for key, value in normalized.items() if key != "source"},
        "embedding": embedding,
        "variations": variations,
        **({VECTORS_RECORD: vectors} if vectors else {}),
        "keys": {
            "plan": plan.key,
            "normalize": plan.normalize_key,
            "embed": plan.embed_key,
            "generate": [unit.key for unit in plan.variations],
            **({"embed_variations": plan.vectors_key} if vectors else {}),
        },
        **({"judge": _rater_facts(recipe.rater)} if recipe.rater else {}),
        "config_sha256": recipe.config.sha256,
        "pipeline_version": __version__,
        "created_at": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
    }
