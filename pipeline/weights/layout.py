"""A model's folder: which files are loaded from it, and whether they are whole.

In transformers' format, which all functions here are about unless they are given another layout,
only safetensors count as weights: a pickle (`.bin`, `.pt`) can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import BadCheckpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
LOADED_FILES = (
    *("config.json", "generation_config.json", *PREPROCESSORS),
    *(WEIGHTS, INDEX, "model-*-of-*.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.json", "merges.txt"),
)

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
SMALL_FILE_BYTES = 4 << 20  # files up to this size go into a fingerprint whole
BLOCK_BYTES, BLOCKS = 1 << 16, 16  # what of a larger one does, evenly spaced


def missing(folder: Path, *, hears: bool = True) -> list[str]:
    """The files a checkpoint lacks of its config, weights and preprocessor settings.

    Models that don't hear (`hears`), such as text encoders, have no preprocessor.

    Raises:
        BadCheckpoint: the index of its shards isn't one.
    """
    lacking = [name for name in ("config.json", *_shards(folder)) if not (folder / name).is_file()]
    if hears and not any((folder / name).is_file() for name in PREPROCESSORS):
        lacking.append(PREPROCESSORS[0])
    return lacking


def check(folder: Path, *, hears: bool = True) -> None:
    """Raise BadCheckpoint, saying what is missing or damaged, unless `folder` can be loaded."""
    if lacking := missing(folder, hears=hears):
        if lacking[0] == "config.json":
            raise BadCheckpoint(f"{folder} has no config.json, so it isn't a model's folder.")
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if WEIGHTS in lacking and pickles:
            raise BadCheckpoint(
                f"{folder} has only pickled weights ({pickles[0]}), which are never loaded "
                f"because they can run code: convert them to {WEIGHTS}."
            )
        raise BadCheckpoint(f"{folder} is incomplete: {', '.join(lacking)} missing.")
    for name in _shards(folder):
        try:
            _check_safetensors(folder / name)
        except OSError as error:
            raise BadCheckpoint(f"{folder / name} can't be read: {error.strerror}.") from error


@dataclass(frozen=True)
class Layout:
    """A format of models' folders."""

    files: tuple[str, ...]  # what is loaded, by name or pattern: nothing else of a hub's is downloaded
    missing: Callable[[Path], list[str]]  # the files a folder lacks; empty: none
    check: Callable[[Path], None]  # raises BadCheckpoint unless the folder can be loaded


TRANSFORMERS = Layout(LOADED_FILES, missing, check)
TEXT_ENCODER = Layout(LOADED_FILES, partial(missing, hears=False), partial(check, hears=False))


def fingerprint(folder: Path, files: tuple[str, ...] = LOADED_FILES) -> str:
    """A quick identity of a local checkpoint: "sha256:" and 16 hex digits.

    Over the names and sizes of the files a model is loaded from, the whole of those up to 4 MiB,
    and of larger ones the first 64 KiB, the last and 14 between, evenly spaced. Made to notice
    another checkpoint in the same folder, fine-tuned ones included; not an integrity check.
    """
    digest = hashlib.sha256()
    for path in sorted(_loaded_files(folder, files)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset, length in _sampled(size):
                file.seek(offset)
                digest.update(file.read(length))
    return f"sha256:{digest.hexdigest()[:16]}"


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; BadCheckpoint if it isn't one."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is not readable JSON.") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} is not a JSON object.")
    return value


def _check_safetensors(path: Path) -> None:
    """The header's offsets must end where the file does: a cheap test for a cut-off download."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(size - 8, MAX_HEADER_BYTES):
            raise BadCheckpoint(f"{path} is cut off or not a safetensors file.")
        try:
            header = json.loads(file.read(header_bytes))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise BadCheckpoint(f"{path} is not a safetensors file.") from error
    if size != 8 + header_bytes + end:
        raise BadCheckpoint(
            f"{path} is cut off or damaged: it has {size} bytes of {8 + header_bytes + end}; "
            f"delete it and get it again."
        )


def _sampled(size: int) -> list[tuple[int, int]]:
    if size <= SMALL_FILE_BYTES:
        return [(0, size)]
    last = size - BLOCK_BYTES
    return [(last * i // (BLOCKS - 1), BLOCK_BYTES) for i in range(BLOCKS)]


def _loaded_files(folder: Path, files: tuple[str, ...]) -> set[Path]:
    return {path for pattern in files for path in folder.glob(pattern) if path.is_file()}


def _shards(folder: Path) -> list[str]:
    """Names of the safetensors files a model is loaded from, in the library's order of preference."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    index = read_json(folder / INDEX)
    names = sorted(set(index["weight_map"].values())) if isinstance(index.get("weight_map"), dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise BadCheckpoint(f"{INDEX} in {folder} doesn't name the weights' files.")
    return names
