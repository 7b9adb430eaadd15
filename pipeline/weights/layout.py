"""The files of a model's folder, and checks that they are complete.

Folders are in transformers' format unless another `Layout` is given. Only safetensors count as
weights there, because a pickle (`.bin`, `.pt`) can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
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
SMALL_FILE_BYTES = 4 << 20  # smaller files are in a fingerprint completely
BLOCK_BYTES, BLOCKS = 1 << 16, 16  # of larger files, evenly spaced


def missing(folder: Path) -> list[str]:
    """The names of the config, weights and preprocessor settings that a checkpoint lacks.

    Raises:
        BadCheckpoint: the config or the index of its shards is not valid.
    """
    lacking = [name for name in ("config.json", *_shards(folder)) if not (folder / name).is_file()]
    has_preprocessor = any((folder / name).is_file() for name in PREPROCESSORS)
    if not lacking and not has_preprocessor and read_json(folder / "config.json").get("model_type") != "t5":
        lacking.append(PREPROCESSORS[0])  # a text encoder has none
    return lacking


def check(folder: Path) -> None:
    """Raise BadCheckpoint with what is missing or damaged, unless `folder` can be loaded."""
    if lacking := missing(folder):
        if lacking[0] == "config.json":
            raise BadCheckpoint(f"{folder} has no config.json, so it is not a model's folder.")
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if WEIGHTS in lacking and pickles:
            raise BadCheckpoint(
                f"{folder} has only pickled weights ({pickles[0]}), which are never loaded "
                f"because they can run code: convert them to {WEIGHTS}."
            )
        raise BadCheckpoint(f"{folder} is incomplete: {', '.join(lacking)} missing.")
    for name in _shards(folder):
        check_safetensors(folder / name)


@dataclass(frozen=True)
class Layout:
    """A format of models' folders."""

    files: tuple[str, ...]  # names or patterns of the files that are loaded; only these are downloaded
    missing: Callable[[Path], list[str]]  # names of the files that a folder lacks
    check: Callable[[Path], None]  # raises BadCheckpoint unless the folder can be loaded


TRANSFORMERS = Layout(LOADED_FILES, missing, check)


def fingerprint(folder: Path, files: tuple[str, ...] = LOADED_FILES) -> str:
    """A fast identity of a local checkpoint: "sha256:" and 16 hex digits.

    The digest is over the names and sizes of the files that are loaded, all bytes of files up to 4 MiB,
    and 16 blocks of 64 KiB of larger ones, evenly spaced from the first to the last. It notices another
    checkpoint in the same folder, a fine-tuned one included, but is no integrity check.
    """
    digest = hashlib.sha256()
    loaded = {path for pattern in files for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(loaded):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset, length in _sampled(size):
                file.seek(offset)
                digest.update(file.read(length))
    return f"sha256:{digest.hexdigest()[:16]}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises BadCheckpoint if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is not readable JSON.") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} is not a JSON object.")
    return value


def check_safetensors(path: Path) -> None:
    """Check that the header's offsets end where the file does, which finds downloads that were cut off.

    Raises:
        BadCheckpoint: they do not, or the file can't be read.
    """
    try:
        _check_safetensors(path)
    except OSError as error:
        raise BadCheckpoint(f"{path} can't be read: {error.strerror}.") from error


def _check_safetensors(path: Path) -> None:
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
            f"delete it and download it again."
        )


def _sampled(size: int) -> list[tuple[int, int]]:
    if size <= SMALL_FILE_BYTES:
        return [(0, size)]
    last = size - BLOCK_BYTES
    return [(last * i // (BLOCKS - 1), BLOCK_BYTES) for i in range(BLOCKS)]


def _shards(folder: Path) -> list[str]:
    """Names of the safetensors files a model is loaded from, in the library's order of preference."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    index = read_json(folder / INDEX)
    names = sorted(set(index["weight_map"].values())) if isinstance(index.get("weight_map"), dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise BadCheckpoint(f"{INDEX} in {folder} does not name the files of the weights.")
    return names
