"""The page of one track: its source and its takes, made of the manifest and of pictures of the sounds."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipeline.gallery.pictures import Picture

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).with_name("templates")
Json = Mapping[str, Any]
# The scores that have bars, all 0 to 1: what they are called, and where they are among a take's scores.
SCORES: Sequence[tuple[str, Callable[[Json], float | None]]] = (
    ("rank", lambda scores: scores.get("rank")),
    ("similarity", lambda scores: scores["similarity"]),
    ("chroma", lambda scores: scores["chroma"]),
    ("timbre and rhythm", lambda scores: scores["embedding"]),
    ("key", lambda scores: scores["key_agreement"]),
    ("tempo", lambda scores: None if scores["tempo_agrees"] is None else float(scores["tempo_agrees"])),
    ("worst seam", lambda scores: scores["worst_seam"]["quality"]),
    ("copied", lambda scores: scores["copy_share"]),
)
_PICTURES = re.compile(r'<script type="application/json" id="pictures">(.*?)</script>', re.DOTALL)


def track_page(
    manifest: Json,
    pictures: Mapping[str, Picture],
    *,
    sources: Sequence[str],
    remake: Sequence[str],
    top: str,
) -> str:
    """The page as HTML.

    Args:
        manifest: of the track.
        pictures: by the SHA-256 of the file; a sound without one is only played.
        sources: where the source may be, as URLs relative to the page; the first that is there is played.
        remake: the words of the command that makes a file again, up to the track's folder.
        top: the URL of the outbox relative to the page: empty, or it ends in a slash.
    """
    return template("track.html").render(
        name=manifest["source"]["name"],
        source=_source(manifest["source"], sources),
        takes=_takes(manifest, remake),
        rejected=list(_rejected(manifest)),
        embedder=_made_by(manifest["embedding"]),
        made_at=manifest["created_at"],
        pictures=json.dumps(pictures, separators=(",", ":")),  # hexadecimal and base64 alone
        top=top,
        style=_static("style.css"),
        scripts=[_static("common.js"), _static("track.js")],
    )


def index_page() -> str:
    """The page of all tracks, which takes them from tracks.js."""
    return template("index.html").render(
        top="", style=_static("style.css"), scripts=[_static("common.js"), _static("index.js")]
    )


def pictures_of(page: str) -> dict[str, Picture]:
    """The pictures in a page that `track_page` has made; none if it is damaged, or another page."""
    found = _PICTURES.search(page)
    with suppress(ValueError):
        return json.loads(found[1]) if found else {}
    return {}


def take_files(manifest: Json) -> list[tuple[str, str]]:
    """The names and hashes of all sounds of a track."""
    takes = [take for one in manifest["variations"] for take in (one, *one.get("takes", ()))]
    return list(dict.fromkeys((take["file"], take["sha256"]) for take in takes if "sha256" in take))


@cache
def template(name: str) -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters["clock"] = clock
    return made.get_template(name)


@cache
def _static(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def clock(seconds: float) -> str:
    """A length or position as minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def best_first(variations: Sequence[Json]) -> list[Json]:
    """Those with the highest rank first; those without one, of an older version, in their own order."""
    return sorted(variations, key=lambda one: -(one["scores"].get("rank") or 0.0))


def _source(source: Json, urls: Sequence[str]) -> Json:
    return {
        "urls": urls,
        "sha256": source["sha256"],
        "duration_s": source["duration_s"],
        "lufs": source["loudness_lufs"],
        "form": f"{source['codec']}, {source['sample_rate']} Hz, {source['channels']} channels",
    }


def _takes(manifest: Json, remake: Sequence[str]) -> list[dict[str, Any]]:
    variations = best_first(manifest["variations"])
    medians = {name: _median([of(one["scores"]) for one in variations]) for name, of in SCORES}
    return [_take(n, one, medians, remake) for n, one in enumerate(variations, 1)]


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return median(known) if known else 0.0


def _take(number: int, one: Json, medians: Mapping[str, float], remake: Sequence[str]) -> dict[str, Any]:
    scores = one["scores"]
    return {
        "number": number,
        "file": one["file"],
        "url": quote(one["file"]),
        "sha256": one["sha256"],
        "name": one["name"],
        "duration_s": one["duration_s"],
        "lufs": one["loudness_lufs"],
        "tempo_bpm": one["tempo_bpm"],
        "key": one["key"],
        "joins_s": [join["at_s"] for join in scores["joins"]],
        "scores": [
            {"name": name, "value": value, "median": medians[name]}
            for name, of in SCORES
            if (value := of(scores)) is not None
        ],
        "facts": list(_facts(one)),
        "failed": one.get("failed", []),
        "command": shlex.join([*remake[:-1], f"{remake[-1]}/{one['file']}"]),
    }


def _facts(one: Json) -> Iterator[tuple[str, str]]:
    """What is known of how a take was made, as labels and texts."""
    yield "engine", _made_by(one)
    yield "licence", one["license"]
    yield "commercial use", "no" if "NC" in one["license"] else "yes"
    yield "seed", str(one["seed"])
    for name in ("similarity", "transpose", "speed"):
        if name in one:
            yield f"{name} asked", f"{one[name]:g}"
    for name, value in one["params"].items():
        yield name, json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
    if "prompt" in one:
        yield "words of the prompt", one["prompt"]
    yield "loudness", f"{one['loudness_lufs']} LUFS, peak {one['peak_dbfs']} dBFS"


def _made_by(one: Json) -> str:
    model = f", {one['model']} at {(one['revision'] or '')[:15]}" if one["model"] else ""
    return f"{one['engine']} {one['version']}{model}"


def _rejected(manifest: Json) -> Iterator[dict[str, Any]]:
    """The takes that were made and not kept, each once."""
    kept, seen = {one["seed"] for one in manifest["variations"]}, set()
    for one in manifest["variations"]:
        for take in one.get("takes", ()):
            if take["seed"] not in kept and take["seed"] not in seen:
                seen.add(take["seed"])
                yield {
                    "name": one["name"],
                    "seed": take["seed"],
                    "similarity": take["measured"]["similarity"],
                    "why": "; ".join(take["failed"]) or "ranks lower than those that were kept",
                    "url": quote(take["file"]) if "sha256" in take else None,
                }
