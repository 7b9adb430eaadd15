"""Opening a checkpoint in audiocraft's format, with audiocraft's builders and nothing of the network."""

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
    """A loaded model. Nothing of a request is ever kept on it."""

    weights: Weights  # where it was loaded from
    language_model: Any  # audiocraft.models.LMModel, in eval mode
    encodec: Any  # audiocraft.models.CompressionModel, in eval mode
    device: str


def load_checkpoint(
    weights: Weights, device: str = "cpu", threads: int | None = None, *, cache_dir: Path | None = None
) -> Checkpoint:
    """Load a checkpoint: float32 on the CPU, float16 on a GPU, as audiocraft does.

    `threads` is torch's, for the whole process; None leaves it. `cache_dir` is where the hub's
    models are kept that the checkpoint refers to.

    Raises:
        BadCheckpoint: another kind of model, or files are missing, damaged or hold code.
        MissingWeights: it names an EnCodec that is not here, and not to be had now.
        MissingPackage: a package isn't installed.
        ConfigError: there is no such device.
    """
    import_packages()
    pretrained.prepare(device, threads)
    import torch

    open_t5 = functools.partial(_open_t5, weights.folder, device, cache_dir)
    # Building fills all weights at random before they are replaced.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of audiocraft's age: what torch has since deprecated
        language_model = _language_model(weights.folder / LANGUAGE_MODEL, device, open_t5)
        encodec = _encodec(weights.folder / ENCODEC, device, cache_dir)
    return Checkpoint(weights, language_model, encodec, device)


def import_packages() -> None:
    """Import what the engine needs; MissingPackage with the command that installs it, if that fails."""
    # It warns that its kernels for GPUs are off; nothing here uses them.
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
        config.conditioners = {}  # audiocraft's download what they may need; ours are put in their place
        # Minutes of drawing numbers that the checkpoint replaces.
        config.transformer_lm.update(weight_init=None, depthwise_init=None, zero_bias_init=False)
        model = builders.get_lm_model(config)
    model.condition_provider = ConditioningProvider(conditioners, device=device).to(device)
    model.cfg = config  # where MusicGen looks for the window's length and for stereo
    return _fill(model, found, path)


def _conditioners(path: Path, found: Package, device: str, open_t5: Callable[[str], Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from pipeline.engines.audiocraft.conditioners import MixChromaConditioner, PromptConditioner

    wanted = OmegaConf.to_container(found.config.conditioners, resolve=True)
    wanted.pop("args", None)  # about training
    if {name: settings["model"] for name, settings in wanted.items()} != CONDITIONERS:
        raise BadCheckpoint(
            f"{path} is not conditioned on a melody and a prompt: take one that is, {MELODY_CHECKPOINT}."
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
    if "pretrained" in content:  # as in fine-tuned checkpoints: a name instead of weights
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
    # In the middle of the first request with a prompt, whose draws must be those of any other time.
    with torch.random.fork_rng(devices=[]):
        tokenizer = pretrained.load_part(transformers.T5Tokenizer, where)
        return tokenizer, pretrained.load_model(transformers.T5EncoderModel, where, device)


def _fill(model: Any, found: Package, path: Path) -> Any:
    """The model with the checkpoint's weights, ready for use. Every weight has to be there, and no other."""
    try:
        model.load_state_dict(found.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise BadCheckpoint(f"{path} doesn't fit its own configuration: {reason}") from error
    return model.eval()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What audiocraft raises of a configuration that isn't what its builders expect, as BadCheckpoint."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (*BROKEN_CONFIGURATION, OmegaConfBaseException) as error:
        reason = f"{type(error).__name__}: {pretrained.first_line(error)}"
        raise BadCheckpoint(f"The configuration in {path} can't be used ({reason}).") from error
