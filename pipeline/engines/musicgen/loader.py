"""Opening a MusicGen-Melody checkpoint: a folder in the library's format, checked before it is used."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BadCheckpoint, ConfigError, MissingPackage
from pipeline.weights import PREPROCESSORS, Weights

MODEL_TYPE = "musicgen_melody"
INSTALL = "pip install -r requirements.txt"
TOKENIZERS = ("tokenizer.json", "spiece.model")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded model, with what of its configuration the engine uses."""

    weights: Weights  # where it was loaded from
    model: Any  # transformers.MusicgenMelodyForConditionalGeneration, float32, in eval mode
    feature_extractor: Any  # transformers.MusicgenMelodyFeatureExtractor
    tokenizer: Any  # transformers.T5Tokenizer
    device: str

    @property
    def sample_rate(self) -> int:
        """Hz, of the sound it makes."""
        return int(self.model.config.audio_encoder.sampling_rate)

    @property
    def hop_samples(self) -> int:
        """Samples per frame of tokens."""
        return math.prod(self.model.config.audio_encoder.upsampling_ratios)

    @property
    def channels(self) -> int:
        return int(self.model.config.decoder.audio_channels)

    @property
    def codebooks(self) -> int:
        """Of all channels together."""
        return int(self.model.config.decoder.num_codebooks)

    @property
    def max_duration_s(self) -> float:
        """The length the model was trained on, and makes at once."""
        return float(self.feature_extractor.chunk_length)


def load_checkpoint(weights: Weights, device: str = "cpu", threads: int | None = None) -> Checkpoint:
    """Load a checkpoint in float32. `threads` is torch's, for the whole process; None leaves it.

    Only safetensors are read, and no code of the folder is ever run.

    Raises:
        BadCheckpoint: another kind of model, or files are missing or damaged.
        MissingPackage: torch, torchaudio or transformers isn't installed.
        ConfigError: there is no such device.
    """
    folder = weights.folder
    _check_files(folder)
    try:
        import torch
        import torchaudio  # noqa: F401  # the library's feature extractor needs it
        import transformers
    except ImportError as error:
        raise MissingPackage(f"The musicgen engine needs {error.name or 'torch'}: {INSTALL}.") from error
    if threads is not None:
        torch.set_num_threads(threads)
    check_device(torch, device)
    try:
        processor = transformers.MusicgenMelodyProcessor.from_pretrained(folder, local_files_only=True)
        model, info = transformers.MusicgenMelodyForConditionalGeneration.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file the libraries raise anything from KeyError to SafetensorError
        raise BadCheckpoint(f"{folder} can't be loaded: {_first_line(error)}") from error
    if lacking := sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"]):
        raise BadCheckpoint(f"{folder} lacks {len(lacking)} of the model's weights, such as {lacking[0]}.")
    # Nothing of the checkpoint's own defaults (guidance 3, length 1500) may seep into a request.
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=model.config.decoder.pad_token_id,
        bos_token_id=model.config.decoder.bos_token_id,
        decoder_start_token_id=model.config.decoder.bos_token_id,
    )
    model.eval().to(device)
    return Checkpoint(weights, model, processor.feature_extractor, processor.tokenizer, device)


def check_device(torch: Any, device: str) -> None:
    """Raise ConfigError unless `device` ("cpu", "cuda", "cuda:1") can be used."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} can't be used: {_first_line(error)} Set device: cpu, or install a build "
            f"of torch for this machine's GPU."
        ) from error


def _check_files(folder: Path) -> None:
    try:
        model_type = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{folder} has no readable config.json.") from error
    if model_type != MODEL_TYPE:
        raise BadCheckpoint(
            f"{folder} holds a {model_type!r} model; the musicgen engine needs {MODEL_TYPE!r}, "
            f"such as facebook/musicgen-melody."
        )
    for kind, names in (("tokenizer", TOKENIZERS), ("feature extractor", PREPROCESSORS)):
        if not any((folder / name).is_file() for name in names):
            raise BadCheckpoint(f"{folder} has no {kind}: {' or '.join(names)} is missing.")


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."
