"""Melody-conditioned MusicGen (Copet et al. 2023, arXiv:2306.05284), on transformers.

The track's chroma and a prompt condition a language model over EnCodec tokens; EnCodec makes
sound of the tokens. In the order in which a request meets them:

- `engine` is the generator; `loader` opened its checkpoint, `layers` what it leaves in the files;
- `stems` says what the melody is taken from, by `harmonic` or `separation`; `conditioning` makes
  prefixes of melody and prompt;
- `batch` runs all variations together, `windows` what is longer than the model can make at once,
  `sampling` picks the tokens, `savepoints` keeps them on the disk, `room` says how many rows fit;
- `decoder` is the language model: `cpu` over `kernels`, or `torch_decoder`; `precision` chooses and
  checks the numbers it calculates in; `keys_values` is the memory of `cpu`, which may be in `shm`,
  where it outlives a kill;
- `sound` makes sound of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.engines.base import UNFINISHED, EngineCard, EngineSettings, Generator, Params

VERSION = "6"
DEFAULT_MODEL = "facebook/musicgen-melody"
FOLDER = "musicgen"  # of what the engine keeps
LICENSE = "CC-BY-NC-4.0 (MusicGen weights)"


class MusicgenParams(Params):
    """What one variation can be told, beside its length and seed.

    The defaults are those of audiocraft, which the weights were published with.
    """

    prompt: str = Field(
        default="",
        max_length=500,
        description="what it should sound like, in English; empty: the melody alone",
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
        description="how strictly melody and prompt are followed; 1: unguided, in half the rows",
    )
    melody: Literal["auto", "mix", "harmonic", "demucs"] = Field(
        default="auto",
        description="what the melody is taken from: the whole mix, what is steady in it, or vocals and "
        "other instruments by demucs (to be installed); auto: the mix where there are few strokes",
    )


def license_of(model: str | None) -> str:
    """The licence that the weights put on what is made with them, as far as it can be known."""
    if model is None or model.startswith("facebook/musicgen"):
        return LICENSE
    name = Path(model).name if Path(model).expanduser().is_dir() else model
    return f"that of the checkpoint in {name}; MusicGen's published weights are CC-BY-NC-4.0"


def last_check(state_dir: Path) -> str | None:
    """What the last start found out about int8; None if there was none."""
    from pipeline.engines.musicgen import precision

    check = precision.last_check(state_dir / FOLDER)
    if check is None:
        return None
    return f"{check.model}: {check.words}; {'int8' if check.passed else 'float32'} is used"


def leftovers(state_dir: Path) -> list[Path]:
    """See `EngineCard`: keys and values, in memory."""
    from pipeline.engines.musicgen import shm

    return shm.leftovers(state_dir / FOLDER)


def clear_up(state_dir: Path) -> None:
    """See `EngineCard`."""
    from pipeline.engines.musicgen import shm

    shm.clear_up(state_dir / FOLDER)


def check_params(params: Mapping[str, Any], settings: EngineSettings) -> None:
    """See `EngineCard`: a variation can ask for demucs, and neither it nor its weights come by themselves."""
    if params["melody"] == "demucs":
        from pipeline.engines.musicgen import demucs

        demucs.find(settings.cache_dir)


def _load(settings: EngineSettings) -> Generator:
    from pipeline.engines.musicgen import memory_budget, shm
    from pipeline.engines.musicgen.checkpoint import load_checkpoint
    from pipeline.engines.musicgen.engine import MusicgenGenerator
    from pipeline.engines.musicgen.precision import open_decoder
    from pipeline.engines.musicgen.savepoints import Savepoints
    from pipeline.weights import hub

    model = settings.model or DEFAULT_MODEL
    found = hub.locate(model, settings.revision, settings.cache_dir)
    found = found or hub.fetch(model, settings.revision, settings.cache_dir)
    checkpoint = load_checkpoint(found, settings.device, settings.threads)
    kept = settings.state_dir / FOLDER if settings.state_dir is not None else None
    opened = open_decoder(checkpoint, settings.precision, settings.threads, kept)
    memory_budget.tidy()
    return MusicgenGenerator(
        checkpoint,
        opened,
        max_memory_gb=settings.max_memory_gb,
        saved=Savepoints(None if kept is None else kept / UNFINISHED),
        shelf=shm.shelf(kept, settings.kv_cache if checkpoint.device == "cpu" else "private"),
        cache_dir=settings.cache_dir,
    )


ENGINE = EngineCard(
    name="musicgen",
    stage="generate",
    version=VERSION,
    summary="new music that follows the track's melody and a prompt (MusicGen-Melody; weights CC-BY-NC-4.0)",
    params=MusicgenParams,
    load=_load,
    packages=("torch", "torchaudio", "transformers"),
    install="pip install -r requirements.txt",
    default_model=DEFAULT_MODEL,
    license_of=license_of,
    last_check=last_check,
    leftovers=leftovers,
    clear_up=clear_up,
    check_params=check_params,
    rank=10,
)
