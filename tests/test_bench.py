"""The benchmark runs from end to end, on a checkpoint of the true shape and a tiny width."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module", autouse=True)
def _bench() -> Any:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def _models() -> None:
    for package in ("torch", "torchaudio", "transformers", "numba"):
        pytest.importorskip(package, reason=f"{package} is not in the core install")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, _models: None) -> Path:
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
def test_this_engine_and_its_peers_are_measured_and_compared(
    narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bandwidth
    import musicgen
    import ours
    import peer_openvino
    import peer_torch
    import peer_transformers

    shorter: dict[str, Any] = {"own_steps": (20, 40), "timed": 1}
    mine = ours.run("int8", 2, folder=narrow, timed=1, state=tmp_path)
    peers = {
        "torch-int8": peer_torch.run("int8", 2, narrow, **shorter),
        "transformers": peer_transformers.run(2, narrow, **shorter),
        "openvino-int8": peer_openvino.run(2, narrow, **shorter),
    }
    assert [point.own for point in mine.points] == [375, 750, 1125, 1500]
    found = {name: [run] for name, run in peers.items() if isinstance(run, peer_torch.PeerRun)}
    for [run] in found.values():
        assert [point.own for point in run.points][-2:] == pytest.approx([20, 40], abs=3)
    rates = bandwidth.Bandwidth(1e12, (("nothing", 1e12, 1e12),))
    musicgen.conclude(
        {musicgen.BASE: [mine], **found}, peer_transformers.decode(narrow, 2.0), rates, at_end=0.0
    )
    out = capsys.readouterr().out
    assert out.count("| torch, int8 |") == out.count("| transformers generate(), float32 |") == 2


def run_of(name: str, variations: int, step_s: float, others_cores: float = 0.0) -> Any:
    """Measurements of constant steps."""
    from steps import PeerRun, Point

    points = tuple(Point(239 + own, own, (step_s,)) for own in (4, 375, 1500))
    rows, first = 2 * variations, points[0]
    return PeerRun(name, variations, rows, step_s, first, points[1:], (), 0.0, 1 << 30, others_cores)


def concluded(others_cores: float, **options: Any) -> None:
    """The end of a benchmark in which a peer takes three times as long for the tokens."""
    import bandwidth
    import musicgen
    from peer_transformers import Decode

    found = {
        "engine-int8": [run_of("ours", 8, 0.1)],
        "torch-int8": [run_of("theirs", 8, 0.3, others_cores)],
    }
    rates = bandwidth.Bandwidth(1e11, ())
    musicgen.conclude(found, Decode(30.0, 8.0, 0), rates, options.pop("at_end", 0.0), **options)


def test_ratios_are_of_tokens_alone_and_with_encodec(capsys: pytest.CaptureFixture[str]) -> None:
    concluded(0.0)
    # 1503 steps of 0.1 and 0.3 s, and 8 × 8 s
    assert f"| theirs | 3.0 ({(450.9 + 64) / (150.3 + 64):.1f}) |" in capsys.readouterr().out


@pytest.mark.parametrize("busy", [{"others_cores": 0.5}, {"others_cores": 0.0, "at_end": 0.5}])
def test_a_run_beside_other_work_gives_figures_and_no_ratios(
    busy: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"No ratios(?s:.*)0\.50 cores"):
        concluded(**busy)
    concluded(**busy, figures_only=True)
    out = capsys.readouterr().out
    assert out.count("| theirs | 8 |") == 2
    assert "times as long" not in out


def test_a_busy_machine_is_not_measured() -> None:
    import musicgen

    with pytest.raises(SystemExit, match="The machine is busy"):
        musicgen.main([], busy_cores=lambda: 0.5)


def test_other_work_on_the_machine_is_seen() -> None:
    import machine

    clock = machine.Clock()
    began_s = time.process_time()
    while time.process_time() - began_s < 0.2:
        pass
    took_s = time.process_time() - began_s
    assert clock.others_cores() > 0 or not machine.read("/proc/stat")
    assert clock.others_cores(took_s) < clock.others_cores()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, _models: None) -> Path:
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
@pytest.mark.usefixtures("_models")
def test_the_memory_bandwidth_is_measured() -> None:
    import bandwidth

    rates = bandwidth.measure(size_bytes=1 << 22, passes=1)
    assert rates.bytes_per_s > 1e8
    floor = bandwidth.floor(rates, 8)
    assert floor.step_s == pytest.approx(floor.bytes_per_step / rates.bytes_per_s)


@pytest.mark.long
def test_the_cost_of_the_owner_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every task that the runner gives to a worker is answered."""
    import owner_cost

    owner_cost.measure(tmp_path, 3, 0.5)
    assert capsys.readouterr().out.split()[:4] == ["3", "0.5", "s", "0.13"]
