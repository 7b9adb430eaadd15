"""The benchmark runs from end to end, on a checkpoint of the true shape and a tiny width."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module", autouse=True)
def _bench() -> Any:
    for package in ("torch", "torchaudio", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not in the core install")
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the published configuration, but for tiny widths."""
    from true_size import build, published_config

    config = published_config()
    for part, widths in {
        "decoder": {"hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 64},
        "text_encoder": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "audio_encoder": {"num_filters": 2, "hidden_size": 16, "codebook_dim": 16, "num_lstm_layers": 1},
    }.items():
        for name, value in widths.items():
            setattr(getattr(config, part), name, value)
    folder = tmp_path_factory.mktemp("narrow")
    build(folder, config)
    return folder


@pytest.mark.long
def test_this_engine_and_its_peer_are_measured_and_compared(narrow: Path, tmp_path: Path) -> None:
    import bandwidth
    import musicgen
    import ours
    import peer_transformers
    import peers

    mine = ours.run("int8", 2, 2, folder=narrow, timed=1, state=tmp_path)
    theirs = peer_transformers.run(1, narrow, own_steps=(20, 40), timed=1)
    decode = peer_transformers.decode(narrow, 2.0)
    rates = bandwidth.Bandwidth(1e12, (("nothing", 1e12, 1e12),))
    assert [point.own for point in mine.points] == [375, 750, 1125, 1500]
    assert [point.own for point in theirs.points] == pytest.approx([4, 20, 40], abs=3)
    assert mine.variations == 2
    lines = musicgen.ratios({("int8", 2, 2): mine}, {1: theirs}, decode, rates)
    assert [line.split("×")[-1].split()[0] for line in lines] == ["transformers", "the"]
    assert "s per second of audio" in "\n".join(
        musicgen.describe(mine, decode) + peers.describe(theirs, decode)
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with two layers."""
    import true_size  # noqa: F401  # which knows where the builders are
    from checkpoints import build_musicgen

    return build_musicgen(tmp_path_factory.mktemp("tiny"))


@pytest.mark.long
@pytest.mark.parametrize("variations", [1, 3])
@pytest.mark.parametrize(
    ("peer", "tolerance"), [("torch-float32", 1e-4), ("torch-int8", 0.05), ("openvino-int8", 0.05)]
)
def test_the_peers_compute_the_librarys_logits(
    tiny: Path, peer: str, tolerance: float, variations: int
) -> None:
    """Tokens are given; a variation's two rows follow a melody and prompt, and the null condition."""
    import peer_transformers
    import torch
    from peer_openvino import OpenVINODecoder
    from peer_torch import PlainDecoder

    library, _, precision = peer.partition("-")
    pytest.importorskip(library)
    model, batch = peer_transformers.load(tiny), peer_transformers.inputs(tiny, 1)
    tokens = torch.randint(0, 2048, (variations, 4, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder: Any = (
            OpenVINODecoder(model.decoder)
            if library == "openvino"
            else PlainDecoder(model.decoder, "int8" if precision == "int8" else "float32")
        )
        decoder.prefill(peer_transformers.prefixes(model, batch), variations, 8)
        ours = torch.stack([decoder.step(tokens[..., step].repeat(2, 1)) for step in range(6)], dim=2)
        theirs = librarys_logits(model, batch, tokens)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= tolerance


def librarys_logits(model: Any, batch: Any, tokens: Any) -> Any:
    """Of conditional, then of unconditional rows, (rows, codebooks, steps, vocabulary)."""
    import torch

    (n, codebooks, steps), chroma = tokens.shape, batch["input_features"].repeat(len(tokens), 1, 1)
    null = torch.zeros_like(chroma)
    null[..., 0] = 1
    mask = batch["attention_mask"].repeat(n, 1)
    found = model(
        input_ids=batch["input_ids"].repeat(2 * n, 1),
        attention_mask=torch.cat([mask, torch.zeros_like(mask)]),
        input_features=torch.cat([chroma, null]),
        decoder_input_ids=tokens.flatten(0, 1).repeat(2, 1),
    )
    return found.logits.unflatten(0, (2 * n, codebooks))[:, :, -steps:]


@pytest.mark.long
def test_the_memory_bandwidth_is_measured() -> None:
    import bandwidth

    rates = bandwidth.measure(size_bytes=1 << 22, passes=1)
    assert rates.bytes_per_s > 1e8
    floor = bandwidth.floor(rates, 8)
    assert floor.step_s == pytest.approx(floor.bytes_per_step / rates.bytes_per_s)
