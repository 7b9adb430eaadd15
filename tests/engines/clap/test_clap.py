"""The CLAP embedder, on a tiny random checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engines import cards
from pipeline.engines.base import EngineSettings, TextEmbedder
from pipeline.engines.clap import BATCH_WINDOWS, ENGINE, load_clap
from pipeline.errors import BadCheckpoint, Stopped
from pipeline.records import Audio, Embedding
from pipeline.weights.hub import locate

RATE_HZ = 48000


def noise(seconds: float, sample_rate: int = RATE_HZ, channels: int = 1, seed: int = 0) -> Audio:
    """Noise that gets brighter as it goes, so that its windows differ."""
    n = round(seconds * sample_rate)
    random = np.random.default_rng(seed).normal(0, 0.1, (channels, n)).astype(np.float32)
    hum = 0.3 * np.sin(2 * np.pi * np.linspace(100, 3000, n) * np.arange(n) / sample_rate)
    return Audio(random + hum.astype(np.float32), sample_rate)


def embed(clap: Any, audio: Audio) -> Embedding:
    return clap.embed(audio, should_stop=lambda: False)


def by_hand(folder: Path, windows: list[np.ndarray]) -> np.ndarray:
    """The bare library: ClapModel, one window at a time; its vectors are of unit length."""
    import torch
    from transformers import ClapFeatureExtractor, ClapModel

    model, extractor = ClapModel.from_pretrained(folder), ClapFeatureExtractor.from_pretrained(folder)
    vectors = []
    for window in windows:
        inputs = extractor(window, sampling_rate=RATE_HZ, truncation="rand_trunc", return_tensors="pt")
        with torch.inference_mode():
            vectors.append(model.get_audio_features(**inputs).pooler_output[0].numpy())
    return np.stack(vectors)


def test_the_vector_of_30_s_is_the_mean_of_its_windows(clap: Any, clap_folder: Path) -> None:
    """Reference: `by_hand`; 1e-6, what batching and float32 cost."""
    audio = noise(30.0)
    expected = by_hand(clap_folder, np.split(audio.samples[0], 3))
    mean = expected.mean(axis=0)
    result = embed(clap, audio)
    np.testing.assert_allclose(result.windows, expected, atol=1e-6)
    np.testing.assert_allclose(result.track, mean / np.linalg.norm(mean), atol=1e-6)
    assert np.abs(expected[0] - expected[2]).max() > 1e-2  # or the mean would prove nothing


def test_vectors_are_float32_of_unit_length_and_of_the_cards_dimension(clap: Any) -> None:
    result = embed(clap, noise(20.0))
    for vectors in (result.windows, result.track[None]):
        assert vectors.dtype == np.float32
        assert vectors.shape[1] == clap.dim == 32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_the_rest_after_the_last_whole_window_is_dropped(clap: Any) -> None:
    long, whole = noise(29.9), noise(29.9)
    whole = Audio(whole.samples[:, : 20 * RATE_HZ], RATE_HZ)
    np.testing.assert_array_equal(embed(clap, long).windows, embed(clap, whole).windows)
    np.testing.assert_array_equal(embed(clap, long).times_s, [[0, 10], [10, 20]])


def test_a_short_track_is_one_window_repeated_and_padded(clap: Any, clap_folder: Path) -> None:
    """Reference: `by_hand` on 3 s, written out as three times 3 s and 1 s of silence; 1e-6."""
    audio = noise(3.0)
    padded = np.concatenate([np.tile(audio.samples[0], 3), np.zeros(RATE_HZ, np.float32)])
    result = embed(clap, audio)
    np.testing.assert_allclose(result.track, by_hand(clap_folder, [padded])[0], atol=1e-6)
    np.testing.assert_array_equal(result.times_s, [[0, 3]])


def test_vectors_of_texts_are_the_librarys_and_do_not_depend_on_the_other_texts(
    clap: Any, clap_folder: Path
) -> None:
    """Reference: ClapModel.get_text_features, one text at a time; 1e-6, what float32 costs."""
    import torch
    from transformers import AutoTokenizer, ClapModel

    texts = ["jazz music", "a much longer text about slow music with piano"]
    model, tokenizer = ClapModel.from_pretrained(clap_folder), AutoTokenizer.from_pretrained(clap_folder)
    with torch.inference_mode():
        expected = [model.get_text_features(**tokenizer(text, return_tensors="pt")) for text in texts]
    vectors = clap.embed_texts(texts)
    assert (vectors.dtype, vectors.shape) == (np.float32, (2, clap.dim))
    for vector, one in zip(vectors, expected, strict=True):
        np.testing.assert_allclose(vector, one.pooler_output[0].numpy(), atol=1e-6)
    np.testing.assert_array_equal(clap.embed_texts(texts[1:])[0], vectors[1])
    assert isinstance(clap, TextEmbedder)


def test_a_checkpoint_without_a_tokenizer_embeds_sound_but_no_texts(
    clap_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clap_folder, tmp_path / "copy"))
    for path in folder.glob("*token*"):
        path.unlink()
    clap = ENGINE.load(EngineSettings(model=str(folder)))
    embed(clap, noise(1.0))
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.json or vocab\.json is missing"):
        clap.embed_texts(["jazz"])


def test_the_same_track_gives_the_same_bits(clap: Any, clap_folder: Path) -> None:
    again = ENGINE.load(EngineSettings(model=str(clap_folder)))
    first, second = embed(clap, noise(53.0)), embed(again, noise(53.0))
    assert first.track.tobytes() == second.track.tobytes()
    assert first.windows.tobytes() == second.windows.tobytes()


def test_other_rates_and_channels_are_brought_to_48_khz_mono(clap: Any) -> None:
    """Reference: the same, resampled and mixed beforehand; bit for bit."""
    from pipeline.audio import resample

    stereo = noise(20.0, 44100, channels=2)
    mono = resample(Audio(stereo.mono()[None], 44100), RATE_HZ)
    np.testing.assert_array_equal(embed(clap, stereo).track, embed(clap, mono).track)


def test_different_sounds_have_different_vectors(clap: Any) -> None:
    assert embed(clap, noise(10.0)).track @ embed(clap, noise(10.0, seed=1)).track < 1 - 1e-6


def test_it_stops_between_batches(clap: Any) -> None:
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(Stopped):
        clap.embed(noise(10.0 * BATCH_WINDOWS + 10), should_stop=should_stop)
    assert len(asked) == 2


def test_fusion_checkpoints_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from checkpoints import build_clap

    folder = build_clap(tmp_path / "fused", fusion=True)
    with pytest.raises(BadCheckpoint, match="takes random parts of a track"):
        ENGINE.load(EngineSettings(model=str(folder)))


def test_another_kind_of_model_is_refused(clap_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clap_folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
    found = locate(str(folder))
    assert found is not None
    with pytest.raises(BadCheckpoint, match="holds a 'clip' model"):
        load_clap(found)


def test_the_card_is_found_without_loading_the_model() -> None:
    assert cards()["clap"] is ENGINE
    assert ENGINE.license_of("laion/clap-htsat-unfused") == "Apache-2.0 (CLAP weights)"
    assert "other/model" in ENGINE.license_of("other/model")
