"""The audiocraft engine: tests that don't need audiocraft, then tests on tiny random models."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import serve
from home_folder import ROOT, Home, run, write_music
from musicgen_setup import never, no_progress, results_of
from tones import A_MINOR, EVERY_PARAMETER, MELODY_OR_PROMPT, RequestFn, tones

from pipeline.app import App
from pipeline.cli.models import wanted_models
from pipeline.engines import cards, selection
from pipeline.engines.audiocraft import ENGINE, INSTALL_COMMAND, PACKAGES
from pipeline.engines.audiocraft.checkpoint import AUDIOCRAFT, FILES
from pipeline.engines.base import EngineSettings
from pipeline.engines.musicgen.windows import windows
from pipeline.errors import BadCheckpoint, MissingPackage, MissingWeights, Stopped
from pipeline.records import Audio, Failure, Variation, VariationRequest
from pipeline.weights import hub
from pipeline.weights.layout import TRANSFORMERS

MODEL, COMMIT = "facebook/musicgen-melody", "0" * 39 + "1"
HOP = 640


# -- without audiocraft ----------------------------------------------------------------------------


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "find_spec", lambda name: None if name == "audiocraft" else object())
    with pytest.raises(MissingPackage) as caught:
        selection.select_engine("generate", "audiocraft", EngineSettings())
    assert str(caught.value) == f"generate.engine audiocraft needs audiocraft: {INSTALL_COMMAND}"


def test_the_requirements_name_both_commands_and_every_package() -> None:
    text = (ROOT / "requirements-audiocraft.txt").read_text()
    assert " && ".join(re.findall(r"^#     (pip install .*)$", text, re.MULTILINE)) == INSTALL_COMMAND
    required = set(re.findall(r"^([\w-]+)==", text, re.MULTILINE))
    assert required == set(PACKAGES) - {"torch", "torchaudio", "transformers", "audiocraft"}


def test_auto_never_chooses_it(monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> None:
    """Even with every package installed and its weights at hand, and no other engine's."""
    monkeypatch.setattr(selection, "find_spec", lambda name: object())
    settings = EngineSettings()
    snapshot = hub_cache / f"models--{MODEL.replace('/', '--')}" / "snapshots" / COMMIT
    write(snapshot, archives())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    assert selection.select_engine("generate", "auto", settings).card.name == "remix"
    named = selection.select_engine("generate", "audiocraft", settings)
    assert (named.model, named.revision, named.folder) == (MODEL, COMMIT, snapshot)
    assert named.license == "CC-BY-NC-4.0 (MusicGen weights)"
    assert cards()["audiocraft"] is ENGINE


def test_auto_doesnt_fetch_its_weights_and_naming_it_fetches_all_of_them(home: Home) -> None:
    def wanted(engine: str) -> list[tuple[str, Any]]:
        home.configure(generate={"engine": engine})
        app = App.open(home.folder, home.folder / "settings.yaml")
        return [(model, layout) for model, _, _, layout in wanted_models(app, None)]

    assert wanted("auto") == [(MODEL, TRANSFORMERS)]
    assert wanted("audiocraft") == [(MODEL, AUDIOCRAFT), ("google-t5/t5-base", TRANSFORMERS)]


def archives() -> dict[str, bytes]:
    """The two files of a checkpoint, as archives without weights."""
    files = {}
    for name in FILES:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(f"{name}/version", "3")
        files[name] = buffer.getvalue()
    return files


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_only_the_two_files_of_a_checkpoint_are_downloaded_from_the_hub(hub_cache: Path) -> None:
    pytest.importorskip("huggingface_hub")
    others = {"config.json": b"{}", "model.safetensors": b"-", "preprocessor_config.json": b"{ }"}
    with serve(MODEL, COMMIT, {**archives(), **others}) as server:
        found = hub.fetch(MODEL, layout=AUDIOCRAFT)
    assert server.downloaded == set(FILES)
    assert hub.locate(MODEL, layout=AUDIOCRAFT) == found
    assert hub.locate(MODEL) is None
    (found.folder / FILES[1]).unlink()
    assert hub.locate(MODEL, layout=AUDIOCRAFT) is None


def test_a_text_encoder_needs_no_preprocessor(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    assert hub.locate(str(tmp_path)) is not None
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"preprocessor_config.json missing"):
        hub.locate(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "state_dict.bin, compression_state_dict.bin missing."),
        ({"state_dict.bin": b""}, ": compression_state_dict.bin missing."),
        ({"config.json": b"{}", "model.safetensors": b""}, "use the engine musicgen"),
        ({FILES[0]: archives()[FILES[0]], FILES[1]: archives()[FILES[1]][:-1]}, f"{FILES[1]} is cut off"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused_with_the_reason(
    tmp_path: Path, files: dict[str, bytes], sentence: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(BadCheckpoint) as caught:
        hub.locate(str(tmp_path), layout=AUDIOCRAFT)
    assert sentence in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_local_checkpoints_differ_by_their_fingerprints(tmp_path: Path) -> None:
    write(tmp_path, archives())
    before = hub.locate(str(tmp_path), layout=AUDIOCRAFT)
    (tmp_path / FILES[0]).write_bytes(b"PK" + archives()[FILES[0]])
    after = hub.locate(str(tmp_path), layout=AUDIOCRAFT)
    assert before is not None
    assert after is not None
    assert before.revision.startswith("sha256:")
    assert before.revision != after.revision


# -- with audiocraft -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def need_audiocraft() -> None:
    import torch

    logging.getLogger("xformers").setLevel(logging.ERROR)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import audiocraft.models  # noqa: F401


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads make models as small as these slower."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(need_audiocraft: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 2 s, so strides of 1.2 s."""
    from audiocraft_models import build

    return build(tmp_path_factory.mktemp("audiocraft") / "tiny-melody")


@pytest.fixture(scope="session")
def engine(folder: Path) -> Any:
    return ENGINE.load(EngineSettings(model=str(folder)))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.fixture
def asked(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The models that were requested from the hub, which can't be reached."""
    names: list[str] = []

    def fetch(model: str, *args: Any, **options: Any) -> Any:
        names.append(model)
        raise MissingWeights(f"{model} is not on this machine.")

    monkeypatch.setattr(hub, "fetch", fetch)
    yield names


def samples(engine: Any, request: VariationRequest) -> np.ndarray:
    (result,) = results_of(engine, request).values()
    return result.audio.samples


@EVERY_PARAMETER
def test_every_parameter_changes_the_result(engine: Any, request_for: RequestFn, change: dict) -> None:
    assert not np.array_equal(samples(engine, request_for()), samples(engine, request_for(**change)))


@MELODY_OR_PROMPT
def test_melody_and_prompt_change_the_result_at_temperature_0_without_guidance(
    engine: Any, request_for: RequestFn, change: dict
) -> None:
    plain = {"temperature": 0.0, "guidance": 1.0}
    assert not np.array_equal(
        samples(engine, request_for(**plain)), samples(engine, request_for(**plain, **change))
    )


def test_a_request_gives_the_same_bits_alone_in_a_batch_and_in_any_order(
    engine: Any, request_for: RequestFn
) -> None:
    """The other requests set parameters that audiocraft stores in its model."""
    requests = [
        request_for("a"),
        request_for("b", pitches_hz=A_MINOR, prompt="warm synths", guidance=1.0, duration_s=2.5),
        request_for("c", seed=0, temperature=0.0, top_k=3, top_p=0.4, duration_s=0.7),
    ]
    together, reversed_ = results_of(engine, *requests), results_of(engine, *reversed(requests))
    for request in requests:
        (alone,) = results_of(engine, request).values()
        for other in (together[request.request_id], reversed_[request.request_id]):
            assert alone.audio.samples.tobytes() == other.audio.samples.tobytes()


def test_the_global_random_state_is_not_used(folder: Path, request_for: RequestFn) -> None:
    import torch

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    samples(ENGINE.load(EngineSettings(model=str(folder))), request_for(prompt="piano"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("duration_s", [0.05, 0.58, 1.013, 2.0, 2.01, 5.0])
def test_the_result_has_the_asked_length_in_one_window_or_more(
    engine: Any, request_for: RequestFn, duration_s: float
) -> None:
    (result,) = results_of(engine, request_for(duration_s=duration_s)).values()
    assert result.audio.samples.shape == (1, round(duration_s * 32000))
    assert result.audio.samples.dtype == np.float32
    assert result.audio.sample_rate == engine.sample_rate == 32000
    frames = max(4, math.ceil(round(duration_s * 32000) / HOP))
    assert result.details == {"frames": frames, "windows": len(windows(frames, 100, 60))}


def test_progress_counts_all_steps_of_all_windows(engine: Any, request_for: RequestFn) -> None:
    seen: list[tuple[str, int, int]] = []
    requests = [request_for("a"), request_for("b", duration_s=2.5)]
    list(engine.generate(requests, progress=lambda *step: seen.append(step), should_stop=never))
    for name, steps in (("a", 25 + 3), ("b", (100 + 3) + (25 + 3))):  # frames, and the last codebook's lag
        assert [step for step in seen if step[0] == name] == [(name, n, steps) for n in range(1, steps + 1)]


def test_it_stops_within_one_step_and_the_next_request_is_not_affected(
    engine: Any, request_for: RequestFn
) -> None:
    seen: list[int] = []

    def progress(request_id: str, done: int, total: int) -> None:
        seen.append(done)

    (undisturbed,) = results_of(engine, request_for("a")).values()
    results = engine.generate(
        [request_for("a"), request_for("b", duration_s=20.0)],
        progress=progress,
        should_stop=lambda: len(seen) >= 28 + 5,
    )
    assert isinstance(next(results), Variation)
    with pytest.raises(Stopped):
        next(results)
    assert seen[28:] == [1, 2, 3, 4, 5]
    (again,) = results_of(engine, request_for("a")).values()
    assert again.audio.samples.tobytes() == undisturbed.audio.samples.tobytes()


def test_it_does_not_start_when_already_asked_to_stop(engine: Any, request_for: RequestFn) -> None:
    with pytest.raises(Stopped):
        next(engine.generate([request_for()], progress=no_progress, should_stop=lambda: True))


@pytest.mark.parametrize(("prompt", "duration_s"), [("warm piano", 1.0), ("", 19.0)])
def test_the_result_is_that_of_audiocraft(
    need_audiocraft: None, tmp_path: Path, prompt: str, duration_s: float
) -> None:
    """Reference: MusicGen.get_pretrained, its own conditioners and settings, all of the source; bit for bit.

    Its separation of sources is left out. The checkpoint asks for two-step guidance with a coefficient of 9,
    which the request's guidance must override. audiocraft refuses windows of less than 18 s.
    """
    import torch
    from audiocraft.models import MusicGen
    from audiocraft_models import as_audiocraft, build

    folder = build(tmp_path / "reference", window_s=18.5)
    source = tones(440.0, 554.37, 659.26, 493.88, 587.33, seconds=45.0)
    settings = {"temperature": 1.2, "top_k": 60, "top_p": 0.0}
    params = {**settings, "prompt": prompt, "guidance": 4.0}
    request = VariationRequest("a", "t", source, duration_s, 11, params)
    ours = samples(ENGINE.load(EngineSettings(model=str(folder))), request)
    with as_audiocraft(folder), torch.random.fork_rng(devices=[]):
        theirs = MusicGen.get_pretrained(str(folder), device="cpu")
        theirs.set_generation_params(**settings, cfg_coef=4.0, duration=duration_s, extend_stride=0.6 * 18.5)
        torch.manual_seed(11)
        sound = theirs.generate_with_chroma([prompt], torch.from_numpy(source.samples)[None], 44100)
    np.testing.assert_array_equal(ours, sound[0].numpy())


def test_a_stereo_model_makes_two_different_channels(
    need_audiocraft: None, tmp_path: Path, request_for: RequestFn
) -> None:
    from audiocraft_models import build

    stereo = ENGINE.load(EngineSettings(model=str(build(tmp_path / "stereo", stereo=True))))
    mono_source = request_for("b", duration_s=1.013)
    left_only = Audio(mono_source.audio.samples[:1], mono_source.audio.sample_rate)
    results = results_of(
        stereo,
        request_for("a", duration_s=1.013),
        VariationRequest("b", "track", left_only, 1.013, 7, {}),
    )
    for result in results.values():
        assert result.audio.samples.shape == (2, round(1.013 * 32000))
        assert not np.array_equal(*result.audio.samples)


@pytest.mark.parametrize("name", ["t5-small", "google-t5/t5-small"])
def test_t5_is_found_in_the_hubs_cache_under_either_of_its_names(
    name: str, copied: Path, hub_cache: Path, request_for: RequestFn, engine: Any
) -> None:
    repo = hub_cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "snapshots").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (copied / "t5-small").rename(repo / "snapshots" / COMMIT)
    found = ENGINE.load(EngineSettings(model=str(copied)))
    request = request_for(prompt="slow drums")
    np.testing.assert_array_equal(samples(found, request), samples(engine, request))


def test_a_t5_that_is_not_on_this_machine_is_fetched(copied: Path, asked: list[str]) -> None:
    shutil.rmtree(copied / "t5-small")
    with pytest.raises(MissingWeights, match="google-t5/t5-small"):
        ENGINE.load(EngineSettings(model=str(copied)))
    assert asked == ["google-t5/t5-small"]


def test_an_encodec_that_the_checkpoint_only_names_is_loaded_from_safetensors(
    copied: Path, asked: list[str], request_for: RequestFn
) -> None:
    """As audiocraft's own export writes fine-tuned checkpoints; EnCodec in transformers' format."""
    import torch
    from checkpoints import _audio_encoder
    from transformers import EncodecConfig, EncodecFeatureExtractor, EncodecModel

    torch.save({"pretrained": "facebook/encodec_32khz", "exported": True}, copied / FILES[1])
    settings = EngineSettings(model=str(copied))
    with pytest.raises(MissingWeights, match="facebook/encodec_32khz"):
        ENGINE.load(settings)
    assert asked == ["facebook/encodec_32khz"]

    described = _audio_encoder()
    described.pop("model_type")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encodec = EncodecModel(EncodecConfig(**described))
        for layer in encodec.quantizer.layers:
            torch.nn.init.normal_(layer.codebook.embed)
    encodec.save_pretrained(copied / "facebook" / "encodec_32khz")
    EncodecFeatureExtractor(sampling_rate=32000).save_pretrained(copied / "facebook" / "encodec_32khz")
    (result,) = results_of(ENGINE.load(settings), request_for()).values()
    assert isinstance(result, Variation), result.error
    assert result.audio.samples.shape == (1, 16000)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of the checkpoint was run",))


def with_code(content: dict) -> None:
    content["best_state"]["evil"] = Evil()


def fresh_from_training(content: dict) -> None:
    from omegaconf import OmegaConf

    content["xp.cfg"] = OmegaConf.create(content["xp.cfg"])


def without_weight(content: dict) -> None:
    del content["best_state"]["linears.0.weight"]


def text_only(content: dict) -> None:
    melody = re.compile(r"  self_wav:\n    model.*?(?=  description:)", re.DOTALL)
    content["xp.cfg"] = melody.sub("", content["xp.cfg"])


def normalizing(content: dict) -> None:
    content["xp.cfg"] = content["xp.cfg"].replace("normalize_text: false", "normalize_text: true")


def no_yaml(content: dict) -> None:
    content["xp.cfg"] = "a: [1"


def no_width(content: dict) -> None:
    content["xp.cfg"] = content["xp.cfg"].replace("  dim: 32\n", "")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (with_code, "never loaded because it can run code"),
        (fresh_from_training, "export it with audiocraft.utils.export"),
        (dict.clear, "KeyError"),
        (normalizing, "normalizes prompts with spaCy"),
        (without_weight, "linears.0.weight"),
        (text_only, "not conditioned on a melody and a prompt"),
        (no_yaml, "can't be used"),
        (no_width, "can't be used"),
    ],
)
def test_a_checkpoint_that_cant_be_used_says_why(
    copied: Path, damage: Callable[[dict], None], sentence: str
) -> None:
    import torch

    content = torch.load(copied / FILES[0], weights_only=True)
    damage(content)
    torch.save(content, copied / FILES[0])
    with pytest.raises(BadCheckpoint) as caught:
        ENGINE.load(EngineSettings(model=str(copied)))
    assert sentence in str(caught.value)
    assert FILES[0] in str(caught.value)


def nan_logits(engine: Any) -> None:
    engine.language_model.linears[0].weight.fill_(float("nan"))


def misfit(engine: Any) -> None:
    projection = engine.language_model.condition_provider.conditioners["self_wav"].output_proj
    projection.weight.data = projection.weight.data[:, :3]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(nan_logits, "nan"), (misfit, "mat1 and mat2")],
)
def test_an_error_of_the_model_fails_each_request(
    folder: Path, request_for: RequestFn, damage: Callable[[Any], None], sentence: str
) -> None:
    import torch

    broken = ENGINE.load(EngineSettings(model=str(folder)))
    with torch.no_grad():
        damage(broken)
    results = results_of(broken, request_for("a"), request_for("b"))
    assert [type(result) for result in results.values()] == [Failure, Failure]
    assert isinstance(results["a"].error, RuntimeError)
    assert sentence in str(results["a"].error)


def test_the_program_makes_variations_with_it_and_records_that(
    folder: Path,
    home: Home,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    isolated: None,
) -> None:
    home.configure(
        {"name": "near", "prompt": "warm synths", "seed": 0},
        generate={"engine": "audiocraft", "model": str(folder), "duration_s": 2.5},
    )
    write_music(home.inbox / "song.wav")
    ended = run(capsys, monkeypatch, home, "once")
    assert ended.code == 0, ended.err
    (variation,) = home.manifest()["variations"]
    assert (variation["engine"], variation["version"], variation["model"]) == ("audiocraft", "1", str(folder))
    assert variation["revision"].startswith("sha256:")
    assert variation["params"]["guidance"] == 3.0
    assert variation["duration_s"] == 2.5
    assert "that of the checkpoint in tiny-melody" in variation["license"]
