"""The precision that the decoder computes in, and the check of int8."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from musicgen_setup import results_of
from tones import RequestFn

from pipeline.engines.base import EngineSettings
from pipeline.engines.musicgen import ENGINE, MusicgenSection, MusicgenUpkeep, quantized_store
from pipeline.engines.musicgen.layers import LayerFiles
from pipeline.engines.musicgen.precision import open_decoder
from pipeline.engines.musicgen.precision_check import MAX_KL
from pipeline.errors import ConfigError


def load(folder: Path, state: Path | None = None, precision: Any = "auto") -> Any:
    sections = {"musicgen": MusicgenSection(precision=precision)}
    return ENGINE.load(EngineSettings(model=str(folder), threads=1, state_dir=state, sections=sections))


def last_start(state: Path) -> str | None:
    return MusicgenUpkeep().last_start(state)


def test_int8_is_checked_and_the_figures_are_logged_and_in_the_details(
    musicgen_folder: Path, tmp_path: Path, request_for: RequestFn, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        engine = load(musicgen_folder, tmp_path)
    assert engine.decoder.precision == "int8"
    assert "int8 against float32 over 48 steps: KL 0.0" in caplog.text
    assert "int8 is used" in (last_start(tmp_path) or "")
    (result,) = results_of(engine, request_for()).values()
    assert result.details["precision"] == "int8"
    facts = result.details["int8_check"]
    assert len(facts["kl_nats"]) == len(facts["top1"]) == 4
    assert 0 < max(facts["kl_nats"]) < MAX_KL
    assert min(facts["top1"]) > 0.8


def test_float32_is_not_checked(musicgen_folder: Path, tmp_path: Path, request_for: RequestFn) -> None:
    engine = load(musicgen_folder, tmp_path, "float32")
    assert engine.decoder.precision == "float32"
    (result,) = results_of(engine, request_for()).values()
    assert "int8_check" not in result.details
    assert last_start(tmp_path) is None


@pytest.mark.parametrize("asked", ["auto", "int8"])
def test_int8_that_is_too_far_from_float32_is_not_used(
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
    assert "float32 is used" in (last_start(tmp_path) or "")


def test_a_checkpoint_that_is_not_fit_for_int8_is_used_in_float32(
    musicgen_folder: Path, tmp_path: Path, request_for: RequestFn
) -> None:
    """One input channel is 3000 times as large as the others, and its norm as much smaller.

    In float32 that is the same model; in int8 the scale of a row suits that channel alone.
    """
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(musicgen_folder, tmp_path / "outlier"))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        name = f"decoder.model.decoder.layers.{layer}."
        for norm, matrices in (
            ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("final_layer_norm", ("fc1",)),
        ):
            for part in ("weight", "bias"):
                tensors[f"{name}{norm}.{part}"][5] /= 3000
            for matrix in matrices:
                tensors[f"{name}{matrix}.weight"][:, 5] *= 3000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = load(folder, tmp_path / "state")
    assert engine.decoder.precision == "float32"
    assert not engine.check.passed
    assert max(engine.check.kl) > MAX_KL
    assert quantized_store.last_check(tmp_path / "state" / "musicgen") == engine.check
    assert load(folder, tmp_path / "state").decoder.precision == "float32"
    (result,) = results_of(engine, request_for()).values()
    assert result.details["precision"] == "float32"
    assert result.details["int8_check"] == engine.check.facts


def test_a_second_start_reads_what_the_first_one_stored(
    musicgen_folder: Path, tmp_path: Path, request_for: RequestFn, monkeypatch: Any
) -> None:
    (first,) = results_of(load(musicgen_folder, tmp_path), request_for()).values()

    def fail(self: LayerFiles) -> Any:
        raise AssertionError("the float32 layers were read again")

    monkeypatch.setattr(LayerFiles, "layers", fail)
    (second,) = results_of(load(musicgen_folder, tmp_path), request_for()).values()
    assert first.audio.samples.tobytes() == second.audio.samples.tobytes()
    assert first.details == second.details


def test_a_damaged_file_is_made_again(musicgen_folder: Path, tmp_path: Path) -> None:
    first = load(musicgen_folder, tmp_path)
    (path,) = (tmp_path / "musicgen").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert last_start(tmp_path) is None
    assert load(musicgen_folder, tmp_path).check == first.check
    assert path.stat().st_size == len(whole)
    assert "int8 is used" in (last_start(tmp_path) or "")


def test_other_weights_are_quantized_again(musicgen_folder: Path, tmp_path: Path) -> None:
    """The same folder with one weight changed."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(musicgen_folder, tmp_path / "changed"))
    first = load(folder, tmp_path).decoder.stack.arrays["down"].copy()
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.model.decoder.layers.1.fc2.weight"] *= -1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    second = load(folder, tmp_path).decoder.stack.arrays["down"]
    assert (first[0] == second[0]).all()
    assert not (first[1] == second[1]).all()


@pytest.fixture
def elsewhere(musicgen: Any) -> Any:
    """A checkpoint for a device that is not called "cpu", which stands for a GPU."""
    return replace(musicgen.checkpoint, device="cpu:0")


def test_on_a_gpu_auto_is_half_precision_if_it_is_near_float32(elsewhere: Any, tmp_path: Path) -> None:
    decoder, check = open_decoder(elsewhere, "auto", 1, tmp_path / "musicgen")
    assert decoder.precision in {"float16", "bfloat16"}
    assert check is not None
    assert check.passed
    assert f"{decoder.precision} against float32 over 48 steps" in check.words
    (stored,) = (tmp_path / "musicgen").iterdir()
    before = stored.stat().st_ino
    assert open_decoder(elsewhere, "auto", 1, tmp_path / "musicgen")[1] == check
    assert stored.stat().st_ino == before  # it was not written again
    assert f"{decoder.precision} is used" in (last_start(tmp_path) or "")
    stored.write_text("damaged")
    assert open_decoder(elsewhere, "auto", 1, tmp_path / "musicgen")[1] == check


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(
    elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert open_decoder(elsewhere, "auto", 1, None)[0].precision == "float16"


def test_half_precision_that_is_too_far_from_float32_is_not_used(
    elsewhere: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.engines.musicgen import precision_check

    monkeypatch.setattr(precision_check, "MAX_KL", 0.0)
    decoder, check = open_decoder(elsewhere, "auto", 1, None)
    assert decoder.precision == "float32"
    assert check is not None
    assert not check.passed
    assert f"{check.precision} is too far from float32" in caplog.text
    assert open_decoder(elsewhere, "float32", 1, None)[1] is None


def test_int8_is_for_the_cpu(musicgen: Any) -> None:
    elsewhere = replace(musicgen.checkpoint, device="cuda")
    with pytest.raises(ConfigError, match="int8 is for the CPU"):
        open_decoder(elsewhere, "int8", None, None)
