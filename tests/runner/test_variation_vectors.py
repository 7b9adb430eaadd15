"""The vectors of a track's variations: what they are made of, and when they are made again."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from runner_setup import RunnerSetup, StubEmbedder, StubEngines, StubGenerator, noise

from pipeline.audio import DecodeLimits, decode
from pipeline.config import Embed
from pipeline.engines.base import StopFn
from pipeline.records import Audio, Embedding, Samples, Variation, VariationRequest


@dataclass
class LevelEmbedder(StubEmbedder):
    """The levels of the four quarters of a sound; fails after `lasts` sounds."""

    lasts: int = 1000
    n_sounds: int = 0

    def embed(self, audio: Audio, *, should_stop: StopFn) -> Embedding:
        self.n_sounds += 1
        if self.n_sounds > self.lasts:
            raise ValueError("no memory")
        vector = levels(audio)
        return replace(super().embed(audio, should_stop=should_stop), track=vector, windows=vector[None])


def levels(audio: Audio) -> Samples:
    found = np.array([np.abs(part).mean() for part in np.array_split(audio.samples, 4, axis=1)])
    return np.asarray(found / np.linalg.norm(found), dtype=np.float32)


def run(setup: RunnerSetup, embedder: StubEmbedder | None = None, answer: Any = noise) -> StubGenerator:
    generator = StubGenerator(answer)
    setup.runner(engines=StubEngines(generator, embedder or LevelEmbedder())).drain()
    return generator


def vectors(setup: RunnerSetup, sha256: str) -> Samples:
    path = setup.workspace.outbox / setup.track(sha256).folder / "variations.npz"
    with np.load(io.BytesIO(path.read_bytes())) as loaded:
        assert loaded.files == ["variations"]
        return np.asarray(loaded["variations"])


def sounds(setup: RunnerSetup, sha256: str) -> list[Audio]:
    """The published variations, in the order of the manifest."""
    folder, limits = setup.workspace.outbox / setup.track(sha256).folder, DecodeLimits(min_duration_s=0.0)
    return [
        decode(folder / one["file"], sample_rate=one["sample_rate"], limits=limits)[0]
        for one in setup.manifest(sha256)["variations"]
    ]


def without_vectors(setup: RunnerSetup) -> RunnerSetup:
    return with_config(setup, embed=Embed(variations=False))


def with_config(setup: RunnerSetup, **sections: Any) -> RunnerSetup:
    config = setup.config.model_copy(update=sections)
    return replace(setup, config=config, recipe=replace(setup.recipe, config=config))


def test_they_are_those_of_the_published_files_in_the_order_of_the_manifest(setup: RunnerSetup) -> None:
    hashes = setup.add_tracks("a.wav", "b.wav")
    run(setup)
    for sha256 in hashes:
        np.testing.assert_array_equal(vectors(setup, sha256), [*map(levels, sounds(setup, sha256))])
        made, files = setup.manifest(sha256), setup.files(sha256)
        record = made["variation_embeddings"]
        assert record["file"] == "variations.npz"
        assert record["sha256"] == files["variations.npz"]
        assert {key: record[key] for key in ("engine", "model", "revision", "version", "dim")} == {
            key: made["embedding"][key] for key in ("engine", "model", "revision", "version", "dim")
        }
        assert setup.outcomes(sha256)[-2:] == [("generate", "done"), ("embed-variations", "done")]


def test_a_finished_track_without_them_gets_them_and_nothing_else_is_made(setup: RunnerSetup) -> None:
    bare = without_vectors(setup)
    [sha256] = setup.add_tracks("a.wav")
    run(bare)
    before = setup.files(sha256)
    assert "variations.npz" not in before
    assert "variation_embeddings" not in setup.manifest(sha256)

    setup.store.requeue(sha256, now=setup.now)
    generator, embedder = run(setup), LevelEmbedder()

    assert generator.calls == []
    assert setup.files(sha256).items() > before.items()
    setup.store.requeue(sha256, now=setup.now)
    assert run(setup, embedder).calls == []
    assert embedder.n_sounds == 0

    setup.store.requeue(sha256, now=setup.now)
    run(bare)
    assert setup.files(sha256) == before


def test_variations_of_other_bytes_under_the_same_keys_are_embedded_again(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    run(setup)
    before = vectors(setup, sha256)

    def another(request: VariationRequest) -> Variation:
        return noise(replace(request, seed=request.seed // 2))

    setup.store.requeue(sha256, now=setup.now, stages=["generate"])
    run(setup, answer=another)

    assert not np.array_equal(vectors(setup, sha256), before)
    np.testing.assert_array_equal(vectors(setup, sha256), [*map(levels, sounds(setup, sha256))])


def test_variations_that_can_not_be_embedded_fail_their_track_and_are_kept(setup: RunnerSetup) -> None:
    good, bad = setup.add_tracks("a.wav", "b.wav")
    run(setup, LevelEmbedder(lasts=5))  # two sources and three of the four variations
    good, bad = sorted([good, bad], key=lambda sha256: setup.track(sha256).state)
    track = setup.track(bad)
    assert (track.state, track.stage, track.error) == ("failed", "embed-variations", "ValueError: no memory")

    setup.store.requeue(bad, now=setup.now)
    assert run(setup).calls == []
    assert setup.states([good, bad]) == [("done", 0), ("done", 0)]
    assert len(vectors(setup, bad)) == 2


def test_missing_ones_are_made_again_with_the_same_bytes(setup: RunnerSetup) -> None:
    [sha256] = setup.add_tracks("a.wav")
    run(setup)
    before = setup.files(sha256)
    (setup.workspace.outbox / setup.track(sha256).folder / "variations.npz").unlink()
    setup.store.requeue(sha256, now=setup.now)
    assert run(setup).calls == []
    assert setup.files(sha256) == before


def test_the_batch_is_named_again_after_the_last_steps_of_one_of_its_tracks(
    setup: RunnerSetup, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pipeline")
    setup.add_tracks("a.wav", "b.wav")
    run(setup)
    stages = [
        one.getMessage() for one in caplog.records if one.getMessage().endswith(("generate", "variations"))
    ]
    first, second = (line.split(":")[0] for line in stages if line.endswith("embed-variations"))
    assert stages == [
        "2 tracks: generate",
        f"{first}: embed-variations",
        "2 tracks: generate",
        f"{second}: embed-variations",
    ]
