"""Engines loaded from tiny checkpoints, through the code that loads the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tones import RequestFn, tones

from pipeline.engines.base import EngineSettings
from pipeline.records import VariationRequest


def need_models() -> None:
    for package in ("torch", "torchaudio", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not in the core install")


@pytest.fixture(scope="session")
def musicgen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_models()
    from checkpoints import build_musicgen

    return build_musicgen(tmp_path_factory.mktemp("musicgen") / "tiny-melody")


@pytest.fixture(scope="session")
def musicgen(musicgen_folder: Path) -> Any:
    from pipeline.engines.musicgen import ENGINE

    return ENGINE.load(EngineSettings(model=str(musicgen_folder)))


@pytest.fixture(scope="session")
def stereo_musicgen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    need_models()
    from checkpoints import build_musicgen

    from pipeline.engines.musicgen import ENGINE

    folder = build_musicgen(tmp_path_factory.mktemp("musicgen") / "tiny-stereo-melody", channels=2)
    return ENGINE.load(EngineSettings(model=str(folder)))


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
