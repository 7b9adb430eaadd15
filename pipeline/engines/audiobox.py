"""Ratings of sound by audiobox-aesthetics (Tjandra et al. 2025, arXiv:2502.05139).

Four axes, about 1 to 10, trained on listeners' ratings: CE (content enjoyment), CU (content usefulness),
PC (production complexity), PQ (production quality). The model takes 10 s at 16 kHz in one channel. As in
the package's own predictor, the sound is cut into consecutive windows, of which the last is padded and
masked, and a rating is the mean of its windows' weighted by their lengths.

The mono signal and its resampling are this program's (`Audio.mono`, soxr), not the package's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.engines import pretrained
from pipeline.engines.base import EngineCard, EngineSettings, Params, Rater, StopFn, check_stop
from pipeline.errors import BadCheckpoint
from pipeline.records import Audio, cut
from pipeline.weights.hub import Weights
from pipeline.weights.layout import WEIGHTS, Layout, check_safetensors, read_json

VERSION = "1"
DEFAULT_MODEL = "facebook/audiobox-aesthetics"
LICENSE = "CC-BY-4.0 (audiobox-aesthetics weights)"
# What else the package asks for (submitit, tqdm, torchaudio) is for its own command line.
INSTALL_COMMAND = "pip install -r requirements.txt && pip install --no-deps audiobox_aesthetics==0.0.4"
SAMPLE_RATE_HZ = 16000
WINDOW = 10 * SAMPLE_RATE_HZ  # samples
FILES = ("config.json", WEIGHTS)


def missing(folder: Path) -> list[str]:
    """The files a checkpoint lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def check(folder: Path) -> None:
    """Raise BadCheckpoint unless both files exist and the weights are whole."""
    if lacking := missing(folder):
        raise BadCheckpoint(
            f"{folder} is not a checkpoint of audiobox-aesthetics: {', '.join(lacking)} missing."
        )
    check_safetensors(folder / WEIGHTS)


AUDIOBOX = Layout(FILES, missing, check)  # without the pickle that the hub has beside them


class AudioboxRater:
    """A `Rater` on the package's AesMultiOutput."""

    name = "audiobox"
    version = VERSION

    def __init__(self, model: Any, device: str) -> None:
        self._model, self._device = model, device
        # By which the outputs, which are standardized, become ratings.
        self._scales = {axis: dict(model.target_transform[axis]) for axis in model.axes_name}

    def rate(self, audio: Audio, *, should_stop: StopFn) -> Mapping[str, float]:
        """Ratings by axis, about 1 to 10.

        Raises:
            Stopped: within a window of `should_stop` turning true.
        """
        from pipeline.audio import resample

        mono = resample(Audio(audio.mono()[None], audio.sample_rate), SAMPLE_RATE_HZ).samples
        sums = dict.fromkeys(self._scales, 0.0)
        for start in range(0, mono.shape[1], WINDOW):
            check_stop(should_stop)
            n_samples = min(WINDOW, mono.shape[1] - start)
            for axis, value in self._outputs(cut(mono, start, start + WINDOW), n_samples).items():
                sums[axis] += value * n_samples
        means = {axis: total / mono.shape[1] for axis, total in sums.items()}
        return {axis: means[axis] * scale["std"] + scale["mean"] for axis, scale in self._scales.items()}

    def _outputs(self, window: Any, n_samples: int) -> dict[str, float]:
        """The model's outputs by axis for a window, (1, WINDOW), of which the first `n_samples` are sound."""
        import torch

        wav = torch.tensor(window, device=self._device)[None]
        mask = torch.arange(WINDOW, device=self._device)[None, None] < n_samples
        with torch.inference_mode(), ignoring_deprecations():
            return {axis: float(value) for axis, value in self._model({"wav": wav, "mask": mask}).items()}


def load_audiobox(weights: Weights, device: str = "cpu", threads: int | None = None) -> AudioboxRater:
    """Load a checkpoint in float32. `threads` sets torch's threads for the whole process.

    Raises:
        BadCheckpoint: it is another kind of model, or weights are missing or damaged.
        EngineUnusable: the device can't be used.
    """
    pretrained.prepare(device, threads)
    from audiobox_aesthetics.model.aes import AesMultiOutput
    from safetensors.torch import load_model

    folder = weights.folder
    settings = read_json(folder / "config.json")
    # Not by the class's from_pretrained, which lets weights be missing and prints to standard output.
    with pretrained.reading(folder), ignoring_deprecations():
        known = settings.keys() & AesMultiOutput.__dataclass_fields__.keys()
        model = AesMultiOutput(**{name: settings[name] for name in known})
        lacking, _ = load_model(model, folder / WEIGHTS, strict=False)
        if lacking:
            raise BadCheckpoint(
                f"{folder} lacks {len(lacking)} of the model's weights, such as {min(lacking)}."
            )
        return AudioboxRater(model.eval().to(device), device)


def ignoring_deprecations() -> warnings.catch_warnings[None]:
    """Silence warnings: the package uses torch in ways that torch has since deprecated."""
    return warnings.catch_warnings(action="ignore")


def license_of(model: str | None) -> str:
    """The licence of a model's weights; for other checkpoints a reference to their own."""
    return LICENSE if model in (None, DEFAULT_MODEL) else f"that of the checkpoint {model}"


def _load(settings: EngineSettings) -> Rater:
    from pipeline.weights import hub

    found = hub.find_or_fetch(settings.model or DEFAULT_MODEL, settings.revision, layout=AUDIOBOX)
    return load_audiobox(found, settings.device, settings.threads)


ENGINE = EngineCard(
    name="audiobox",
    stage="judge",
    version=VERSION,
    summary="ratings as listeners would give them: enjoyment, usefulness, complexity, production quality",
    params=Params,
    load=_load,
    packages=("torch", "transformers", "audiobox_aesthetics"),
    install=INSTALL_COMMAND,
    default_model=DEFAULT_MODEL,
    layout=AUDIOBOX,
    license_of=license_of,
    rank=-1,
)
