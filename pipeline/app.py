"""Puts the parts together for the commands: configuration, folders, engines, store, ingest and runner."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, StageSettings, load_config
from pipeline.engines.base import EngineSettings, StageName
from pipeline.engines.selection import Choice, select_engine
from pipeline.errors import ConfigError
from pipeline.executors.ray_environment import AUTO, set_environment
from pipeline.fs.files import is_in_bucket
from pipeline.fs.mounts import mounts_of
from pipeline.intake.scanner import scanner_for
from pipeline.plan import Recipe, identity_of, plan_variations
from pipeline.store.store import Store
from pipeline.weights import hub
from pipeline.workspace import ENGINES_FOLDER, InputFolder, Workspace, expand_user

if TYPE_CHECKING:
    from pipeline.engines.loading import EngineChoices
    from pipeline.executors.base import Executors
    from pipeline.executors.ray_cluster import RayCluster
    from pipeline.gallery.gallery import Gallery
    from pipeline.intake.ingest import Ingest
    from pipeline.intake.watcher import Watcher
    from pipeline.outbox.outbox import Outbox
    from pipeline.progress import Reporter
    from pipeline.runner.runner import Runner
    from pipeline.service.signals import Signals

log = logging.getLogger("pipeline")

DEFAULT_CONFIG = Path("config/default.yaml")
PRESETS = Path("config/presets")
MOST_WORKERS = 16  # of `executor.workers: auto`; each takes about 0.4 GB
OWN_PRESETS = Path(__file__).parent / "cli" / "template" / "presets"


@dataclass(frozen=True)
class App:
    """One configuration and the folders of one home."""

    home: Path
    config: Config
    config_path: Path | None  # None: the built-in configuration
    preset: str | None  # whose settings won over the configuration
    workspace: Workspace

    @classmethod
    def open(cls, home: Path, config_path: Path | None, preset: str | None = None) -> App:
        """Load the given configuration, or the home's own, or the built-in one, with a preset of the home.

        Raises:
            ConfigError, FolderUnusable: see `load_config` and `Workspace.of`.
        """
        if config_path is None and (home / DEFAULT_CONFIG).exists():
            config_path = home / DEFAULT_CONFIG
        config = load_config(config_path, preset=None if preset is None else _preset(home, preset))
        if config.executor.kind == "ray":
            set_environment(config.executor.address)
        return cls(home, config, config_path, preset, Workspace.of(home, config.folders))

    @property
    def stages(self) -> list[StageName]:
        """The stages that have an engine."""
        return ["embed", "generate"] if self.config.judge.engine == "none" else ["embed", "generate", "judge"]

    def section(self, stage: StageName) -> StageSettings:
        """The configuration of a stage."""
        section: StageSettings = getattr(self.config, stage)
        return section

    def settings(self, stage: StageName) -> EngineSettings:
        section = self.section(stage)
        model = section.model
        if model is not None and (folder := self.home / expand_user(model)).is_dir():
            model = str(folder.resolve())
        return EngineSettings(
            sample_rate=self.config.normalize.sample_rate,
            model=model,
            revision=section.revision,
            device=self.config.device,
            threads=self.config.threads,
            state_dir=self.workspace.state / ENGINES_FOLDER,
            bucket_dir=self.workspace.unfinished_in_bucket,
            sections=section.sections,
        )

    def choice(self, stage: StageName) -> Choice:
        return select_engine(stage, self.section(stage).engine, self.settings(stage))

    def check_variations(self, generator: Choice) -> None:
        """Check that this machine has what the variations' parameters need.

        Raises:
            MissingPackage, MissingWeights: it does not.
        """
        for planned in plan_variations(self.config, generator.card):
            if planned.change:
                from pipeline.audio.stretch import check_installed

                check_installed()
            if upkeep := generator.card.upkeep:
                upkeep.check_params(planned.params)

    @cached_property
    def recipe(self) -> Recipe:
        choices = {stage: self.choice(stage) for stage in self.stages}
        self.check_variations(choices["generate"])
        return Recipe(self.config, choices["embed"], choices["generate"], choices.get("judge"))

    @property
    def engine_choices(self) -> EngineChoices:
        """The engines of all stages with their settings."""
        recipe = self.recipe
        rater = (recipe.rater, self.settings("judge")) if recipe.rater else None
        return (
            (recipe.embedder, self.settings("embed")),
            (recipe.generator, self.settings("generate")),
            rater,
        )

    def fetch_missing(self) -> None:
        """Download the weights of named engines that are not on this machine yet.

        Raises:
            MissingWeights: they can't be downloaded now.
            MissingPackage, MissingWeights: see `check_variations`, which comes before any download.
        """
        # Not `self.recipe`, which is made once: the choice may be another after the download.
        choices = {stage: self.choice(stage) for stage in self.stages}
        self.check_variations(choices["generate"])
        for stage, choice in choices.items():
            if choice.needs_weights and choice.model is not None:
                log.info("fetching the weights of %s (%s)", choice.model, choice.license)
                hub.fetch(choice.model, self.section(stage).revision, layout=choice.card.layout)

    def reopened(self) -> App:
        """The same home with its configuration read again.

        Raises:
            ConfigError: it is wrong, or names other folders or another cluster, which needs a restart.
        """
        fresh = App.open(self.home, self.config_path, self.preset)
        if fresh.config.executor.address != self.config.executor.address:
            raise ConfigError(f"{fresh.config_path}: another executor.address needs a restart")
        if fresh.workspace != self.workspace:
            raise ConfigError(f"{fresh.config_path}: other folders need a restart")
        return replace(fresh, workspace=self.workspace)  # which may hold leases

    def reloaded(self, runner: Runner, signals: Signals) -> tuple[App, Ingest, Runner]:
        """The configuration read again, and what works by it in the place of `runner`.

        Raises:
            PipelineError: it can't be used; see `reopened` and `fetch_missing`.
        """
        fresh = self.reopened()
        fresh.fetch_missing()
        return fresh, *fresh.ingest_and_runner(
            runner.store, runner.folder, runner.reporter, signals, earlier=runner
        )

    @property
    def command(self) -> list[str]:
        """The words of a command line for this home before the verb, wherever it is entered."""
        script = Path(sys.argv[0])
        program = ["python", str(script.resolve())] if script.name == "run_pipeline.py" else ["variations"]
        return [*program, "--home", str(self.home.resolve())]

    def gallery(self, store: Store, outbox: Outbox) -> Gallery:
        from pipeline.gallery.gallery import Gallery
        from pipeline.search.vectors import load_vectors

        embedder = identity_of(self.recipe.embedder)
        vectors = partial(load_vectors, self.workspace.vectors, embedder, store, outbox, log.info)
        return Gallery(store, outbox, self.command, vectors)

    def open_store(self) -> Store:
        """The database for reading and writing; it is made if there is none."""
        return Store(self.workspace.database)

    def read_store(self) -> Store | None:
        """The database for reading; None if there is none yet."""
        return Store(self.workspace.database, read_only=True) if self.workspace.database.exists() else None

    def ingest_and_runner(
        self,
        store: Store,
        folder: InputFolder,
        reporter: Reporter,
        signals: Signals,
        *,
        earlier: Runner | None = None,
    ) -> tuple[Ingest, Runner]:
        """The ingest and the runner of this configuration.

        The workers of an `earlier` runner are used again, with the engines that they have loaded, if all
        engines stay the same.
        """
        from pipeline.intake.ingest import Ingest
        from pipeline.intake.settling import Settling
        from pipeline.outbox.outbox import Outbox

        recipe = self.recipe
        for stage, choice in recipe.engines.items():
            model = f" ({choice.model} at {(choice.revision or '')[:15]})" if choice.model else ""
            log.info("%s: %s%s: %s", stage, choice.card.name, model, choice.why)
        store.remember_config(self.config.sha256, self.config.canonical())
        outbox = Outbox(self.workspace.outbox_files)
        gallery = self.gallery(store, outbox) if self.config.gallery.enabled else None
        intake = self.config.intake
        trust_times = all(mount.clock_is_ours for mount in mounts_of(folder.path))
        ingest = Ingest(
            folder=folder,
            settings=intake,
            recipe=recipe,
            store=store,
            outbox=outbox,
            workspace=self.workspace,
            scanner=scanner_for(folder, intake, self.workspace.files_at(folder.path)),
            settling=Settling(intake.settle_s, trust_times=trust_times),
        )
        parts = {
            "recipe": recipe,
            "workspace": self.workspace,
            "folder": folder,
            "store": store,
            "outbox": outbox,
            "gallery": gallery,
            "reporter": reporter,
            "clock": time.time,
            "should_stop": signals.is_stopped,
        }
        return ingest, self._runner(parts, self.engine_choices, signals, earlier)

    def _runner(
        self, parts: dict[str, Any], choices: EngineChoices, signals: Signals, earlier: Runner | None
    ) -> Runner:
        from pipeline.engines.loading import LoadedEngines
        from pipeline.executors.inline import InlineExecutor
        from pipeline.executors.judge import ScoringJudge
        from pipeline.runner.parallel import ParallelRunner
        from pipeline.runner.runner import Runner

        if self.config.executor.kind == "inline":
            engines = LoadedEngines(*choices)
            judge = ScoringJudge(engines, signals.is_stopped)
            if earlier:
                earlier.close()
            return Runner(**parts, executor=InlineExecutor(engines, judge), judge=judge)
        own = LoadedEngines(*choices)  # for what is compared without a worker; none is loaded
        judge = ScoringJudge(own, signals.is_stopped)
        before = earlier.executors if isinstance(earlier, ParallelRunner) else None
        find = self._on_ray if self.config.executor.kind == "ray" else self._processes
        return ParallelRunner(
            **parts,
            executor=InlineExecutor(own, judge),
            judge=judge,
            executors=find(choices, before),
            wake=signals.wake,
        )

    def _processes(self, choices: EngineChoices, earlier: Executors | None) -> Executors:
        """The worker processes on this machine; those of `earlier` are used again."""
        from pipeline.executors.base import FixedExecutors
        from pipeline.executors.beside import beside, engines_beside, gpu_gb, parts_of, workers_beside
        from pipeline.executors.process import ProcessExecutor, n_cores, shares_of_machine

        n, idle_s = self._n_workers(), self.config.executor.idle_s
        on_gpu = self._generates_on_gpu
        # One more process normalizes the tracks that come next while a long batch is in work.
        normalizes_ahead = not on_gpu and (self._uses_models or n == 1)
        n_beside = workers_beside(n_cores() / n, choices, lambda: gpu_gb() / n) if on_gpu else 0
        n_more = n * n_beside + int(normalizes_ahead)
        caches = self.workspace.state / ENGINES_FOLDER / "numba"
        plain, divided = (shares_of_machine(n + n_more, caches, divides_cores=one) for one in (False, True))
        wanted = [(choices, share) for share in (plain if on_gpu or normalizes_ahead else divided)]
        if on_gpu:
            others = engines_beside(choices, self.config.device)  # models that embed and rate share the GPU
            wanted[n:] = [(others, share) for share in divided[n:]]
        before = parts_of(earlier.all()) if isinstance(earlier, FixedExecutors) else []
        if earlier is not None and not before:
            earlier.close()  # of a cluster
        kept = [executor for executor in before if isinstance(executor, ProcessExecutor)]
        executors = []
        for engines, share in wanted:
            same = next((one for one in kept if one.environment == share), None)
            if same:
                kept.remove(same)
                same.use(engines, idle_s)
            executors.append(same or ProcessExecutor(engines, idle_s, share))
        for executor in kept:
            executor.close()
        made = self.workspace.state / ENGINES_FOLDER / "made"
        shutil.rmtree(made, ignore_errors=True)  # what a killed owner has left
        if on_gpu:
            groups = []
            for k in range(n):
                folder = made / str(k)
                folder.mkdir(parents=True, exist_ok=True)  # on NFS, files that are open keep their folder
                tracks = self.config.generate.batch_tracks
                groups.append(beside(executors[k], executors[n + k :: n], folder, tracks))
            return FixedExecutors([one for group in zip(*groups, strict=True) for one in group])
        return FixedExecutors(executors[:n], executors[n:])

    def _on_ray(self, choices: EngineChoices, earlier: Executors | None) -> Executors:
        """The workers on a Ray cluster; `earlier` is used again if it is the same."""
        cluster = self.ray_cluster(choices)
        if earlier == cluster:
            earlier.use(choices, self.config.executor.idle_s, self.config.generate.batch_tracks)
            return earlier
        if earlier is not None:
            earlier.close()
        return cluster

    def ray_cluster(self, choices: EngineChoices) -> RayCluster:
        """The cluster of `executor: ray`, which is not connected yet."""
        from pipeline.executors.process import n_cores
        from pipeline.executors.ray_cluster import RayCluster, thread_variables
        from pipeline.executors.ray_nodes import Resources

        executor, models = self.config.executor, self._uses_models
        asked, n_threads = executor.resources_per_worker, self.config.threads or n_cores()
        gpu = asked.gpu if asked.gpu is not None else float(self.config.device != "cpu")
        on_gpu = bool(gpu) and self._generates_on_gpu
        # A worker with a GPU only makes sounds: the cores are for those beside it.
        cpu = asked.cpu or (0.0 if on_gpu else n_threads if models and not gpu else 1)
        threads: int | None = max(1, int(cpu))
        if models:
            # The bits of their results depend on the number of threads: on this machine it is left to torch,
            # as elsewhere, and on others, which may have more cores, it is as here.
            threads = None if executor.address == AUTO else n_threads
        return RayCluster(
            address=executor.address,
            workers=None if executor.workers == "auto" else executor.workers,
            resources=Resources(cpu, gpu),
            environment=thread_variables(threads),
            engines=choices,
            idle_s=executor.idle_s,
            normalizes_ahead=models and not on_gpu,
            on_gpu=on_gpu,
            batch_tracks=self.config.generate.batch_tracks,
        )

    def _n_workers(self) -> int:
        """How many processes work at the same time: one for a model, which uses all cores itself."""
        from pipeline.executors.process import n_cores

        asked = self.config.executor.workers
        if asked != "auto":
            return asked
        return 1 if self._uses_models else min(n_cores(), MOST_WORKERS)

    @property
    def _uses_models(self) -> bool:
        return any(choice.card.default_model for choice in self.recipe.engines.values())

    @property
    def _generates_on_gpu(self) -> bool:
        return self.config.device != "cpu" and self.recipe.generator.card.default_model is not None

    def watcher(self, signals: Signals) -> tuple[Watcher, str]:
        """The watcher of the inbox, and its mode with the reason for it."""
        from pipeline.intake.watcher import Watcher

        wanted = self.config.intake.watch
        mounts = mounts_of(self.workspace.inbox) if wanted == "auto" else []
        reason = next(filter(None, (mount.why_polled for mount in mounts)), None)
        if is_in_bucket(self.workspace.inbox):
            reason = "a bucket"
        polling = wanted == "polling" or reason is not None
        why = reason or ("named in the configuration" if wanted != "auto" else "a local file system")
        return Watcher(self.workspace.inbox, signals.wake, polling=polling), (
            f"{'polling' if polling else 'events'} ({why})"
        )


def _preset(home: Path, name: str) -> Path:
    """The file of a preset.

    Raises:
        ConfigError: neither the home nor this program has one of that name.
    """
    folders = (OWN_PRESETS, home / PRESETS)  # those of the home win
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise ConfigError(f"there is no preset {name}: there are {', '.join(sorted(known))}")
    return known[name]
