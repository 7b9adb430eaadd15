"""Loading of checkpoints in audiocraft's format, with audiocraft's builders and without its downloads."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from pipeline.engines import pretrained
from pipeline.engines.audiocraft.checkpoint import ENCODEC, LANGUAGE_MODEL, companion, read
from pipeline.engines.audiocraft.engine import AudiocraftGenerator
from pipeline.errors import BadCheckpoint
from pipeline.weights.hub import Weights

CONDITIONERS = {"self_wav": "chroma_stem", "description": "t5"}  # those of MusicGen-Melody
PROMPT_WEIGHTS = "condition_provider.conditioners.description.output_proj.weight"
MELODY_CHECKPOINT = "such as facebook/musicgen-melody"


def load(weights: Weights, device: str = "cpu", threads: int | None = None) -> AudiocraftGenerator:
    """Load a checkpoint in float32 on the CPU and in float16 on a GPU, as audiocraft does.

    `threads` sets torch's threads for the whole process; None leaves them.

    Raises:
        BadCheckpoint: it is another kind of model, or files are missing, damaged or contain code.
        MissingWeights: it refers to a model that is not on this machine and can't be downloaded now.
        EngineUnusable: the device can't be used.
    """
    pretrained.prepare(device, threads)
    import torch

    # xformers warns that its kernels for GPUs are disabled; they are not used here.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    # The builders draw random weights before those of the checkpoint replace them.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # audiocraft uses functions that torch has since deprecated
        with pretrained.reading(weights.folder / LANGUAGE_MODEL):
            language_model = _language_model(weights.folder, device)
        with pretrained.reading(weights.folder / ENCODEC):
            encodec = _encodec(weights.folder, device)
    return AudiocraftGenerator(weights.model, language_model, encodec)


def _language_model(folder: Path, device: str) -> Any:
    """audiocraft.models.LMModel, in eval mode."""
    from audiocraft.models import builders
    from audiocraft.modules.conditioners import ConditioningProvider
    from omegaconf import OmegaConf

    content = read(folder / LANGUAGE_MODEL)
    config, state = OmegaConf.create(content["xp.cfg"]), content["best_state"]
    conditioners = _conditioners(folder, config, state[PROMPT_WEIGHTS].shape[1], device)
    config.device = device
    config.dtype = "float32" if device == "cpu" else "float16"
    config.conditioners = {}  # those of audiocraft would download models; ours replace them below
    # Without this, drawing random weights takes minutes.
    config.transformer_lm.update(weight_init=None, depthwise_init=None, zero_bias_init=False)
    model = builders.get_lm_model(config)
    model.condition_provider = ConditioningProvider(conditioners, device=device).to(device)
    model.cfg = config  # from which MusicGen takes the length of a window and stereo
    model.load_state_dict(state)
    return model.eval()


def _conditioners(folder: Path, config: Any, prompt_dim: int, device: str) -> dict[str, Any]:
    import transformers
    from omegaconf import OmegaConf

    from pipeline.engines.audiocraft.conditioners import MixChromaConditioner, PromptConditioner

    wanted = OmegaConf.to_container(config.conditioners, resolve=True)
    wanted.pop("args", None)  # for training
    if {name: settings["model"] for name, settings in wanted.items()} != CONDITIONERS:
        raise BadCheckpoint(
            f"{folder / LANGUAGE_MODEL} is not conditioned on a melody and a prompt: "
            f"use one that is, {MELODY_CHECKPOINT}."
        )
    dim, t5 = config.transformer_lm.dim, wanted["description"]["t5"]
    if t5.get("normalize_text"):
        raise BadCheckpoint(
            f"{folder / LANGUAGE_MODEL} normalizes prompts with spaCy, which is not supported."
        )
    where = companion(folder, t5["name"])
    tokenizer = pretrained.load_part(transformers.T5Tokenizer, where)
    encoder = pretrained.load_model(transformers.T5EncoderModel, where, device)
    return {
        "self_wav": MixChromaConditioner(
            dim, config.dataset.segment_duration, device, **wanted["self_wav"]["chroma_stem"]
        ),
        "description": PromptConditioner(prompt_dim, dim, device, tokenizer, encoder),
    }


def _encodec(folder: Path, device: str) -> Any:
    """audiocraft.models.CompressionModel, in eval mode."""
    from audiocraft.models import HFEncodecCompressionModel, builders
    from omegaconf import OmegaConf

    content = read(folder / ENCODEC)
    if "pretrained" in content:  # fine-tuned checkpoints have a name in the place of weights
        import transformers

        where = companion(folder, content["pretrained"])
        model = pretrained.load_model(transformers.EncodecModel, where, device)
        return HFEncodecCompressionModel(model).eval()
    config = OmegaConf.create(content["xp.cfg"])
    config.device = device
    model = builders.get_compression_model(config)
    model.load_state_dict(content["best_state"])
    return model.eval()
