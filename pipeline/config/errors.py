"""What is wrong with a configuration, as sentences with the key path, what is allowed and the nearest key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from yaml import MarkedYAMLError

from pipeline.config.sweeps import Range, SharedParams, choices, expand
from pipeline.engines import cards
from pipeline.engines.base import EngineCard

_PATTERNS = {  # by a part of the pattern; the first that matches counts
    "cuda": "must be cpu, cuda or cuda:N",
    r"^\.": "must begin with a dot and have no slash, such as .done",
    r"^[^./": "must not begin with a dot or contain a slash or control character",
    r"^[^\x00]": "must not contain a NUL character",
    "^best ": "must be as in: best 2 of 6",
    "^(auto|": "must be auto or host:port",
    "[0-9a-f]{64}": "must be a SHA-256 of 64 hexadecimal digits",
}

EMPTY = ("too_short", "string_too_short")  # errors of pydantic


def of_validation(e: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence for each key that is wrong; the branches of a union are joined by "or"."""
    found: dict[str, list[str]] = {}
    inputs: dict[str, str] = {}
    for error in e.errors():
        *parents, last = error["loc"] or ("",)
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
            is_empty = error["type"] in EMPTY
            inputs[where] = "" if is_empty else f", not {shown(error['input'])}{_hint(error)}"
    return [
        f"{where}: {' or '.join(dict.fromkeys(words))}{inputs.get(where, '')}"
        for where, words in found.items()
    ]


def of_engines(engines: Mapping[str, str], variations: Sequence[BaseModel]) -> list[str]:
    """Unknown engines, and variation parameters that no engine, or not the chosen one, would take.

    Args:
        engines: by stage, an engine's name or "auto", for the judge "none".
        variations: the entries of `generate.variations`, with the engine's parameters as extra fields.
    """
    problems = []
    for stage, engine in engines.items():
        instead = "none" if stage == "judge" else "auto"
        known = [instead, *(card.name for card in cards().values() if card.stage == stage)]
        if engine not in known:
            problems.append(f"{stage}.engine: must be one of {', '.join(known)}, not {shown(engine)}")
    generators = [card for card in cards().values() if card.stage == "generate"]
    takers = [card for card in generators if card.is_meant_by(engines["generate"])]
    for i, spec in enumerate(variations):
        where = f"generate.variations[{i}]"
        found = [*_of_params(where, spec, generators, takers), *_of_keep(f"{where}.keep", spec)]
        problems += dict.fromkeys(found or _of_expansion(where, spec, takers))
    return problems


def of_executor(executor: Any, device: str) -> list[str]:
    """What does not go together in `executor`, and with the device."""
    asked = executor.resources_per_worker
    if executor.kind != "ray":
        given = {"address": executor.address != "auto", "resources_per_worker": asked != type(asked)()}
        return [f"executor.{key}: is for kind: ray alone" for key, is_given in given.items() if is_given]
    problems = []
    if ":" in device:
        problems.append(
            f"device: must be cpu or cuda with executor: ray, which chooses the GPU, not {device}"
        )
    if device == "cpu" and asked.gpu:
        problems.append("executor.resources_per_worker.gpu: no engine would use it, since device is cpu")
    if device != "cpu" and asked.gpu == 0:
        problems.append(f"executor.resources_per_worker.gpu: must be above 0, since device is {device}")
    return problems


def of_normalize(settings: Any) -> list[str]:
    """What does not go together in `normalize`."""
    least, most = settings.min_duration_s, settings.max_duration_s
    return [f"normalize.max_duration_s: {most:g} is below min_duration_s, {least:g}"] if most < least else []


def of_output(output: Any) -> list[str]:
    """What does not go together in `output`, and what its format or the installed PyAV can't do."""
    if output.loop and (output.fade_in_s or output.fade_out_s):
        return ["output.loop: a loop has no fades, so fade_in_s and fade_out_s must be 0"]
    if output.format == "wav":
        return []
    from pipeline import audio

    if missing := audio.missing_encoder(output.format):
        return [f"output.format: the installed av (PyAV) has no encoder {missing}, so take another format"]
    problems = []
    rates = audio.sample_rates(output.format)
    if output.sample_rate and rates and output.sample_rate not in rates:
        known = ", ".join(map(str, rates))
        problems.append(f"output.sample_rate: {output.format} has {known}, not {output.sample_rate}")
    if output.format == "flac" and output.bit_depth == "float":
        problems.append("output.bit_depth: flac has 16 or 24 bits")
    return problems


def _of_params(
    where: str, spec: BaseModel, generators: Sequence[EngineCard], takers: Sequence[EngineCard]
) -> Iterator[str]:
    """What is wrong with an entry's parameters, those that stand flat and those in an engine's section."""
    sections = {card.name: card for card in generators}
    for key, value in (spec.model_extra or {}).items():
        path = f"{where}.{key}"
        if key in sections:
            yield from _of_section(path, value, sections[key])
        elif key in SharedParams.model_fields:
            yield from _of_values(path, key, value, {"": SharedParams})
        elif any(key in card.params.model_fields for card in generators):
            own = {f" for {card.name}": card.params for card in takers if key in card.params.model_fields}
            yield from _of_values(path, key, value, own)
        else:
            known = {*sections, *SharedParams.model_fields, *type(spec).model_fields}
            known.update(name for card in generators for name in card.params.model_fields)
            yield f"{path}: unknown key{_nearest(key, known)}"
        if key == "similarity":
            without = [card.name for card in takers if card.params_of_similarity is None]
            yield from (f"{path}: {name} has no parameters for it" for name in without)


def _of_keep(where: str, spec: Any) -> Iterator[str]:
    kept, tried = spec.best_of
    if kept > tried:
        yield f"{where}: can't keep {kept} of {tried}"
    if spec.keep and spec.count > 1:
        yield f"{where}: says how many results there are, so there can't be a count as well"


def _of_section(where: str, section: Any, card: EngineCard) -> Iterator[str]:
    if not isinstance(section, dict):
        yield f"{where}: must be a mapping of parameters, not {shown(section)}"
        return
    for key, value in section.items():
        if key in card.params.model_fields:
            yield from _of_values(f"{where}.{key}", key, value, {"": card.params})
        else:
            yield f"{where}.{key}: unknown key{_nearest(str(key), set(card.params.model_fields))}"


def _of_values(where: str, key: str, value: Any, models: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    """What is wrong with a parameter's values; `models` check them, by words that say for whom."""
    try:
        found = choices(value)
    except ValidationError:
        yield f"{where}: must be a value, a list or a range {{low, high, steps}}, not {shown(value)}"
        return
    if found == []:
        yield f"{where}: an empty list sweeps over nothing"
    for whom, model in models.items():
        for one in [found.low, found.high] if isinstance(found, Range) else found:
            try:
                model.model_validate({key: one}, strict=True)
            except ValidationError as e:
                words = " or ".join(dict.fromkeys(_words(error) for error in e.errors()))
                yield f"{where}: {words}{whom}, not {shown(one)}{_hint(e.errors()[0])}"


def _of_expansion(where: str, spec: BaseModel, takers: Sequence[EngineCard]) -> Iterator[str]:
    for card in takers:
        try:
            expand(spec.model_extra or {}, spec.expand, card)  # type: ignore[attr-defined]
        except ValidationError:
            raise
        except ValueError as e:
            yield f"{where}.expand: {e}"


def _words(error: Any) -> str:
    if error["type"] in ("model_type", "model_attributes_type"):
        return "must be a mapping of keys"
    if error["type"] == "string_pattern_mismatch":
        return next(words for part, words in _PATTERNS.items() if part in error["ctx"]["pattern"])
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in EMPTY:
        return "must not be empty"
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
        part in ("float", "int", "str", "Random") or part.startswith(("literal[", "constrained"))
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
