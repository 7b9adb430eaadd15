"""Melody-conditioned MusicGen (Copet et al. 2023, arXiv:2306.05284).

A language model writes the tokens of the EnCodec codec, conditioned on the chroma of the track and on
a prompt, and EnCodec decodes the tokens to sound. The checkpoint is opened with transformers; the
language model runs on a decoder of this package.

A call of the engine passes through these modules:

- `engine`: the generator; requests in, variations out.
- `checkpoint`: opens the files, `layers` those of the decoder's layers.
- `conditioning`: computes the conditions, with the melody of `melody` (by `hpss` or `demucs`).
- `scheduler`: continuous batching of all requests in the rows of one KV cache. `windows` splits long
  music, `sampling` picks tokens, `savepoints` stores them, `memory_budget` limits the rows.
- `decoder`: the interface to the language model. `cpu_decoder` implements it with the compiled
  `kernels` and `kv_cache`. `torch_decoder` implements it for a GPU with `torch_cache` and the parts of a
  step in `triton_ops`, of which `torch_ops` is the plain form.
- `precision`: chooses float32, int8 or half precision. `precision_check` compares them, `quantized_store`
  holds the quantized layers on the disk.
- `codec`: decodes tokens to sound.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.engines.base import EngineCard, EngineSection, EngineSettings, Generator, Params, StopFn
from pipeline.records import VariationRequest

VERSION = "7"
DEFAULT_MODEL = "facebook/musicgen-melody"
FOLDER = "musicgen"  # of this engine's files in the state folder
LICENSE = "CC-BY-NC-4.0 (MusicGen weights)"


class SamplingParams(Params):
    """The parameters of one variation that MusicGen has in every engine, beside its length and seed.

    The defaults are those of audiocraft, with which the weights were published.
    """

    prompt: str = Field(
        default="",
        max_length=500,
        description="what it should sound like, in English; empty: the melody alone; auto: words from the"
        " track's analysis: mood, tempo, key and, where the embedder is clap, genre and instruments",
    )
    temperature: float = Field(
        default=1.0, ge=0.0, le=5.0, description="higher is bolder; 0: always the likeliest token"
    )
    top_k: int = Field(default=250, ge=0, le=2048, description="choose among so many tokens; 0: among all")
    top_p: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="choose among the likeliest tokens that together have this probability, "
        "instead of top_k; 0: off",
    )
    guidance: float = Field(
        default=3.0,
        ge=1.0,
        le=20.0,
        description="how strictly melody and prompt are followed; 1: without guidance (quicker in musicgen)",
    )


def params_of_similarity(similarity: float) -> dict[str, Any]:
    """Guidance and temperature for a similarity to the source of 0 to 1; at 0.5 they are the defaults.

    The guidance scale weighs the melody against music without it; less temperature strays less from it. The
    slope could not be measured on the published weights.
    """
    return {"guidance": round(1.0 + 4.0 * similarity, 3), "temperature": round(1.2 - 0.4 * similarity, 3)}


class MusicgenParams(SamplingParams):
    """The parameters of one variation by this engine."""

    melody: Literal["auto", "mix", "harmonic", "demucs"] = Field(
        default="auto",
        description="what the melody is taken from: the whole mix, its harmonic part, or vocals and other "
        "instruments by demucs (to be installed); auto: the mix if it is hardly percussive",
    )


class MusicgenSection(EngineSection):
    """The section `generate.musicgen` of the configuration."""

    precision: Literal["auto", "float32", "int8"] = Field(
        default="auto",
        description="auto: int8 on a CPU, if it passes its check, and half precision on a GPU",
    )
    max_memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="memory of the whole process, or of its GPU, by which the batch is sized; null: 60 % of "
        "what is free, on a GPU 90 %",
    )


def license_of(model: str | None) -> str:
    """The licence that the weights put on what is made with them, as far as it is known."""
    if model is None or model.startswith("facebook/musicgen"):
        return LICENSE
    name = Path(model).name if Path(model).expanduser().is_dir() else model
    return f"that of the checkpoint in {name}; MusicGen's published weights are CC-BY-NC-4.0"


class MusicgenUpkeep:
    """See `Upkeep`."""

    def last_start(self, state_dir: Path) -> str | None:
        from pipeline.engines.musicgen import quantized_store

        check = quantized_store.last_check(state_dir / FOLDER)
        if check is None:
            return None
        return f"{check.model}: {check.words}; {check.precision if check.passed else 'float32'} is used"

    def check_params(self, params: Mapping[str, Any]) -> None:
        """Demucs and its weights are not installed with the engine."""
        if params["melody"] == "demucs":
            from pipeline.engines.musicgen import demucs

            demucs.find()


def _prepare(requests: Sequence[VariationRequest], should_stop: StopFn) -> Mapping[str, Any]:
    from pipeline.engines.musicgen.melody import prepare

    return prepare(requests, should_stop)


def _load(settings: EngineSettings) -> Generator:
    from pipeline.engines.musicgen import memory_budget
    from pipeline.engines.musicgen.checkpoint import load_checkpoint
    from pipeline.engines.musicgen.engine import MusicgenGenerator
    from pipeline.engines.musicgen.precision import open_decoder
    from pipeline.engines.musicgen.savepoints import savepoints_for
    from pipeline.weights import hub

    section = settings.sections.get(ENGINE.name, MusicgenSection())
    assert isinstance(section, MusicgenSection)
    weights = hub.find_or_fetch(settings.model or DEFAULT_MODEL, settings.revision)
    checkpoint = load_checkpoint(weights, settings.device, settings.threads)
    folder = settings.state_dir / FOLDER if settings.state_dir is not None else None
    if folder is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))  # of compiled kernels for a GPU
    decoder, check = open_decoder(checkpoint, section.precision, settings.threads, folder)
    memory_budget.return_unused()
    return MusicgenGenerator(
        checkpoint,
        decoder,
        check,
        max_memory_gb=section.max_memory_gb,
        saved=savepoints_for(settings, FOLDER),
    )


ENGINE = EngineCard(
    name="musicgen",
    stage="generate",
    version=VERSION,
    summary="new music that follows the track's melody and a prompt (MusicGen-Melody; weights CC-BY-NC-4.0)",
    params=MusicgenParams,
    load=_load,
    packages=("torch", "torchaudio", "transformers", "numba"),
    install="pip install -r requirements.txt",
    default_model=DEFAULT_MODEL,
    license_of=license_of,
    params_of_similarity=params_of_similarity,
    prepare=_prepare,
    section=MusicgenSection,
    upkeep=MusicgenUpkeep(),
    rank=10,
)
