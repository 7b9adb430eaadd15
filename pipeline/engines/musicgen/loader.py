"""Opening a MusicGen-Melody checkpoint: a folder in the library's format, checked before it is used.

The library loads what it runs for us: the text encoder, the projections, EnCodec, and the two ends
of the decoder. The decoder's layers, nine tenths of the weights, are left in their files; see `layers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.engines import pretrained
from pipeline.engines.musicgen.decoder import Ends, shape_of
from pipeline.engines.musicgen.layers import LayerFiles
from pipeline.errors import BadCheckpoint
from pipeline.weights import Weights

MODEL_TYPE = "musicgen_melody"
MAX_POSITIONS = 4096  # of a prefix and a window: 235 + 500 characters of prompt + 1503, with room
PACKAGES = ("torch", "torchaudio", "transformers")  # the chroma extractor needs torchaudio


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded model, with what of its configuration the engine uses."""

    weights: Weights  # where it was loaded from
    model: Any  # transformers.MusicgenMelodyForConditionalGeneration, float32, without decoder layers
    feature_extractor: Any  # transformers.MusicgenMelodyFeatureExtractor
    tokenizer: Any  # transformers.T5Tokenizer
    device: str
    layers: LayerFiles  # where the decoder's layers are

    @property
    def ends(self) -> Ends:
        """The decoder's two ends, on the CPU; they share memory with the model there."""
        decoder = self.model.decoder.model.decoder
        heads = [head.weight for head in self.model.decoder.lm_heads]
        norm = decoder.layer_norm

        def stacked(weights: list[Any]) -> Any:
            return np.stack([weight.detach().cpu().numpy() for weight in weights])

        return Ends(
            stacked([embedding.weight for embedding in decoder.embed_tokens]),
            np.concatenate([head.detach().cpu().numpy() for head in heads]),
            stacked([norm.weight, norm.bias]),
            decoder.embed_positions.get_embedding(MAX_POSITIONS, norm.weight.shape[0]).numpy(),
        )

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
    def chroma_length(self) -> int:
        """Frames of chroma that a window is told."""
        return int(self.model.config.chroma_length)

    @property
    def window_s(self) -> float:
        """Seconds that the model was trained on, and the most it makes at once."""
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
    config = pretrained.load_part(transformers.MusicgenMelodyConfig, weights.folder)
    shape = shape_of(config.decoder)
    if config.decoder.activation_function != "gelu":
        raise BadCheckpoint(
            f"{weights.folder} has the activation {config.decoder.activation_function!r}; "
            f"only 'gelu' is supported."
        )
    config.decoder.num_hidden_layers = 0
    model = pretrained.load_model(
        transformers.MusicgenMelodyForConditionalGeneration, weights.folder, device, config=config
    )
    layers = LayerFiles(weights.folder, shape)
    return Checkpoint(weights, model, processor.feature_extractor, processor.tokenizer, device, layers)
