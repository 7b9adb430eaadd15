"""CLAP vectors (Wu et al. 2023, arXiv:2211.06687) of whole tracks, on transformers.

The model takes 10 s at 48 kHz. Of longer audio the library takes a random crop, so that one file no
longer has one vector (LAION-AI/CLAP #166). Therefore the track is cut here into consecutive windows of
exactly 10 s, and the rest is dropped; a track under 10 s is one window, which the library repeats and
pads. The vector of the track is the mean of the unit vectors of its windows, scaled to unit length.

Fusion checkpoints are refused because they choose random crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.engines import pretrained
from pipeline.engines.base import Embedder, EngineCard, EngineSettings, Params, StopFn, check_stop
from pipeline.errors import BadCheckpoint
from pipeline.records import Audio, Embedding, Samples
from pipeline.weights.hub import Weights

if TYPE_CHECKING:
    import numpy as np

VERSION = "1"
MODEL_TYPE = "clap"
DEFAULT_MODEL = "laion/clap-htsat-unfused"
LICENSE = "Apache-2.0 (CLAP weights)"
BATCH_WINDOWS = 4  # windows that are in memory at once; more are hardly faster on a CPU


class ClapEmbedder:
    """A `TextEmbedder` made of CLAP's two towers."""

    name = "clap"
    version = VERSION

    def __init__(self, weights: Weights, model: Any, feature_extractor: Any, device: str) -> None:
        self.weights = weights
        self.dim = int(model.config.projection_dim)
        self._model, self._feature_extractor, self._device = model, feature_extractor, device

    def embed(self, audio: Audio, *, should_stop: StopFn) -> Embedding:
        """Embed one track: a vector per 10 s and their mean.

        Raises:
            Stopped: within a few windows of `should_stop` turning true.
        """
        import numpy as np

        from pipeline.audio import resample

        rate = self._feature_extractor.sampling_rate
        mono = resample(Audio(audio.mono()[None], audio.sample_rate), rate).samples[0]
        windows = cut(mono, self._feature_extractor.nb_max_samples)
        vectors = []
        for start in range(0, len(windows), BATCH_WINDOWS):
            check_stop(should_stop)
            vectors.append(self._vectors(windows[start : start + BATCH_WINDOWS]))
        window_vectors = unit(np.concatenate(vectors))
        ends_s = np.cumsum([len(window) for window in windows]) / rate
        starts_s = np.concatenate([[0.0], ends_s[:-1]])
        return Embedding(
            track=unit(window_vectors.mean(axis=0, dtype=np.float64)),
            windows=window_vectors,
            times_s=np.stack([starts_s, ends_s], axis=1).astype(np.float32),
        )

    def embed_texts(self, texts: Sequence[str]) -> Samples:
        """Vectors of texts in the space of those of sound, (texts, d), float32, unit length.

        The text tower is loaded at the first call.

        Raises:
            BadCheckpoint: the text tower or its tokenizer can't be loaded.
        """
        import numpy as np
        import torch

        tokenizer, model = self._text_tower
        vectors = []
        for text in texts:  # one at a time, so that a vector does not depend on the other texts
            tokens = tokenizer(text, truncation=True, return_tensors="pt").to(self._device)
            with torch.inference_mode():
                vectors.append(model(**tokens).text_embeds.to("cpu", torch.float32).numpy())
        return unit(np.concatenate(vectors))

    @cached_property
    def _text_tower(self) -> tuple[Any, Any]:
        import transformers

        folder = self.weights.folder
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            # The library would go on with an empty vocabulary.
            raise BadCheckpoint(f"{folder} has no tokenizer: tokenizer.json or vocab.json is missing.")
        tokenizer = pretrained.load_part(transformers.AutoTokenizer, folder)
        config = pretrained.load_part(transformers.ClapConfig, folder).text_config
        tower = transformers.ClapTextModelWithProjection
        return tokenizer, pretrained.load_model(tower, folder, self._device, config=config)

    def _vectors(self, windows: list[Samples]) -> Samples:
        import numpy as np
        import torch

        features = self._feature_extractor(
            windows,
            sampling_rate=self._feature_extractor.sampling_rate,
            truncation="rand_trunc",  # which leaves windows of the exact length as they are
            return_tensors="pt",
        )
        with torch.inference_mode():
            vectors = self._model(input_features=features["input_features"].to(self._device)).audio_embeds
        return np.asarray(vectors.to("cpu", torch.float32).numpy())


def cut(mono: Samples, window: int) -> list[Samples]:
    """Consecutive windows of exactly `window` samples, without the rest; a shorter track is one window."""
    whole = len(mono) // window
    return [mono[i * window : (i + 1) * window] for i in range(whole)] or [mono]


def unit(vectors: np.ndarray[Any, Any]) -> Samples:
    """Vectors along the last axis, scaled to length 1, in float32."""
    import numpy as np

    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return np.asarray(vectors / lengths, dtype=np.float32)


def load_clap(weights: Weights, device: str = "cpu", threads: int | None = None) -> ClapEmbedder:
    """Load a checkpoint's audio tower in float32. `threads` sets torch's threads for the whole process.

    Raises:
        BadCheckpoint: it is another kind of model or a fusion checkpoint, or files are missing or damaged.
        EngineUnusable: the device can't be used.
    """
    config = pretrained.check_folder(weights.folder, MODEL_TYPE, DEFAULT_MODEL)
    if (config.get("audio_config") or {}).get("enable_fusion"):
        raise BadCheckpoint(
            f"{weights.model} is a fusion checkpoint, which takes random parts of a track: "
            f"use a checkpoint without fusion, such as {DEFAULT_MODEL}."
        )
    import transformers

    pretrained.prepare(device, threads)
    extractor = pretrained.load_part(transformers.ClapFeatureExtractor, weights.folder)
    # Half of the model is its text tower, which few need.
    audio_config = pretrained.load_part(transformers.ClapConfig, weights.folder).audio_config
    model = pretrained.load_model(
        transformers.ClapAudioModelWithProjection, weights.folder, device, config=audio_config
    )
    return ClapEmbedder(weights, model, extractor, device)


def license_of(model: str | None) -> str:
    """The licence of a model's weights; for other checkpoints a reference to their own."""
    return LICENSE if model in (None, DEFAULT_MODEL) else f"that of the checkpoint {model}"


def _load(settings: EngineSettings) -> Embedder:
    from pipeline.weights import hub

    found = hub.find_or_fetch(settings.model or DEFAULT_MODEL, settings.revision)
    return load_clap(found, settings.device, settings.threads)


ENGINE = EngineCard(
    name="clap",
    stage="embed",
    version=VERSION,
    summary="CLAP vectors in 10 s windows: what the track sounds like, comparable between tracks",
    params=Params,
    load=_load,
    packages=("torch", "transformers"),
    install="pip install -r requirements.txt",
    default_model=DEFAULT_MODEL,
    license_of=license_of,
    rank=10,
)
