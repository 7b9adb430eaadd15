"""Loading of checkpoints in audiocraft's format, with audiocraft's builders and without its downloads."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engines import pretrained
from pipeline.engines.audiocraft import INSTALL_COMMAND, PACKAGES
from pipeline.engines.audiocraft.checkpoint import (
    ENCODEC,
    LANGUAGE_MODEL,
    Package,
    companion,
    package,
    read,
)
from pipeline.errors import BadCheckpoint, MissingPackage
from pipeline.weights.hub import Weights
from pipeline.weights.layout import TEXT_ENCODER, TRANSFORMERS

CONDITIONERS = {"self_wav": "chroma_stem", "description": "t5"}  # those of MusicGen-Melody
PROMPT_WEIGHTS = "condition_provider.conditioners.description.output_proj.weight"
BROKEN_CONFIGURATION = (AttributeError, LookupError, TypeError, ValueError, AssertionError)
MELODY_CHECKPOINT = "such as facebook/musicgen-melody"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded model. It has no state of a request."""

    weights: Weights  # where it was loaded from
    language_model: Any  # audiocraft.models.LMModel, in eval mode
    encodec: Any  # audiocraft.models.CompressionModel, in eval mode
    device: str


def load_checkpoint(
    weights: Weights, device: str = "cpu", threads: int | None = None, *, cache_dir: Path | None = None
) -> Checkpoint:
    """Load a checkpoint in float32 on the CPU and in float16 on a GPU, as audiocraft does.

    `threads` sets torch's threads for the whole process; None leaves them. `cache_dir` is the hub's cache,
    for models that the checkpoint refers to.

    Raises:
        BadCheckpoint: it is another kind of model, or files are missing, damaged or contain code.
        MissingWeights: it refers to an EnCodec that is not on this machine and can't be downloaded now.
        MissingPackage: a package is not installed.
        EngineUnusable: the device can't be used.
    """
    import_packages()
    pretrained.prepare(device, threads)
    import torch

    open_t5 = functools.partial(_open_t5, weights.folder, device, cache_dir)
    # The builders draw random weights before those of the checkpoint replace them.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # audiocraft uses functions that torch has since deprecated
        language_model = _language_model(weights.folder / LANGUAGE_MODEL, device, open_t5)
        encodec = _encodec(weights.folder / ENCODEC, device, cache_dir)
    return Checkpoint(weights, language_model, encodec, device)


def import_packages() -> None:
    """Import all packages; raises MissingPackage with the commands that install them."""
    # xformers warns that its kernels for GPUs are disabled; they are not used here.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    for name in (*PACKAGES, "audiocraft.models"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        except ImportError as error:
            raise MissingPackage(
                f"The audiocraft engine needs {error.name or name}: {INSTALL_COMMAND}"
            ) from error


def _language_model(path: Path, device: str, open_t5: Callable[[str], Any]) -> Any:
    from audiocraft.models import builders
    from audiocraft.modules.conditioners import ConditioningProvider

    found = package(path, read(path))
    config = found.config
    with _reading(path):
        conditioners = _conditioners(path, found, device, open_t5)
        config.device = device
        config.dtype = "float32" if device == "cpu" else "float16"
        config.conditioners = {}  # those of audiocraft would download models; ours replace them below
        # Without this, drawing random weights takes minutes.
        config.transformer_lm.update(weight_init=None, depthwise_init=None, zero_bias_init=False)
        model = builders.get_lm_model(config)
    model.condition_provider = ConditioningProvider(conditioners, device=device).to(device)
    model.cfg = config  # from which MusicGen takes the length of a window and stereo
    return _fill(model, found, path)


def _conditioners(path: Path, found: Package, device: str, open_t5: Callable[[str], Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from pipeline.engines.audiocraft.conditioners import MixChromaConditioner, PromptConditioner

    wanted = OmegaConf.to_container(found.config.conditioners, resolve=True)
    wanted.pop("args", None)  # for training
    if {name: settings["model"] for name, settings in wanted.items()} != CONDITIONERS:
        raise BadCheckpoint(
            f"{path} is not conditioned on a melody and a prompt: use one that is, {MELODY_CHECKPOINT}."
        )
    dim = found.config.transformer_lm.dim
    t5 = wanted["description"]["t5"]
    return {
        "self_wav": MixChromaConditioner(
            dim, found.config.dataset.segment_duration, device, **wanted["self_wav"]["chroma_stem"]
        ),
        "description": PromptConditioner(
            found.state[PROMPT_WEIGHTS].shape[1],
            dim,
            device,
            normalize_text=t5.get("normalize_text", False),
            open_t5=functools.partial(open_t5, t5["name"]),
        ),
    }


def _encodec(path: Path, device: str, cache_dir: Path | None) -> Any:
    from audiocraft.models import HFEncodecCompressionModel, builders

    content = read(path)
    if "pretrained" in content:  # fine-tuned checkpoints have a name in the place of weights
        import transformers

        folder = companion(path.parent, str(content["pretrained"]), TRANSFORMERS, cache_dir)
        model = pretrained.load_model(transformers.EncodecModel, folder, device)
        return HFEncodecCompressionModel(model).eval()
    found = package(path, content)
    with _reading(path):
        found.config.device = device
        model = builders.get_compression_model(found.config)
    return _fill(model, found, path)


def _open_t5(folder: Path, device: str, cache_dir: Path | None, name: str) -> tuple[Any, Any]:
    import torch
    import transformers

    where = companion(folder, name, TEXT_ENCODER, cache_dir)
    # This happens during the first request with a prompt, and must not change what that request draws.
    with torch.random.fork_rng(devices=[]):
        tokenizer = pretrained.load_part(transformers.T5Tokenizer, where)
        return tokenizer, pretrained.load_model(transformers.T5EncoderModel, where, device)


def _fill(model: Any, found: Package, path: Path) -> Any:
    """The model with the checkpoint's weights, in eval mode; the names of all weights have to agree."""
    try:
        model.load_state_dict(found.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpoint(f"The weights in {path} don't fit its configuration: {reason}") from error
    return model.eval()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of audiocraft's builders about the configuration into BadCheckpoint."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (*BROKEN_CONFIGURATION, OmegaConfBaseException) as error:
        reason = f"{type(error).__name__}: {pretrained.first_line(error)}"
        raise BadCheckpoint(f"The configuration in {path} can't be used ({reason}).") from error
