"""A published take as it is recorded, in the manifest of its track or in the tags of its own file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from pipeline.errors import PipelineError
from pipeline.outbox.manifest import FACTS
from pipeline.outbox.settings import Settings
from pipeline.plan import Take, digest

READ_FROM_MANIFEST = (*FACTS, "made_with", "details")
# What a take that was not kept has in common with the one whose record lists it
SHARED = ("settings", "prompt", "engine", "model", "revision", "version", "made_with", "details")
CHANGES = ("transpose", "speed")


class BadRecord(PipelineError):
    """A file does not say what is needed to make a take again."""


@dataclass(frozen=True)
class Recorded:
    """A take that is to be made again.

    Raises:
        KeyError, TypeError, ValueError: its facts are not enough for that.
    """

    file: str  # for people
    source_name: str
    source_sha256: str
    name: str  # of its variation
    facts: Mapping[str, Any]  # of the record or the tags
    listed: str | None  # the SHA-256 that the manifest has of its file; None: there is no manifest
    read: Callable[[], bytes | None]  # its file, None if that is missing; may raise OSError

    def __post_init__(self) -> None:
        self.take.key, self.facts["engine"], dict(self.facts.get("settings", {}))

    @cached_property
    def settings(self) -> Settings:
        """What its sound depends on beside its request.

        Raises:
            BadRecord: this program does not know such settings.
        """
        try:
            return Settings.of(self.facts.get("settings", {}))
        except ValueError as e:
            raise BadRecord("this version of the program does not know its settings") from e

    @cached_property
    def take(self) -> Take:
        """Its key is only unique among the takes of a call."""
        facts = self.facts
        change = {name: facts[name] for name in CHANGES if name in facts}
        key = digest(["again", self.file, facts["seed"], facts["params"]])
        return Take(key, facts["seed"], facts["params"], facts.get("similarity"), change)


def of_manifest(
    manifest: Any, where: Callable[[str], str], read: Callable[[str], bytes | None]
) -> list[Recorded]:
    """The takes whose files a manifest lists, those that were not kept included.

    Args:
        where: from a file below the track's folder to its name for people.
        read: from the same to its bytes.

    Raises:
        BadRecord: it is no manifest.
    """
    try:
        source = manifest["source"]
        return [
            Recorded(
                file=where(record["file"]),
                source_name=source["name"],
                source_sha256=source["sha256"],
                name=name,
                facts={key: record[key] for key in READ_FROM_MANIFEST if key in record},
                listed=record["sha256"],
                read=partial(read, record["file"]),
            )
            for name, record in _records(manifest).values()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise BadRecord(f"{where('manifest.json')} is not a manifest of this program, or is damaged") from e


def _records(manifest: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The records by their files, each with the name of its variation."""
    found = {record["file"]: (record["name"], record) for record in manifest["variations"]}
    for name, record in list(found.values()):
        shared = {key: record[key] for key in SHARED if key in record}
        for take in record.get("takes", ()):
            if "file" in take:
                found.setdefault(take["file"], (name, {**shared, **take}))
    return found


def of_sound(content: bytes, file: str) -> Recorded:
    """The take that a sound file has tags of.

    Raises:
        BadRecord: it has none.
    """
    tags = read_tags(content)
    try:
        facts = json.loads(tags["comment"])
        sha256, name = facts["source_sha256"], facts["name"]
        source_name = tags["title"].removesuffix(f" ({name})")
        return Recorded(file, source_name, sha256, name, facts, None, lambda: content)
    except (KeyError, TypeError, ValueError) as e:
        raise BadRecord(f"{file} has no tags of a variation that this program has made") from e


def read_tags(content: bytes) -> dict[str, str]:
    """The tags of a sound file by the names that `pipeline.outbox.manifest.tags` gives them; perhaps none."""
    import av

    try:
        with av.open(io.BytesIO(content)) as sound:
            found = {**sound.streams[0].metadata, **sound.metadata}
    except (av.FFmpegError, IndexError, UnicodeDecodeError):
        return {}
    # FFmpeg's name for the software tag of a WAV file is that of its own encoders' in the others.
    return {"software": found.get("encoder", ""), **found}


def listed_under(takes: list[Recorded], file: str) -> Iterator[Recorded]:
    """The takes whose file has this name, with or without its folder."""
    return (one for one in takes if f"/{one.file}".endswith(f"/{file}"))
