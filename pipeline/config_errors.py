"""What is wrong with a configuration, in words: the key path, what is allowed, the nearest known key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline.engines import cards
from pipeline.engines.base import EngineCard

_KINDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "too_short": "must have at least one entry",
}
_RANGES = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
_PATTERNS = {"cuda": "must be cpu, cuda or cuda:N", "x00": "can't begin with a dot or have slashes in it"}


def of_validation(e: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence for each key that is wrong; the branches of a union are joined by "or"."""
    found: dict[str, list[str]] = {}
    inputs: dict[str, str] = {}
    for error in e.errors():
        unknown = error["type"] == "extra_forbidden"
        named = error["loc"][-1:] if unknown else ()  # a key of the file, even if it is called "float"
        loc = (
            *(part for part in error["loc"][: -1 if unknown else None] if not _is_union_branch(part)),
            *named,
        )
        where = _path(loc)
        if error["type"] == "too_short" and error["input"]:
            continue  # the entries are wrong, each told on its own; pydantic counts only the good ones
        if unknown:
            found[where] = [f"unknown key{_nearest(str(loc[-1]), _allowed(model, loc[:-1]))}"]
        elif error["type"] == "missing":
            found[where] = ["is required"]
        else:
            found.setdefault(where, []).append(_words(error))
            inputs[where] = f", not {shown(error['input'])}"
    return [
        f"{where}: {' or '.join(dict.fromkeys(words))}{inputs.get(where, '')}"
        for where, words in found.items()
    ]


def of_engines(
    chosen: Mapping[str, str], *, variations: Sequence[Mapping[str, Any]], own_keys: set[str]
) -> list[str]:
    """Unknown engines, and variation parameters that no engine, or not the chosen one, would take.

    Args:
        chosen: engine name or "auto", by stage.
        variations: the engine parameters of each entry of `generate.variations`.
        own_keys: the keys an entry has whatever the engine.
    """
    problems = []
    for stage, engine in chosen.items():
        known = ["auto", *(card.name for card in cards().values() if card.stage == stage)]
        if engine not in known:
            problems.append(f"{stage}.engine: must be one of {', '.join(known)}, not {shown(engine)}")
    generators = [card for card in cards().values() if card.stage == "generate"]
    takers = [card for card in generators if card.is_meant_by(chosen["generate"])]
    known_keys = {key for card in generators for key in card.params.model_fields}
    for i, params in enumerate(variations):
        for key, value in params.items():
            where = f"generate.variations[{i}].{key}"
            if key not in known_keys:
                problems.append(f"{where}: unknown key{_nearest(key, known_keys | own_keys)}")
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
                yield f"{where}: {_words(e.errors()[0])} for {card.name}, not {shown(one)}"


def _words(error: Any) -> str:
    context = error.get("ctx", {})
    kind = error["type"]
    if kind in _KINDS:
        return _KINDS[kind]
    if kind in _RANGES:
        key, sign = _RANGES[kind]
        return f"must be {sign} {context[key]:g}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "string_pattern_mismatch":
        return next(words for part, words in _PATTERNS.items() if part in context["pattern"])
    return str(error["msg"][0].lower() + error["msg"][1:])


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
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
