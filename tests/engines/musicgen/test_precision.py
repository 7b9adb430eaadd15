"""Which numbers the decoder calculates in, and the check of int8 at each start."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from musicgen_setup import never, results_of
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
    (result,) = results_of(engine, request_for()).values()
    assert result.details["precision"] == "int8"
    facts = result.details["int8_check"]
    assert len(facts["kl_nats"]) == len(facts["top1"]) == 4
    assert 0 < max(facts["kl_nats"]) < precision.MAX_KL
    assert min(facts["top1"]) > 0.8


def test_float32_is_not_checked(musicgen_folder: Path, tmp_path: Path, request_for: RequestFn) -> None:
    engine = load(musicgen_folder, tmp_path, "float32")
    assert engine.decoder.precision == "float32"
    (result,) = results_of(engine, request_for()).values()
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


def test_a_checkpoint_that_does_not_survive_quantizing_is_used_in_float32(
    musicgen_folder: Path, tmp_path: Path, request_for: RequestFn
) -> None:
    """One input channel is 3000 times as large as the others, and its norm as much smaller.

    In float32 that is the same model; in int8 a row's scale fits that channel alone.
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
    engine, same = load(folder, tmp_path / "state"), load(musicgen_folder, asked="float32")
    assert engine.decoder.precision == "float32"
    report = precision.last_check(tmp_path / "state" / "musicgen")
    assert report is not None
    assert not report.passed
    assert max(report.kl) > precision.MAX_KL
    assert report == engine.check
    (result,) = results_of(engine, request_for()).values()
    assert result.details["precision"] == "float32"
    assert result.details["int8_check"] == engine.check.facts
    (expected,) = results_of(same, request_for()).values()
    assert result.audio.samples.shape == expected.audio.samples.shape


def test_a_second_start_reads_what_the_first_one_kept(
    musicgen_folder: Path, tmp_path: Path, request_for: RequestFn, monkeypatch: Any
) -> None:
    (first,) = results_of(load(musicgen_folder, tmp_path), request_for()).values()

    def nobody_reads(self: LayerFiles) -> Any:
        raise AssertionError("the float32 layers were read again")

    monkeypatch.setattr(LayerFiles, "layers", nobody_reads)
    (second,) = results_of(load(musicgen_folder, tmp_path), request_for()).values()
    assert first.audio.samples.tobytes() == second.audio.samples.tobytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-9],
        lambda b: b + b"x",
        lambda b: b"other" + b[5:],
        lambda b: b"",
        lambda b: b[:9000] + bytes([b[9000] ^ 64]) + b[9001:],
        lambda b: b[:-1] + b"?",
    ],
)
def test_what_is_damaged_on_the_disk_is_made_anew(
    musicgen_folder: Path, tmp_path: Path, request_for: RequestFn, damage: Any
) -> None:
    (first,) = results_of(load(musicgen_folder, tmp_path), request_for()).values()
    (layers,) = (tmp_path / "musicgen").glob("*.int8")
    whole = layers.read_bytes()
    layers.write_bytes(damage(whole))
    (second,) = results_of(load(musicgen_folder, tmp_path), request_for()).values()
    assert first.audio.samples.tobytes() == second.audio.samples.tobytes()
    assert layers.read_bytes() == whole


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:200] + b"?" + b[201:]])
def test_a_damaged_passage_is_written_anew(musicgen_folder: Path, tmp_path: Path, damage: Any) -> None:
    first = load(musicgen_folder, tmp_path)
    (passage,) = (tmp_path / "musicgen").glob("*.passage.npz")
    passage.write_bytes(damage(passage.read_bytes()))
    assert load(musicgen_folder, tmp_path).check == first.check
    assert load(musicgen_folder, tmp_path).check == first.check


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_start(
    musicgen_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "musicgen").write_text("in the way")
    assert load(musicgen_folder, tmp_path).decoder.precision == "int8"
    assert "can't be kept" in caplog.text


def test_figures_that_are_not_numbers_are_told_as_none() -> None:
    """JSON has no NaN."""
    check = precision.Check("m", "r", (float("nan"), 0.5), (0.0, 1.0), 48, passed=False)
    assert check.facts == {"kl_nats": [None, 0.5], "top1": [0.0, 1.0], "steps": 48}


def test_a_full_disk_leaves_nothing_behind(
    musicgen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import os

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        assert load(musicgen_folder, tmp_path).decoder.precision == "int8"
    assert "can't be kept" in caplog.text
    assert not list((tmp_path / "musicgen").iterdir())


def test_a_failed_request_does_not_hold_the_text_encoder(
    musicgen_folder: Path, request_for: RequestFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's traceback reaches into the preparing."""
    import gc
    import weakref

    from pipeline.engines.musicgen.checkpoint import Checkpoint

    engine = load(musicgen_folder)
    opened: list[Any] = []
    text_encoder = Checkpoint.text_encoder

    def watched(self: Checkpoint) -> Any:
        encoder = text_encoder(self)
        opened.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(Checkpoint, "text_encoder", watched)
    prepared = engine.prepare([request_for(prompt="warm"), request_for(prompt="slow", temperature=-1)], never)
    gc.collect()
    assert len(prepared) == 2
    assert [ref() for ref in opened] == [None]


def test_other_weights_have_files_of_their_own(musicgen_folder: Path, tmp_path: Path) -> None:
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


def test_on_another_device_auto_is_half_precision(musicgen: Any) -> None:
    """torch's device without data stands in for a GPU."""
    import torch

    elsewhere = replace(musicgen.checkpoint, device="meta")
    decoder, check = precision.open_decoder(elsewhere, "auto", None, None)
    assert decoder.precision in {"float16", "bfloat16"}
    assert decoder.heads.device == torch.device("meta")
    assert check is None
    exact, _ = precision.open_decoder(elsewhere, "float32", None, None)
    assert exact.precision == "float32"


def test_int8_is_for_the_cpu(musicgen: Any) -> None:
    elsewhere = replace(musicgen.checkpoint, device="cuda")
    with pytest.raises(ConfigError, match="int8 is for the CPU"):
        precision.open_decoder(elsewhere, "int8", None, None)
