"""Opening a MusicGen-Melody checkpoint: a folder in the library's format, checked before it is used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.engines import pretrained
from pipeline.weights import Weights

MODEL_TYPE = "musicgen_melody"
PACKAGES = ("torch", "torchaudio", "transformers")  # the chroma extractor needs torchaudio


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
        """The length of the pieces the model was trained on, and the most it makes at once."""
        return float(self.feature_extractor.chunk_length)


def load_checkpoint(weights: Weights, device: str = "cpu", threads: int | None = None) -> Checkpoint:
    """Load a checkpoint in float32. `threads` is torch's, for the whole process; None leaves it.

    Raises:
        BadCheckpoint: another kind of model, or files are missing or damaged.
        MissingPackage: torch, torchaudio or transformers isn't installed.
        ConfigError: there is no such device.
    """
    pretrained.check_folder(weights.folder, MODEL_TYPE, "facebook/musicgen-melody")
    pretrained.require_any(weights.folder, ("tokenizer.json", "spiece.model"), "tokenizer")
    pretrained.import_packages("musicgen", *PACKAGES)
    import transformers

    pretrained.prepare(device, threads)
    processor = pretrained.load_part(transformers.MusicgenMelodyProcessor, weights.folder)
    model = pretrained.load_model(transformers.MusicgenMelodyForConditionalGeneration, weights.folder, device)
    # Nothing of the checkpoint's own defaults (guidance 3, 1500 frames) may seep into a request.
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=model.config.decoder.pad_token_id,
        bos_token_id=model.config.decoder.bos_token_id,
        decoder_start_token_id=model.config.decoder.bos_token_id,
    )
    return Checkpoint(weights, model, processor.feature_extractor, processor.tokenizer, device)
