"""The quantized layers on the disk: what is written is read again, and what is damaged is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engines.musicgen import quantized_store
from pipeline.engines.musicgen.layers import Stack
from pipeline.engines.musicgen.precision_check import PrecisionCheck

CHECK = PrecisionCheck("a model", [0.01, float("inf")], [0.9, 1.0], 48, passed=False)


@pytest.fixture(scope="module")
def stack(musicgen: Any) -> Stack:
    return Stack.packed(musicgen.checkpoint.layers, "int8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return quantized_store.path_of(tmp_path, "sha256:12/34")


def test_what_was_saved_is_read_again(stack: Stack, path: Path, tmp_path: Path) -> None:
    quantized_store.save(path, stack, CHECK)
    found = quantized_store.read(path, stack.shape)
    assert found is not None
    for name, array in stack.arrays.items():
        np.testing.assert_array_equal(found[0].arrays[name], array)
        assert found[0].arrays[name].ctypes.data % 64 == 0
    assert found[1] == quantized_store.last_check(tmp_path) == CHECK
    assert list(tmp_path.iterdir()) == [path]


def test_each_revision_has_a_file_of_its_own(stack: Stack, path: Path, tmp_path: Path) -> None:
    quantized_store.save(path, stack, CHECK)
    assert quantized_store.read(quantized_store.path_of(tmp_path, "5678"), stack.shape) is None


def test_the_last_check_is_that_of_the_layers_that_were_used_last(
    stack: Stack, path: Path, tmp_path: Path
) -> None:
    assert quantized_store.last_check(tmp_path) is None
    other = PrecisionCheck("another", [0.01], [1.0], 48, passed=True)
    quantized_store.save(quantized_store.path_of(tmp_path, "5678"), stack, other)
    quantized_store.save(path, stack, CHECK)
    os.utime(path, (1, 1))
    assert quantized_store.last_check(tmp_path) == other
    os.utime(quantized_store.path_of(tmp_path, "5678"), (2, 2))
    quantized_store.read(path, stack.shape)
    assert quantized_store.last_check(tmp_path) == CHECK


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-9],
        lambda b: b[: len(b) // 2],
        lambda b: b"int8 layers, layout 3" + b[21:],
        lambda b: b"",
        lambda b: b[:9000] + bytes([b[9000] ^ 64]) + b[9001:],
    ],
    ids=["cut", "half", "header", "empty", "one bit"],
)
def test_damaged_layers_are_not_read(stack: Stack, path: Path, damage: Any) -> None:
    quantized_store.save(path, stack, CHECK)
    path.write_bytes(damage(path.read_bytes()))
    assert quantized_store.read(path, stack.shape) is None


def test_another_layout_is_not_read(
    stack: Stack, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized_store.save(path, stack, CHECK)
    monkeypatch.setattr(quantized_store, "LAYOUT", quantized_store.LAYOUT + 1)
    assert quantized_store.read(path, stack.shape) is None
    assert quantized_store.last_check(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_logged(
    stack: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    quantized_store.save(tmp_path / "file" / "1234.int8", stack, CHECK)
    assert "can't be stored" in caplog.text


def test_a_full_disk_is_logged_and_leaves_nothing_behind(
    stack: Stack, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    quantized_store.save(path, stack, CHECK)
    assert "can't be stored" in caplog.text
    assert not list(path.parent.iterdir())
