"""What the engines on transformers share: opening a checked folder's files, and nothing of the network.

Only safetensors are read, in float32, and no code of the folder is ever run.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from pipeline.errors import BadCheckpoint, EngineUnusable, MissingPackage
from pipeline.weights.hub import INSTALL_COMMAND
from pipeline.weights.layout import PREPROCESSORS


def check_folder(folder: Path, model_type: str, example: str) -> dict[str, Any]:
    """The folder's configuration, if it is a model of that type with its preprocessor's settings.

    Raises:
        BadCheckpoint: it isn't; the message names `example`, a model that would do.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        found = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{folder} has no readable config.json.") from error
    if found != model_type:
        raise BadCheckpoint(
            f"{folder} holds a {found!r} model; this engine needs {model_type!r}, such as {example}."
        )
    require_any(folder, PREPROCESSORS, "feature extractor")
    return dict(config)


def require_any(folder: Path, names: tuple[str, ...], what: str) -> None:
    """Raise BadCheckpoint unless one of these files is there."""
    if not any((folder / name).is_file() for name in names):
        raise BadCheckpoint(f"{folder} has no {what}: {' or '.join(names)} is missing.")


def import_packages(engine: str, *names: str) -> None:
    """Import what an engine needs; MissingPackage with the command that installs it, if that fails."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingPackage(
                f"The {engine} engine needs {error.name or name}: {INSTALL_COMMAND}."
            ) from error


def prepare(device: str, threads: int | None) -> None:
    """Settle what is the whole process's: torch's threads (None: as they are), transformers' silence.

    Raises:
        EngineUnusable: see `check_device`.
    """
    check_device(device)
    import torch
    import transformers

    # Its bars and hints would end up between the lines of a log; what matters is raised.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def check_device(device: str) -> None:
    """Open a device of torch.

    Raises:
        EngineUnusable: torch can't be imported, or there is no such device.
    """
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries can't be loaded
        raise EngineUnusable(f"torch can't be imported ({first_line(error)}): {INSTALL_COMMAND}.") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EngineUnusable(
            f"device: {device} can't be used ({first_line(error)}); set it to cpu, or install "
            f"the build of torch for this machine's GPU."
        ) from error


def load_model(model_class: Any, folder: Path, device: str, **options: Any) -> Any:
    """A transformers model from a folder: float32, in eval mode, on the device.

    `options` go to the class's from_pretrained.

    Raises:
        BadCheckpoint: it can't be loaded, or not every weight of the model is there.
    """
    import torch

    options |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = _load(model_class, folder, **options)
    lacking = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if lacking:
        raise BadCheckpoint(f"{folder} lacks {len(lacking)} of the model's weights, such as {lacking[0]}.")
    return model.eval().to(device)


def load_part(part_class: Any, folder: Path) -> Any:
    """A transformers configuration, processor, feature extractor or tokenizer from a folder.

    Raises:
        BadCheckpoint: it can't be loaded.
    """
    return _load(part_class, folder)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a full stop: for a sentence of ours."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)


def _load(loaded_class: Any, folder: Path, **options: Any) -> Any:
    try:
        return loaded_class.from_pretrained(folder, local_files_only=True, **options)
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file the libraries raise anything, KeyError included
        raise BadCheckpoint(f"{folder} can't be loaded: {first_line(error)}.") from error
