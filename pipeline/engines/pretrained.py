"""Loading of models for the engines on transformers, from a local folder and without the network.

Weights are read from safetensors only, in float32, and no code in the folder is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import BadCheckpoint, EngineUnusable, PipelineError
from pipeline.weights.hub import INSTALL_COMMAND
from pipeline.weights.layout import read_json


def check_folder(folder: Path, model_type: str, example: str) -> dict[str, Any]:
    """The configuration of a model's folder.

    Raises:
        BadCheckpoint: the model is of another type. The message names `example`, a model that can be used.
    """
    config = read_json(folder / "config.json")
    if (found := config.get("model_type")) != model_type:
        raise BadCheckpoint(
            f"{folder} holds a {found!r} model; this engine needs {model_type!r}, such as {example}."
        )
    return config


def prepare(device: str, threads: int | None) -> None:
    """Set what holds for the whole process: the number of torch's threads (None: unchanged), quiet logging.

    A GPU with a number becomes the current one of this thread.

    Raises:
        EngineUnusable: see `check_device`.
    """
    check_device(device)
    import torch
    import transformers

    if ":" in device:
        # Kernels of Triton and graphs run on the current one, which is the first GPU otherwise.
        torch.cuda.set_device(device)
    # Its progress bars and hints would appear between the lines of a log; errors are raised.
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
    """Load a transformers model in float32 and eval mode; `options` are passed to from_pretrained.

    Raises:
        BadCheckpoint: it can't be loaded, or weights of the model are missing.
    """
    import torch

    options |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = load_part(model_class, folder, **options)
    lacking = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if lacking:
        raise BadCheckpoint(f"{folder} lacks {len(lacking)} of the model's weights, such as {lacking[0]}.")
    return model.eval().to(device)


def load_part(part_class: Any, folder: Path, **options: Any) -> Any:
    """Load a transformers configuration, processor, feature extractor, tokenizer or model.

    Raises:
        BadCheckpoint: it can't be loaded.
    """
    with reading(folder):
        return part_class.from_pretrained(folder, local_files_only=True, **options)


@contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[None]:
    """Name the file in an error; for damaged files the libraries raise errors of any type."""
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadCheckpoint(f"{path} can't be used ({reason}){remedy}.") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop, as part of a sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)
