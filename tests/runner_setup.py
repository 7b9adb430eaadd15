"""A runner with stub engines over real folders and a real database, and a clock that tests set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from home_folder import SAMPLE_RATE, contents, sha256_of, write_music

from pipeline.config import Config, Gates
from pipeline.engines import cards
from pipeline.engines.base import ProgressFn, StopFn
from pipeline.engines.selection import Choice
from pipeline.errors import Stopped
from pipeline.executors.inline import InlineExecutor
from pipeline.executors.judge import Judge, Verdict
from pipeline.intake.ingest import Ingest, ScanResult
from pipeline.intake.scanner import Scanner
from pipeline.intake.settling import Settling
from pipeline.outbox.outbox import Outbox
from pipeline.plan import Recipe
from pipeline.progress import LogReporter
from pipeline.records import Audio, Embedding, Failure, Variation, VariationRequest
from pipeline.runner.runner import Runner
from pipeline.stages import Finished
from pipeline.store.schema import Track
from pipeline.store.store import Store
from pipeline.workspace import InputFolder, Workspace

START_S, BACKOFF_S = 1000.0, 10.0
Answer = Callable[[VariationRequest], Variation | Failure]


def noise(request: VariationRequest) -> Variation:
    """Noise of the request's length, drawn with its seed."""
    samples = np.random.default_rng(request.seed).standard_normal(
        (1, round(request.duration_s * SAMPLE_RATE))
    )
    return Variation(request.request_id, Audio((0.1 * samples).astype(np.float32), SAMPLE_RATE))


@dataclass
class StubGenerator:
    """A generator that answers each request with a given function, and records what it was asked for."""

    answer: Answer = noise
    name: str = "stub-generator"
    version: str = "1"
    sample_rate: int = SAMPLE_RATE
    calls: list[list[str]] = field(default_factory=list)  # hashes of the tracks, per call

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        self.calls.append([request.track_id for request in requests])
        for request in requests:
            if should_stop():
                raise Stopped("asked to stop")
            result = self.answer(request)
            progress(request.request_id, 1, 1)
            yield result


@dataclass
class StubEmbedder:
    """An embedder that gives all tracks the same vector; `changes` replace fields of its result."""

    changes: dict[str, Any] = field(default_factory=dict)
    name: str = "stub-embedder"
    version: str = "1"
    dim: int = 4

    def embed(self, audio: Audio, *, should_stop: StopFn) -> Embedding:
        unit = np.array([1, 0, 0, 0], dtype=np.float32)
        times_s = np.array([[0, audio.duration_s]], dtype=np.float32)
        return replace(Embedding(unit, unit[None], times_s), **self.changes)


@dataclass
class StubRater:
    """A rater that gives each sound the ratings of a given function."""

    ratings: Callable[[Audio], dict[str, float]]
    name: str = "stub-rater"
    version: str = "1"

    def rate(self, audio: Audio, *, should_stop: StopFn) -> dict[str, float]:
        return self.ratings(audio)


@dataclass
class StubJudge:
    """A judge that passes everything, unless `verdict` says otherwise, and takes no two sounds for alike."""

    verdict: Callable[[Finished, Gates], Verdict] = lambda made, gates: Verdict((), 0.0, None, {}, made)
    alike: Callable[[Any, Any], float] = lambda one, other: 0.0

    def analyse(self, source: Audio) -> None:
        return None

    def describe(self, source: None) -> str:
        return "words"

    def judge(self, source: None, made: Finished, gates: Gates, prompt: str) -> Verdict:
        return self.verdict(made, gates)

    def sound(self, made: Audio) -> Any:
        return made

    def shared(self, one: Any, other: Any) -> float:
        return self.alike(one, other)


@dataclass
class StubEngines:
    """The engines of a runner, already loaded."""

    stub_generator: StubGenerator
    stub_embedder: StubEmbedder = field(default_factory=StubEmbedder)
    stub_rater: StubRater | None = None

    @property
    def loaded(self) -> list[str]:
        return [self.stub_embedder.name, self.stub_generator.name]

    def embedder(self) -> StubEmbedder:
        return self.stub_embedder

    def generator(self) -> StubGenerator:
        return self.stub_generator

    def rater(self) -> StubRater | None:
        return self.stub_rater


@dataclass
class UnloadableEngines(StubEngines):
    """Engines whose generator can't be loaded while `error` is set."""

    error: Exception | None = None

    def generator(self) -> StubGenerator:
        if self.error is not None:
            raise self.error
        return super().generator()


@dataclass
class RunnerSetup:
    """What a runner works with: real folders, a real database, and a clock that tests set."""

    workspace: Workspace
    config: Config
    recipe: Recipe
    store: Store
    now: float = START_S
    stop: bool = False

    @classmethod
    def at(cls, home: Path, *, count: int = 2, max_attempts: int = 1, **intake: Any) -> RunnerSetup:
        sections = {
            "executor": "inline",
            "intake": intake,
            "normalize": {"sample_rate": SAMPLE_RATE},
            "generate": {"duration_s": 0.5, "variations": [{"name": "v", "count": count}]},
            "retry": {"max_attempts": max_attempts, "backoff_s": BACKOFF_S},
        }
        config = Config.model_validate(sections)
        recipe = Recipe(
            config,
            Choice(cards()["descriptors"], None, None, "test"),
            Choice(cards()["remix"], None, None, "test"),
        )
        workspace = Workspace.of(home, config.folders)
        workspace.prepare()
        return cls(workspace, config, recipe, Store(workspace.database))

    def add_tracks(self, *names: str) -> list[str]:
        """Put a different sound under each name into the inbox and queue it; returns their hashes."""
        paths = [self.workspace.inbox / name for name in names]
        hashes = [sha256_of(write_music(path, seed=n, seconds=1.5)) for n, path in enumerate(paths)]
        assert self.ingest(settle_s=0).scan(should_stop=lambda: False).queued == len(names)
        return hashes

    def ingest(
        self, folder: InputFolder | None = None, *, settle_s: float | None = None, trust_times: bool = True
    ) -> Ingest:
        """The ingest of a folder; default: of the inbox."""
        intake, folder = self.config.intake, folder or self.workspace.input_folder
        settle_s = intake.settle_s if settle_s is None else settle_s
        return Ingest(
            folder=folder,
            settings=intake,
            recipe=self.recipe,
            store=self.store,
            outbox=Outbox(self.workspace.outbox_files),
            workspace=self.workspace,
            scanner=Scanner(folder, intake),
            settling=Settling(settle_s, trust_times=trust_times),
            clock=lambda: self.now,
        )

    def scan(self) -> ScanResult:
        return self.ingest().scan(should_stop=lambda: False)

    def runner(
        self,
        generator: StubGenerator | None = None,
        *,
        engines: StubEngines | None = None,
        outbox: Outbox | None = None,
        judge: Judge | None = None,
    ) -> Runner:
        judge = judge or StubJudge()
        return Runner(
            recipe=self.recipe,
            workspace=self.workspace,
            folder=self.workspace.input_folder,
            store=self.store,
            outbox=outbox or Outbox(self.workspace.outbox_files),
            executor=InlineExecutor(engines or StubEngines(generator or StubGenerator()), judge),
            judge=judge,
            reporter=LogReporter(),
            clock=lambda: self.now,
            should_stop=lambda: self.stop,
        )

    def track(self, sha256: str) -> Track:
        track = self.store.track(sha256)
        assert track is not None
        return track

    def states(self, hashes: Sequence[str]) -> list[tuple[str, int]]:
        """State and counted attempts of each track."""
        return [(self.track(one).state, self.track(one).attempts) for one in hashes]

    def files(self, sha256: str) -> dict[str, str]:
        return contents(self.workspace.outbox / self.track(sha256).folder)

    def manifest(self, sha256: str) -> dict[str, Any]:
        found = Outbox(self.workspace.outbox_files).read_manifest(self.track(sha256).folder)
        assert found is not None
        return found

    def outcomes(self, sha256: str) -> list[tuple[str, str | None]]:
        return [(attempt.stage, attempt.outcome) for attempt in self.store.attempts(sha256)]


def with_variation(setup: RunnerSetup, engine: str = "remix", **entry: Any) -> RunnerSetup:
    """The setup with one entry, for the generator of this name."""
    generate = {"duration_s": 0.5, "variations": [{"name": "v", **entry}]}
    config = setup.config.model_validate({**setup.config.model_dump(), "generate": generate})
    model = "a/model" if engine == "musicgen" else None
    generator = Choice(cards()[engine], model, None, "test")
    return replace(setup, config=config, recipe=replace(setup.recipe, config=config, generator=generator))


def failing_for(bad: str, error: Any) -> Answer:
    """Answers with noise for all tracks but the one with the hash `bad`."""
    return lambda request: Failure(request.request_id, error) if request.track_id == bad else noise(request)
