"""Engines loaded from tiny checkpoints, through the code that loads the real ones."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BuildFn, need_models
from musicgen_setup import DECODERS, generator_with, load_musicgen
from tones import RequestFn, tones

from pipeline.engines.base import EngineSettings
from pipeline.records import VariationRequest

# int8 is the default on a CPU; the two others use the same scheduler and are tested by `make test-all`.
KINDS = [pytest.param(kind, marks=[] if kind == "int8" else pytest.mark.long) for kind in DECODERS]


if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run without a GPU; it is read when Triton is imported


@pytest.fixture(scope="session")
def musicgen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> BuildFn:
    """Builds tiny checkpoints, each once; takes the options of `build_musicgen`."""
    need_models()
    from checkpoints import build_musicgen

    folder, built = tmp_path_factory.mktemp("musicgen"), {}

    def build(name: str, **options: int) -> Path:
        if name not in built:
            built[name] = build_musicgen(folder / name, **options)
        return built[name]

    return build


@pytest.fixture(scope="session")
def musicgen_folder(musicgen_checkpoint: BuildFn) -> Path:
    return musicgen_checkpoint("tiny-melody")


@pytest.fixture(scope="session")
def musicgen(musicgen_folder: Path) -> Any:
    loaded = load_musicgen(musicgen_folder)
    gc.freeze()  # the engine's garbage collections then skip the objects of the libraries and the compiler
    return loaded


@pytest.fixture(scope="session")
def stereo_musicgen(musicgen_checkpoint: BuildFn) -> Any:
    return load_musicgen(musicgen_checkpoint("tiny-stereo-melody", channels=2))


@pytest.fixture(scope="session")
def short_musicgen(musicgen_checkpoint: BuildFn) -> Any:
    """With windows of 3 s and a stride of 1.8 s, so that several windows are made quickly."""
    return load_musicgen(musicgen_checkpoint("tiny-short-melody", window_s=3))


@pytest.fixture(scope="session", params=KINDS)
def any_musicgen(musicgen: Any, request: pytest.FixtureRequest) -> Any:
    """The same checkpoint behind each kind of decoder."""
    return generator_with(musicgen.checkpoint, request.param)


@pytest.fixture(scope="session", params=KINDS)
def any_short_musicgen(short_musicgen: Any, request: pytest.FixtureRequest) -> Any:
    return generator_with(short_musicgen.checkpoint, request.param)


@pytest.fixture(scope="session")
def exact_musicgen(musicgen: Any) -> Any:
    """In float32."""
    return generator_with(musicgen.checkpoint, "float32")


@pytest.fixture(scope="session")
def exact_stereo_musicgen(stereo_musicgen: Any) -> Any:
    return generator_with(stereo_musicgen.checkpoint, "float32")


@pytest.fixture(scope="session")
def clap_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_models()
    from checkpoints import build_clap

    return build_clap(tmp_path_factory.mktemp("clap") / "tiny-clap")


@pytest.fixture(scope="session")
def clap(clap_folder: Path) -> Any:
    from pipeline.engines.clap import ENGINE

    return ENGINE.load(EngineSettings(model=str(clap_folder)))


@pytest.fixture
def request_for() -> RequestFn:
    """Makes a request: parameters by name, `pitches_hz` for the melody."""

    def make(
        name: str = "a",
        *,
        pitches_hz: tuple[float, ...] = (440.0, 554.37),
        duration_s: float = 0.5,
        seed: int = 7,
        **params: Any,
    ) -> VariationRequest:
        return VariationRequest(name, "track", tones(*pitches_hz), duration_s, seed, params)

    return make
