"""A checkpoint in audiocraft's format: `state_dict.bin` (the language model) and
`compression_state_dict.bin` (EnCodec), as `audiocraft.utils.export` writes them.

Both are pickles, which can run code when they are opened. So they are opened with torch's restricted
unpickler, which allows tensors and plain values only. That is enough for an exported checkpoint, whose
configuration, `xp.cfg`, is YAML in a string. A checkpoint straight from training has a pickled OmegaConf
object instead, and is refused until it is exported.

The text encoder is not part of a checkpoint, and a fine-tuned checkpoint may have the name of an EnCodec
model in the place of its weights: see `companion`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from pipeline.errors import BadCheckpoint
from pipeline.weights import hub
from pipeline.weights.layout import Layout

LANGUAGE_MODEL, ENCODEC = "state_dict.bin", "compression_state_dict.bin"
FILES = (LANGUAGE_MODEL, ENCODEC)
T5_BASE = "google-t5/t5-base"  # named t5-base in checkpoints
HUB_NAMES = {"t5-small": "google-t5/t5-small", "t5-base": T5_BASE, "t5-large": "google-t5/t5-large"}


def missing(folder: Path) -> list[str]:
    """The files a checkpoint lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def check(folder: Path) -> None:
    """Raise BadCheckpoint unless both files exist and are archives with a complete directory."""
    if lacking := missing(folder):
        hint = ""
        if (folder / "config.json").is_file():
            hint = " (for a folder in transformers' format use the engine musicgen)"
        raise BadCheckpoint(
            f"{folder} is not a checkpoint in audiocraft's format: {', '.join(lacking)} missing{hint}."
        )
    for name in FILES:
        if not zipfile.is_zipfile(folder / name):  # its directory is at the end
            raise BadCheckpoint(
                f"{folder / name} is cut off or was not written by torch.save: download it again."
            )


AUDIOCRAFT = Layout(FILES, missing, check)


def read(path: Path) -> dict[str, Any]:
    """Read a file's plain values and tensors; tensors are mapped into memory and read when they are used.

    Raises:
        BadCheckpoint: it contains objects of other types.
    """
    import pickle

    import torch

    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except pickle.UnpicklingError as error:
        raise BadCheckpoint(
            f"{path} contains more than tensors and settings, which is never loaded because it can run code: "
            f"export it with audiocraft.utils.export."
        ) from error


def companion(folder: Path, name: str) -> Path:
    """The folder of another model, `name`, that the checkpoint in `folder` refers to.

    That is `folder/name` if it exists, otherwise the model of that name, or of the hub's name for it, in
    the hub's cache. A model that is not there is downloaded.

    Raises:
        MissingWeights: it is not on this machine and can't be downloaded now.
        BadCheckpoint: it can't be used.
    """
    if (folder / name).is_dir():
        return hub.find_or_fetch(str(folder / name)).folder
    if found := hub.locate(name):
        return found.folder
    return hub.find_or_fetch(HUB_NAMES.get(name, name)).folder
