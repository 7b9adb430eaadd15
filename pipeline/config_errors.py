"""What is wrong with a configuration, as sentences with the key path, what is allowed and the nearest key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from yaml import MarkedYAMLError

from pipeline.engines import cards
from pipeline.engines.base import EngineCard

_PATTERNS = {  # by a part of the pattern; the first that matches counts
    "cuda": "must be cpu, cuda or cuda:N",
    r"^\.": "must begin with a dot and have no slash, such as .done",
    r"^[^./": "must not begin with a dot or contain a slash or control character",
    r"^[^\x00]": "must not contain a NUL character",
}


def of_validation(e: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence for each key that is wrong; the branches of a union are joined by "or"."""
    found: dict[str, list[str]] = {}
    inputs: dict[str, str] = {}
    for error in e.errors():
        *parents, last = error["loc"]
        unknown = error["type"] == "extra_forbidden"  # then `last` is a key, even if it is "float"
        loc = [part for part in parents if not _is_union_branch(part)]
        if unknown or not _is_union_branch(last):
            loc.append(last)
        where = _path(loc)
        if error["type"] == "too_short" and error["input"]:
            continue  # pydantic counts only the valid entries; each invalid one has an error of its own
        if unknown:
            found[where] = [f"unknown key{_nearest(str(loc[-1]), _allowed(model, loc[:-1]))}"]
        elif error["type"] == "missing":
            found[where] = ["is required"]
        else:
            found.setdefault(where, []).append(_words(error))
            inputs[where] = f", not {shown(error['input'])}{_hint(error)}"
    return [
        f"{where}: {' or '.join(dict.fromkeys(words))}{inputs.get(where, '')}"
        for where, words in found.items()
    ]


def of_engines(embed: str, generate: str, variations: Sequence[BaseModel]) -> list[str]:
    """Unknown engines, and variation parameters that no engine, or not the chosen one, would take.

    Args:
        embed, generate: engine name or "auto".
        variations: the entries of `generate.variations`, with the engine's parameters as extra fields.
    """
    problems = []
    for stage, engine in (("embed", embed), ("generate", generate)):
        known = ["auto", *(card.name for card in cards().values() if card.stage == stage)]
        if engine not in known:
            problems.append(f"{stage}.engine: must be one of {', '.join(known)}, not {shown(engine)}")
    generators = [card for card in cards().values() if card.stage == "generate"]
    takers = [card for card in generators if card.is_meant_by(generate)]
    known_keys = {key for card in generators for key in card.params.model_fields}
    for i, spec in enumerate(variations):
        for key, value in (spec.model_extra or {}).items():
            where = f"generate.variations[{i}].{key}"
            if key not in known_keys:
                nearest = _nearest(key, {*known_keys, *type(spec).model_fields})
                problems.append(f"{where}: unknown key{nearest}")
            elif value == []:
                problems.append(f"{where}: an empty list sweeps over nothing")
            else:
                problems.extend(dict.fromkeys(_of_param(where, key, value, takers)))
    return problems


def _of_param(where: str, key: str, value: Any, takers: Sequence[EngineCard]) -> Iterator[str]:
    for card in takers:
        if key not in card.params.model_fields:
            continue
        for one in value if isinstance(value, list) else [value]:
            try:
                card.params.model_validate({key: one}, strict=True)
            except ValidationError as e:
                error = e.errors()[0]
                yield f"{where}: {_words(error)} for {card.name}, not {shown(one)}{_hint(error)}"


def _words(error: Any) -> str:
    if error["type"] in ("model_type", "model_attributes_type"):
        return "must be a mapping of keys"
    if error["type"] == "string_pattern_mismatch":
        return next(words for part, words in _PATTERNS.items() if part in error["ctx"]["pattern"])
    return re.sub(r"^\w+ should ", "must ", str(error["msg"])).replace("valid tuple", "list")


def _hint(error: Any) -> str:
    """What to do about a value that YAML reads as another type than its author meant."""
    is_unquoted = error["type"] == "string_type" and isinstance(error["input"], bool | int | float | date)
    return ": put it in quotes" if is_unquoted else ""


def of_yaml(e: MarkedYAMLError) -> str:
    """Where the syntax is wrong and why, as one sentence."""
    mark = f"line {e.problem_mark.line + 1}, column {e.problem_mark.column + 1}: " if e.problem_mark else ""
    if e.problem and r"'\t'" in e.problem:
        return f"{mark}YAML does not allow tabs here: use spaces"
    return mark + ", ".join(filter(None, (e.context, e.problem)))


def _path(loc: Sequence[int | str]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or "the top level"


def _is_union_branch(part: int | str) -> bool:
    """pydantic names the tried branch of a union in the location; no key of ours looks like these."""
    return isinstance(part, str) and (
        part in ("float", "int", "str") or part.startswith(("literal[", "constrained"))
    )


def _allowed(model: Any, loc: Sequence[int | str]) -> set[str]:
    for part in loc:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            nested = (annotation, *get_args(annotation))
            model = next(a for a in nested if isinstance(a, type) and issubclass(a, BaseModel))
    return set(model.model_fields)


def _nearest(key: str, allowed: set[str]) -> str:
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
    listed = f"allowed: {', '.join(sorted(allowed))}"
    return f"; did you mean {near[0]!r}? ({listed})" if near else f" ({listed})"


def shown(value: object) -> str:
    """A value as JSON, cut to one short line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
