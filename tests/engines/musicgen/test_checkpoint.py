"""Opening checkpoints: what is accepted, and the message for each kind of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engines import pretrained
from pipeline.engines.base import EngineSettings
from pipeline.engines.musicgen import ENGINE
from pipeline.engines.musicgen.checkpoint import load_checkpoint
from pipeline.errors import BadCheckpoint, EngineUnusable
from pipeline.weights import hub


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and graphs run on the current one, wherever their tensors are."""
    import torch

    current = list[str]()
    monkeypatch.setattr(pretrained, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for device in ("cpu", "cuda", "cuda:1"):
        pretrained.prepare(device, None)
    assert current == ["cuda:1"]


@pytest.fixture
def copy(musicgen_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(musicgen_folder, tmp_path / "copy"))


def load(folder: Path, **settings: Any) -> Any:
    return ENGINE.load(EngineSettings(model=str(folder), **settings))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "musicgen"}))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def no_feature_extractor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * 1000)


def lacks_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.lm_heads.2.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lacks_a_layers_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.model.decoder.layers.1.fc2.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def changed_decoder(folder: Path, **facts: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["decoder"].update(facts)
    (folder / "config.json").write_text(json.dumps(config))


def other_widths(folder: Path) -> None:
    changed_decoder(folder, ffn_dim=80)


def more_layers(folder: Path) -> None:
    changed_decoder(folder, num_hidden_layers=3)


def other_activation(folder: Path) -> None:
    changed_decoder(folder, activation_function="relu")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (only_pickles, "only pickled weights (pytorch_model.bin)"),
        (other_model, "holds a 'musicgen' model"),
        (no_tokenizer, "no tokenizer: tokenizer.json or spiece.model is missing"),
        (broken_tokenizer, "can't be used"),
        (no_feature_extractor, "preprocessor_config.json missing"),
        (cut_off, "cut off or damaged"),
        (not_safetensors, "not a safetensors file"),
        (lacks_a_weight, "lacks 1 of the model's weights, such as decoder.lm_heads.2.weight"),
        (lacks_a_layers_weight, "lacks decoder.model.decoder.layers.1.fc2.weight"),
        (more_layers, "lacks decoder.model.decoder.layers.2.self_attn.q_proj.weight"),
        (other_widths, "'up' weights of layer 0 have the shape (64, 32), config.json says (80, 32)"),
        (other_activation, "has the activation 'relu'; only 'gelu' is supported"),
    ],
)
def test_damage_is_named_in_one_sentence(copy: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(copy)
    with pytest.raises(BadCheckpoint) as caught:
        load(copy)
    message = str(caught.value)
    assert sentence in message
    assert str(copy) in message
    assert message.endswith(".")
    assert "\n" not in message


def test_widths_that_the_kernels_cannot_take_are_refused(copy: Path) -> None:
    changed_decoder(copy, num_attention_heads=4)
    with pytest.raises(
        BadCheckpoint, match=r"multiples of 16, and heads of 512 at most; .* heads are 8 wide"
    ):
        load(copy)


def test_code_in_the_folder_is_not_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')")
    load_checkpoint(hub.locate(str(copy)))
    assert not (copy / "ran").exists()


def test_shards_are_the_same_model(musicgen: Any, copy: Path) -> None:
    from transformers import MusicgenMelodyForConditionalGeneration

    model = MusicgenMelodyForConditionalGeneration.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="1MB")
    assert len(list(copy.glob("model-*-of-*.safetensors"))) > 2
    ours, theirs = load_checkpoint(hub.locate(str(copy))), musicgen.checkpoint
    for part in ("chroma_projection", "text_projection"):
        assert_same(getattr(ours, part), getattr(theirs, part))
    assert_same(ours.codec(), theirs.codec())
    assert_same(ours.text_encoder(), theirs.text_encoder())
    for ends in ("embeddings", "heads", "norm", "positions"):
        np.testing.assert_array_equal(
            getattr(ours.embedding_and_head(), ends), getattr(theirs.embedding_and_head(), ends)
        )
    for one, other in zip(ours.layers.layers(), theirs.layers.layers(), strict=True):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


def assert_same(ours: Any, theirs: Any) -> None:
    import torch

    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_decoders_layers_stay_in_their_files(musicgen: Any) -> None:
    layers = list(musicgen.checkpoint.layers.layers())
    assert [layer["qkv"].shape for layer in layers] == [(96, 32)] * 2


def test_a_snapshot_in_the_hubs_cache_is_loaded_by_its_id(musicgen_folder: Path, hub_cache: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = hub_cache / "models--facebook--musicgen-melody"
    shutil.copytree(musicgen_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    engine = ENGINE.load(EngineSettings())
    assert engine.checkpoint.weights == hub.Weights(
        repo / "snapshots" / commit, "facebook/musicgen-melody", commit
    )


def test_a_device_that_is_not_there_is_refused(musicgen_folder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineUnusable, match="device: cuda can't be used"):
        load(musicgen_folder, device="cuda")
