"""Which numbers the decoder calculates in, and the check of int8 at each start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from musicgen_runs import made
from tones import RequestFn

from pipeline.engines.base import EngineSettings
from pipeline.engines.musicgen import ENGINE, last_check, precision
from pipeline.engines.musicgen.layers import LayerFiles
from pipeline.errors import ConfigError


def load(folder: Path, state: Path | None = None, asked: str = "auto") -> Any:
    return ENGINE.load(EngineSettings(model=str(folder), threads=1, precision=asked, state_dir=state))


def test_int8_is_checked_and_its_figures_are_told(
    musicgen_folder: Path, tmp_path: Path, request_for: RequestFn, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        engine = load(musicgen_folder, tmp_path)
    assert engine.decoder.precision == "int8"
    assert "int8 against float32 over 48 steps: KL 0.0" in caplog.text
    assert "int8 is used" in (last_check(tmp_path) or "")
    (result,) = made(engine, request_for()).values()
    assert result.details["precision"] == "int8"
    facts = result.details["int8_check"]
    assert len(facts["kl_nats"]) == len(facts["top1"]) == 4
    assert 0 < max(facts["kl_nats"]) < precision.MAX_KL
    assert min(facts["top1"]) > 0.8


def test_float32_is_not_checked(musicgen_folder: Path, tmp_path: Path, request_for: RequestFn) -> None:
    engine = load(musicgen_folder, tmp_path, "float32")
    assert engine.decoder.precision == "float32"
    (result,) = made(engine, request_for()).values()
    assert "int8_check" not in result.details
    assert last_check(tmp_path) is None


@pytest.mark.parametrize("asked", ["auto", "int8"])
def test_an_int8_that_is_too_far_off_is_not_used(
    musicgen_folder: Path, tmp_path: Path, asked: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Quantized to three values instead of 255."""
    from pipeline.engines.musicgen import kernels

    exact = kernels.quantize_rows

    def coarse(weights: Any) -> Any:
        quantized, scales = exact(weights)
        return (quantized // 100 * 100).astype(quantized.dtype), scales

    monkeypatch.setattr(kernels, "quantize_rows", coarse)
    engine = load(musicgen_folder, tmp_path, asked)
    assert engine.decoder.precision == "float32"
    assert "float32 is used" in caplog.text
    assert "float32 is used" in (last_check(tmp_path) or "")


def test_a_second_start_reads_what_the_first_one_kept(
    musicgen_folder: Path, tmp_path: Path, request_for: RequestFn, monkeypatch: Any
) -> None:
    (first,) = made(load(musicgen_folder, tmp_path), request_for()).values()

    def nobody_reads(self: LayerFiles) -> Any:
        raise AssertionError("the float32 layers were read again")

    monkeypatch.setattr(LayerFiles, "layers", nobody_reads)
    (second,) = made(load(musicgen_folder, tmp_path), request_for()).values()
    assert first.audio.samples.tobytes() == second.audio.samples.tobytes()


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b + b"x", lambda b: b"other" + b[5:], lambda b: b""]
)
def test_what_is_damaged_on_the_disk_is_made_anew(
    musicgen_folder: Path, tmp_path: Path, request_for: RequestFn, damage: Any
) -> None:
    (first,) = made(load(musicgen_folder, tmp_path), request_for()).values()
    (layers,) = (tmp_path / "musicgen").glob("*.int8")
    whole = layers.read_bytes()
    layers.write_bytes(damage(whole))
    (second,) = made(load(musicgen_folder, tmp_path), request_for()).values()
    assert first.audio.samples.tobytes() == second.audio.samples.tobytes()
    assert layers.read_bytes() == whole


def test_int8_is_for_the_cpu(musicgen: Any) -> None:
    from dataclasses import replace

    elsewhere = replace(musicgen.checkpoint, device="cuda")
    with pytest.raises(ConfigError, match="int8 is for the CPU"):
        precision.open_decoder(elsewhere, "int8", None, None)
