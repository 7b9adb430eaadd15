"""Melody-conditioned MusicGen (Copet et al. 2023, arXiv:2306.05284), on audiocraft, its authors' library.

It serves checkpoints in audiocraft's own format, and comparisons of other engines with the original.
`auto` never chooses it. `checkpoint` reads the format, `conditioners` are audiocraft's without their
downloads, `loader` builds the model, and `engine` is the generator.

Unlike audiocraft, it takes the melody from the whole mix, without separating vocals and drums first.
"""

from __future__ import annotations

from pipeline.engines.audiocraft.checkpoint import AUDIOCRAFT, T5_BASE
from pipeline.engines.base import EngineCard, EngineSettings, Generator
from pipeline.engines.musicgen import DEFAULT_MODEL, SamplingParams, license_of, params_of_similarity

VERSION = "1"
INSTALL_COMMAND = (
    "pip install -r requirements.txt -r requirements-audiocraft.txt"
    " && pip install --no-deps audiocraft==1.3.0"
)
PACKAGES = (
    *("torch", "torchaudio", "transformers", "audiocraft"),
    *("einops", "flashy", "julius", "num2words", "omegaconf", "spacy", "torchmetrics", "xformers"),
)


def _load(settings: EngineSettings) -> Generator:
    from pipeline.engines.audiocraft.loader import load
    from pipeline.weights import hub

    found = hub.find_or_fetch(settings.model or DEFAULT_MODEL, settings.revision, layout=AUDIOCRAFT)
    return load(found, settings.device, settings.threads)


ENGINE = EngineCard(
    name="audiocraft",
    stage="generate",
    version=VERSION,
    summary="as musicgen, on audiocraft and in its checkpoint format (MusicGen-Melody; weights CC-BY-NC-4.0)",
    params=SamplingParams,
    load=_load,
    packages=PACKAGES,
    install=INSTALL_COMMAND,
    default_model=DEFAULT_MODEL,
    layout=AUDIOCRAFT,
    companions=(T5_BASE,),
    license_of=license_of,
    params_of_similarity=params_of_similarity,
    rank=-1,
)
