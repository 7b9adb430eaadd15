"""The quantized layers on the disk: what is written is read again, and what is damaged is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engines.musicgen.int8_check import Int8Check, Passage
from pipeline.engines.musicgen.layers import Stack
from pipeline.engines.musicgen.quantized_store import QuantizedStore, last_check

CHECK = Int8Check("a model", "1234", (0.01, 0.02), (0.9, 1.0), 48, passed=True)
PASSAGE = Passage(np.arange(192).reshape(48, 4), np.ones((48, 4, 16), np.float32))


@pytest.fixture(scope="module")
def stack(musicgen: Any) -> Stack:
    return Stack.packed(musicgen.checkpoint.layers, "int8")


@pytest.fixture
def store(tmp_path: Path) -> QuantizedStore:
    return QuantizedStore(tmp_path, CHECK.revision)


def test_what_was_saved_is_read_again(store: QuantizedStore, stack: Stack, tmp_path: Path) -> None:
    store.save(stack, PASSAGE, CHECK)
    found, passage = store.stack(stack.shape), store.passage()
    assert found is not None and passage is not None
    for name, array in stack.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    np.testing.assert_array_equal(passage.tokens, PASSAGE.tokens)
    np.testing.assert_array_equal(passage.logits, PASSAGE.logits)
    assert last_check(tmp_path) == CHECK


def test_each_revision_has_files_of_its_own(store: QuantizedStore, stack: Stack, tmp_path: Path) -> None:
    store.save(stack, PASSAGE, CHECK)
    other = QuantizedStore(tmp_path, "5678")
    assert other.stack(stack.shape) is None
    assert other.passage() is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-9],
        lambda b: b + b"x",
        lambda b: b"other" + b[5:],
        lambda b: b"",
        lambda b: b[:9000] + bytes([b[9000] ^ 64]) + b[9001:],
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
    ],
    ids=["cut", "longer", "header", "empty", "one bit", "digest"],
)
def test_damaged_layers_are_not_read(
    store: QuantizedStore, stack: Stack, tmp_path: Path, damage: Any
) -> None:
    store.save(stack, PASSAGE, CHECK)
    path = tmp_path / "1234.int8"
    path.write_bytes(damage(path.read_bytes()))
    assert store.stack(stack.shape) is None


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:200] + b"?" + b[201:]])
def test_a_damaged_passage_is_not_read(store: QuantizedStore, tmp_path: Path, damage: Any) -> None:
    store.save(None, PASSAGE, CHECK)
    path = tmp_path / "1234.passage.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert store.passage() is None


def test_a_damaged_or_missing_report_is_none(store: QuantizedStore, tmp_path: Path) -> None:
    assert last_check(tmp_path) is None
    store.save(None, None, CHECK)
    (tmp_path / "self-check.json").write_text("{}")
    assert last_check(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_logged(
    stack: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    QuantizedStore(tmp_path / "file", "1234").save(stack, PASSAGE, CHECK)
    assert "can't be stored" in caplog.text


def test_a_full_disk_is_logged_and_leaves_nothing_behind(
    store: QuantizedStore,
    stack: Stack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store.save(stack, PASSAGE, CHECK)
    assert "can't be stored" in caplog.text
    assert not list(tmp_path.iterdir())
