"""Writes docs/configuration.md: every key of the configuration and every parameter of every engine.

    python docs/make_configuration.py

Types, ranges and defaults come from the models that check the configuration, meanings from the
comments of config/default.yaml and the descriptions of the engines' parameters. A test holds the
page against what this makes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel  # noqa: E402

from pipeline.config import Config  # noqa: E402
from pipeline.config.sweeps import SharedParams  # noqa: E402
from pipeline.engines import cards  # noqa: E402

INTRODUCTION = """\
# Configuration

Made by `python docs/make_configuration.py`; do not edit.

The configuration is a YAML file: `config/default.yaml` in the home folder, or the one given by
`--config`. It may hold just what differs from the defaults. Unknown keys are refused, with the
nearest known one. The environment variable `DEVICE` has precedence over `device`. `watch` reads the
file again on SIGHUP.

Merge keys (`<<: *base`) work, duplicate keys are
refused, and keys at the top level that begin with `x-` or a dot are ignored, so that they can hold
anchors.

## Keys
"""
PARAMETERS = """
## Variations

An entry of `generate.variations` has a `name`, and may have `count` (so many variations with seeds
of their own), `seed`, and any parameter below. A parameter that stands in a section named after an
engine (`musicgen: {temperature: 1.1}`) is for that engine alone, and wins there over one that stands
beside it. A parameter that the engine in use doesn't have is left aside, so that one file can serve
several engines.

Any parameter may have several values: a list, or a range `{low: 0.6, high: 1.2, steps: 3}`.
`expand` says how they are combined:

- `grid`, the default: every combination.
- `zip`: all first values together, then all second ones.
- `{random: 8, seed: 1}`: so many combinations drawn at random. Ranges need no steps here.

`keep: best 2 of 6` makes six takes of each combination and publishes the best two; `gates` in an entry has
the gates that differ from `gates` for all, where `null` means the same as there: see [scores.md](scores.md).

`plan` shows what a configuration expands to.

`--preset NAME` puts the settings of a preset above the configuration. There are {presets}, and every YAML
file in `config/presets/` of the home.
"""


def page() -> str:
    """The whole page."""
    schema = Config.model_json_schema()
    comments = _comments((ROOT / "config" / "default.yaml").read_text(encoding="utf-8"))
    presets = ", ".join(f"`{path.stem}`" for path in sorted((ROOT / "config" / "presets").glob("*.yaml")))
    parts = [INTRODUCTION, *_table(_keys(schema, schema, "", comments))]
    parts += [
        PARAMETERS.replace("{presets}", presets),
        "### Every engine\n",
        *_table(_parameters(SharedParams)),
    ]
    for card in cards().values():
        if card.stage == "generate":
            parts += [f"\n### {card.name}\n", *_table(_parameters(card.params))]
    return "\n".join(parts) + "\n"


def _keys(
    schema: Mapping[str, Any], whole: Mapping[str, Any], prefix: str, comments: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    for name, one in schema["properties"].items():
        key, field = f"{prefix}{name}", _resolved(one, whole)
        if "properties" in field:
            yield from _keys(field, whole, f"{key}.", comments)
        else:
            yield f"`{key}`", _allowed(field, whole), _default(key, one), comments[key]


def _parameters(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    schema = model.model_json_schema()
    for name, one in schema["properties"].items():
        yield f"`{name}`", _allowed(one, schema), _default(name, one), one["description"]


def _resolved(one: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    name = one.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = whole["$defs"][name] if name else one
    return found


def _allowed(one: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    one = _resolved(one, whole)
    if "anyOf" in one:
        return " or ".join(dict.fromkeys(_allowed(branch, whole) for branch in one["anyOf"]))
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if "const" in one:
        return f"`{one['const']}`"
    words = {"integer": "whole number", "number": "number", "string": "text", "array": "list"}
    words |= {"boolean": "`true`, `false`", "null": "`null`", "object": "mapping"}
    return words[one["type"]] + _range(one)


def _range(one: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {one[name]:g}" for name, sign in signs.items() if name in one]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(key: str, one: Mapping[str, Any]) -> str:
    if key in ("generate.variations", "intake.ignore"):
        return "see config/default.yaml"
    return f"`{json.dumps(one['default'], ensure_ascii=False)}`" if "default" in one else ""


def _comments(yaml: str) -> dict[str, str]:
    """The comment behind each key of a YAML file in block style, by the key's path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in yaml.splitlines():
        if not (match := re.match(r"( *)(\w+):([^#]*)(?:# ?(.*))?$", line)):
            continue
        indent = len(match[1])
        path = [*((at, name) for at, name in path if at < indent), (indent, match[2])]
        if match[4]:
            found[".".join(name for _, name in path)] = match[4].strip()
    return found


def _table(rows: Iterator[tuple[str, str, str, str]]) -> Iterator[str]:
    yield "| key | allowed | default | meaning |"
    yield "|---|---|---|---|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
