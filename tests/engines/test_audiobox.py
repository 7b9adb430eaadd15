"""The rater on audiobox-aesthetics: tests that don't need its package, then tests on a tiny random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import serve
from home_folder import Home, run, write_music

from pipeline.app import App
from pipeline.cli.models import model_lines, wanted_models
from pipeline.engines import cards, selection
from pipeline.engines.audiobox import (
    AUDIOBOX,
    DEFAULT_MODEL,
    ENGINE,
    INSTALL_COMMAND,
    SAMPLE_RATE_HZ,
    ignoring_deprecations,
)
from pipeline.engines.base import EngineSettings
from pipeline.errors import BadCheckpoint, MissingPackage, Stopped
from pipeline.records import Audio
from pipeline.weights import hub

COMMIT = "0" * 39 + "1"
AXES = ["CE", "CU", "PC", "PQ"]
LICENSE = "CC-BY-4.0 (audiobox-aesthetics weights)"

# -- without the package ---------------------------------------------------------------------------


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = selection.find_spec
    monkeypatch.setattr(
        selection, "find_spec", lambda name: None if name == "audiobox_aesthetics" else known("sys")
    )


def test_a_missing_package_is_named_with_what_installs_it(not_installed: None) -> None:
    with pytest.raises(MissingPackage) as caught:
        selection.select_engine("judge", "audiobox", EngineSettings())
    assert str(caught.value) == f"judge.engine audiobox needs audiobox_aesthetics: {INSTALL_COMMAND}"


@pytest.mark.usefixtures("isolated")
def test_doctor_says_what_the_judge_needs_and_checks_the_rest(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, not_installed: None
) -> None:
    needs = f"needs audiobox_aesthetics: {INSTALL_COMMAND}"
    lines = run(capsys, monkeypatch, home, "doctor").out.splitlines()
    assert f"note  judge engine audiobox: {needs}" in lines
    assert not any("of judge" in line for line in lines)
    home.configure(judge={"engine": "audiobox"})
    ended = run(capsys, monkeypatch, home, "doctor")
    assert ended.code == 1
    assert f"bad   engine of judge: judge.engine audiobox {needs}" in ended.out.splitlines()
    assert "ok    database: not created yet" in ended.out


def test_its_model_is_wanted_only_if_it_is_named(home: Home, hub_cache: Path) -> None:
    def app(**sections: Any) -> App:
        home.configure(**sections)
        return App.open(home.folder, home.folder / "settings.yaml")

    assert list(wanted_models(app(), None)) == []
    named = app(judge={"engine": "audiobox"})
    assert list(wanted_models(named, None)) == [(DEFAULT_MODEL, None, LICENSE, AUDIOBOX)]
    assert list(model_lines(named)) == [
        f"{DEFAULT_MODEL}: not on this machine; {LICENSE}; {hub.FETCH_COMMAND}"
    ]


def safetensors_bytes() -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0"


def test_the_pickle_beside_the_weights_is_not_downloaded(home: Home, hub_cache: Path) -> None:
    pytest.importorskip("huggingface_hub")
    files = {"config.json": b"{}", "model.safetensors": safetensors_bytes(), "checkpoint.pt": b"pickle"}
    with serve(DEFAULT_MODEL, COMMIT, files) as server:
        found = hub.fetch(DEFAULT_MODEL, layout=AUDIOBOX)
    assert server.downloaded == {"config.json", "model.safetensors"}
    home.configure(judge={"engine": "audiobox"})
    app = App.open(home.folder, home.folder / "settings.yaml")
    assert list(model_lines(app)) == [f"{DEFAULT_MODEL} {COMMIT[:12]}: in {found.folder}"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"checkpoint.pt": b"pickle"}, "config.json, model.safetensors missing"),
        ({"config.json": b"{}"}, "model.safetensors missing"),
        ({"config.json": b"{}", "model.safetensors": safetensors_bytes()[:-1]}, "cut off or damaged"),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=says):
        hub.locate(str(tmp_path), layout=AUDIOBOX)


def test_the_card_is_found_without_loading_the_model() -> None:
    assert cards()["audiobox"] is ENGINE
    assert ENGINE.license_of(DEFAULT_MODEL) == LICENSE
    assert "other/model" in ENGINE.license_of("other/model")


# -- with the package ------------------------------------------------------------------------------

WAVLM = {  # as the package's own, with small widths and two layers
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
}


@pytest.fixture
def need_audiobox(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, with a small model in the place of the one whose size it fixes in its code."""
    from audiobox_aesthetics.model import aes

    settings = {**vars(aes.DEFAULT_AUDIO_CFG), **WAVLM}
    monkeypatch.setattr(aes, "DEFAULT_AUDIO_CFG", aes.WavLMConfig(settings))


@pytest.fixture
def folder(need_audiobox: None, tmp_path: Path) -> Path:
    """A checkpoint as the package's class writes it, under the id by which its predictor loads it."""
    import torch
    from audiobox_aesthetics.model.aes import AesMultiOutput

    transform = {axis: {"mean": 5.0 + n, "std": 40.0 + n} for n, axis in enumerate(AXES)}
    with torch.random.fork_rng(devices=[]), ignoring_deprecations():
        torch.manual_seed(0)
        model = AesMultiOutput(
            proj_num_layer=2, proj_ln=True, nth_layer=3, precision="bf16", target_transform=transform
        )
    made = tmp_path / DEFAULT_MODEL
    model.save_pretrained(made)
    return made


@pytest.fixture
def rater(folder: Path) -> Any:
    return ENGINE.load(EngineSettings(model=str(folder)))


def sweep(seconds: float, sample_rate: int = SAMPLE_RATE_HZ, channels: int = 1) -> Audio:
    """A tone that rises in noise, so that windows and channels differ."""
    n = round(seconds * sample_rate)
    noise = np.random.default_rng(0).normal(0, 0.05, (channels, n))
    tone = 0.3 * np.sin(2 * np.pi * np.linspace(100, 3000, n) * np.arange(n) / sample_rate)
    return Audio((noise + tone).astype(np.float32), sample_rate)


def rate(rater: Any, audio: Audio) -> dict[str, float]:
    return dict(rater.rate(audio, should_stop=lambda: False))


@pytest.mark.parametrize("seconds", [3.0, 10.0, 10.01, 25.0])
def test_ratings_are_those_of_the_packages_own_predictor(
    rater: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Reference: `AesPredictor`, which takes all windows at once; 1e-4 of about 5, what that costs."""
    import torch
    from audiobox_aesthetics.infer import AesPredictor

    audio = sweep(seconds)
    monkeypatch.chdir(tmp_path)  # where the hub id is a folder
    given = {"wav": torch.tensor(audio.samples), "sample_rate": SAMPLE_RATE_HZ}
    with ignoring_deprecations():
        [expected] = AesPredictor(None, data_col="wav").forward([given])
    found = rate(rater, audio)
    assert list(found) == AXES
    assert found == pytest.approx(expected, abs=1e-4)


def test_windows_rate_differently(rater: Any) -> None:
    """Otherwise their mean would prove nothing."""
    whole, first = sweep(20.0), sweep(20.0).samples[:, : 10 * SAMPLE_RATE_HZ]
    one, both = rate(rater, Audio(first, SAMPLE_RATE_HZ)), rate(rater, whole)
    assert all(abs(one[axis] - both[axis]) > 1e-3 for axis in AXES)


def test_a_rating_does_not_depend_on_what_was_rated_before(rater: Any) -> None:
    first = rate(rater, sweep(12.0))
    rate(rater, sweep(3.0))
    assert rate(rater, sweep(12.0)) == first


def test_other_rates_and_channels_are_brought_to_16_khz_mono(rater: Any) -> None:
    """Reference: the same, mixed and resampled beforehand; bit for bit."""
    from pipeline.audio import resample

    stereo = sweep(4.0, 44100, channels=2)
    mono = resample(Audio(stereo.mono()[None], 44100), SAMPLE_RATE_HZ)
    assert rate(rater, stereo) == rate(rater, mono)


def test_it_stops_between_windows(rater: Any) -> None:
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(Stopped):
        rater.rate(sweep(30.0), should_stop=should_stop)
    assert len(asked) == 2


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["layer_weights.PQ"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"lacks 1 of the model's weights, such as layer_weights.PQ"):
        ENGINE.load(EngineSettings(model=str(folder)))


def test_another_kind_of_model_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "clap"}')
    with pytest.raises(BadCheckpoint, match=str(folder)):
        ENGINE.load(EngineSettings(model=str(folder)))


@pytest.mark.usefixtures("isolated")
def test_takes_are_rated_and_the_manifest_says_by_what(
    home: Home, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, home.folder / "aes")
    entry = {"name": "a", "keep": "best 1 of 2", "gates": {"max_shared": 1.0}}
    home.configure(entry, judge={"engine": "audiobox", "model": "aes"})
    write_music(home.inbox / "a.wav")
    assert "judge: audiobox (named in the configuration)" in run(capsys, monkeypatch, home, "plan").out
    ended = run(capsys, monkeypatch, home, "once")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("1 done")  # and nothing of the package before it
    manifest = home.manifest()
    [made] = manifest["variations"]
    assert list(made["scores"]["rating"]) == AXES
    judge = manifest["judge"]
    assert (judge["engine"], judge["version"]) == ("audiobox", ENGINE.version)
    assert judge["revision"].startswith("sha256:")
