"""Opening a MusicGen-Melody checkpoint: a folder in the format of transformers, checked before it is used.

Each part that transformers runs is loaded when it is needed: the text encoder for a prompt, the
embedding and LM head when the decoder is opened, EnCodec when tokens are decoded to sound. On a CPU
that keeps half a gigabyte free while tokens are made; on a GPU the parts stay. The decoder's layers,
nine tenths of the weights, are read from their files by `layers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines import pretrained
from pipeline.engines.musicgen import memory_budget
from pipeline.engines.musicgen.decoder import EmbeddingAndHead, Shape
from pipeline.engines.musicgen.layers import LayerFiles
from pipeline.errors import BadCheckpoint
from pipeline.records import Samples
from pipeline.weights.hub import Weights

MODEL_TYPE = "musicgen_melody"
MAX_POSITIONS = 4096  # of a prefix and a window: at most 235 + 500 characters of prompt + 1503


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint, and those facts of its configuration that the engine uses."""

    weights: Weights  # where it was loaded from
    config: Any  # transformers.MusicgenMelodyConfig
    feature_extractor: Any  # transformers.MusicgenMelodyFeatureExtractor
    tokenizer: Any  # transformers.T5Tokenizer
    device: str
    layers: LayerFiles  # the decoder's
    chroma_projection: Any  # torch.nn.Linear, from chroma to the decoder's inputs
    text_projection: Any  # the same from the text encoder's outputs

    def text_encoder(self) -> Any:
        """transformers.T5EncoderModel, float32, read at every call for a CPU.

        Raises:
            BadCheckpoint: as `load_checkpoint`.
        """
        return self._parts().text_encoder

    def codec(self) -> Any:
        """transformers.EncodecModel, float32, read at every call for a CPU. Raises as `text_encoder`."""
        return self._parts().audio_encoder

    def _parts(self) -> Any:
        return _open(self.weights.folder, self.device) if self.device == "cpu" else self._held

    @cached_property
    def _held(self) -> Any:
        model = _open(self.weights.folder, self.device)
        for module in model.audio_encoder.modules():
            if hasattr(module, "flatten_parameters"):  # an LSTM's, which are copied at each call otherwise
                module.flatten_parameters()
        return model

    def embedding_and_head(self) -> EmbeddingAndHead:
        """What stands before and after the decoder's layers, read at every call. Raises as `text_encoder`."""
        decoder = _open(self.weights.folder, "cpu").decoder
        inner = decoder.model.decoder
        return EmbeddingAndHead(
            embeddings=np.stack([_array(embedding.weight) for embedding in inner.embed_tokens]),
            heads=np.concatenate([_array(head.weight) for head in decoder.lm_heads]),
            norm=np.stack([_array(inner.layer_norm.weight), _array(inner.layer_norm.bias)]),
            positions=inner.embed_positions.get_embedding(MAX_POSITIONS, self.layers.shape.hidden).numpy(),
        )

    @property
    def sample_rate(self) -> int:
        """Of the generated audio, in Hz."""
        return int(self.config.audio_encoder.sampling_rate)

    @property
    def hop_samples(self) -> int:
        """Samples per frame of tokens."""
        return math.prod(self.config.audio_encoder.upsampling_ratios)

    @property
    def frames_per_s(self) -> float:
        """Frames of tokens per second."""
        return self.sample_rate / self.hop_samples

    @property
    def channels(self) -> int:
        return int(self.config.decoder.audio_channels)

    @property
    def chroma_length(self) -> int:
        """Frames of chroma in the prefix of a window."""
        return int(self.config.chroma_length)

    @property
    def window_s(self) -> float:
        """Length that the model was trained on, the longest that it makes without a break."""
        return float(self.feature_extractor.chunk_length)


class LazyModel:
    """A part of a checkpoint, read when it is first needed and, on a CPU, held until `close`."""

    def __init__(self, read: Callable[[], Any], device: str) -> None:
        self._read, self._device = read, device
        self._model: Any = None

    def open(self) -> Any:
        if self._model is None:
            self._model = self._read()
        return self._model

    def close(self) -> None:
        if self._model is not None and self._device == "cpu":
            self._model = None
            memory_budget.return_unused()


def load_checkpoint(weights: Weights, device: str = "cpu", threads: int | None = None) -> Checkpoint:
    """Load a checkpoint in float32. `threads` sets torch's, for the whole process; None leaves them.

    Raises:
        BadCheckpoint: it is another kind of model, or files are missing or damaged.
        EngineUnusable: the device can't be used.
    """
    pretrained.check_folder(weights.folder, MODEL_TYPE, "facebook/musicgen-melody")
    if not any((weights.folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise BadCheckpoint(f"{weights.folder} has no tokenizer: tokenizer.json or spiece.model is missing.")
    import transformers

    pretrained.prepare(device, threads)
    processor = pretrained.load_part(transformers.MusicgenMelodyProcessor, weights.folder)
    config = pretrained.load_part(transformers.MusicgenMelodyConfig, weights.folder)
    if config.decoder.activation_function != "gelu":
        raise BadCheckpoint(
            f"{weights.folder} has the activation {config.decoder.activation_function!r}; "
            f"only 'gelu' is supported."
        )
    shape = Shape(
        layers=config.decoder.num_hidden_layers,
        hidden=config.decoder.hidden_size,
        heads=config.decoder.num_attention_heads,
        feed_forward=config.decoder.ffn_dim,
        codebooks=config.decoder.num_codebooks,
        vocabulary=config.decoder.vocab_size,
    )
    model = _open(weights.folder, device)
    return Checkpoint(
        weights=weights,
        config=config,
        feature_extractor=processor.feature_extractor,
        tokenizer=processor.tokenizer,
        device=device,
        layers=LayerFiles(weights.folder, shape),
        chroma_projection=_copied(model.audio_enc_to_dec_proj),
        text_projection=_copied(model.enc_to_dec_proj),
    )


def _open(folder: Path, device: str) -> Any:
    """transformers.MusicgenMelodyForConditionalGeneration, float32, without the decoder's layers."""
    import transformers

    config = pretrained.load_part(transformers.MusicgenMelodyConfig, folder)
    config.decoder.num_hidden_layers = 0
    model_class = transformers.MusicgenMelodyForConditionalGeneration
    return pretrained.load_model(model_class, folder, device, config=config)


def _copied(module: Any) -> Any:
    """The module with copies of its weights: the library maps them, which would hold the whole file."""
    return module._apply(lambda tensor: tensor.clone())


def _array(weight: Any) -> Samples:
    found: Samples = weight.detach().numpy()
    return found
