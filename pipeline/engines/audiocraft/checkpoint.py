"""A checkpoint in audiocraft's format: `state_dict.bin` (the language model) and
`compression_state_dict.bin` (EnCodec), as `audiocraft.utils.export` writes them.

Both are pickles, which can run code when they are opened. So they are opened by torch's restricted
unpickler, which knows tensors and plain values and refuses all else; nothing is added to what it
allows. An exported checkpoint needs no more: its configuration, `xp.cfg`, is YAML in a string. One
fresh from training holds a pickled OmegaConf object instead, and is refused until it is exported.

The text encoder isn't part of a checkpoint, and the EnCodec of a fine-tuned one may be named only:
see `companion`.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engines.pretrained import first_line
from pipeline.errors import BadCheckpoint
from pipeline.weights import hub
from pipeline.weights.layout import Layout

LANGUAGE_MODEL, ENCODEC = "state_dict.bin", "compression_state_dict.bin"
FILES = (LANGUAGE_MODEL, ENCODEC)
T5_BASE = "google-t5/t5-base"  # what checkpoints call t5-base
HUB_NAMES = {"t5-small": "google-t5/t5-small", "t5-base": T5_BASE, "t5-large": "google-t5/t5-large"}


@dataclass(frozen=True, eq=False)
class Package:
    """One of a checkpoint's two files, read."""

    state: dict[str, Any]  # tensors by name
    config: Any  # omegaconf.DictConfig: what the model was built with


def missing(folder: Path) -> list[str]:
    """The files a checkpoint lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def check(folder: Path) -> None:
    """Raise BadCheckpoint unless both files are there and whole, as far as a look can tell."""
    if lacking := missing(folder):
        hint = ""
        if (folder / "config.json").is_file():
            hint = " (for a folder in transformers' format take the engine musicgen)"
        raise BadCheckpoint(
            f"{folder} is no checkpoint in audiocraft's format: {', '.join(lacking)} missing{hint}."
        )
    for name in FILES:
        if not zipfile.is_zipfile(folder / name):  # its directory is at the end
            raise BadCheckpoint(f"{folder / name} is cut off or wasn't written by torch.save: get it again.")


AUDIOCRAFT = Layout(FILES, missing, check)


def read(path: Path) -> dict[str, Any]:
    """A file's plain values and tensors; the tensors stay on the disk until they are used.

    Raises:
        BadCheckpoint: it is damaged, or holds anything else.
    """
    import pickle

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise BadCheckpoint(
            f"{path} holds more than tensors and settings, which is never loaded because it can run code: "
            f"export it with audiocraft.utils.export."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"{path} can't be read: {first_line(error)}.") from error
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{path} isn't a checkpoint of audiocraft's.")
    return found


def package(path: Path, content: dict[str, Any]) -> Package:
    """What `read` found in `path`, as a model's weights and configuration.

    Raises:
        BadCheckpoint: it isn't that.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    state, text = content.get("best_state"), content.get("xp.cfg")
    if not isinstance(state, dict) or not isinstance(text, str):
        raise BadCheckpoint(f"{path} isn't an exported checkpoint: export it with audiocraft.utils.export.")
    try:
        return Package(state, OmegaConf.create(text))
    except (OmegaConfBaseException, YAMLError) as error:
        raise BadCheckpoint(f"The configuration in {path} can't be read: {first_line(error)}.") from error


def companion(folder: Path, name: str, layout: Layout, cache_dir: Path | None) -> Path:
    """The folder of another model, `name`, that the checkpoint in `folder` refers to.

    That is `folder/name` if there is one, else what the hub's cache has under this name or the
    hub's own for it; else it is fetched.

    Raises:
        MissingWeights: it is not here, and not to be had now.
        BadCheckpoint: it is there but can't be used.
    """
    if (folder / name).is_dir():
        found = hub.locate(str(folder / name), layout=layout)
        assert found is not None  # a folder is usable or raises
        return found.folder
    hub_name = HUB_NAMES.get(name, name)
    for known in dict.fromkeys((hub_name, name)):
        if found := hub.locate(known, cache_dir=cache_dir, layout=layout):
            return found.folder
    return hub.fetch(hub_name, cache_dir=cache_dir, layout=layout).folder
