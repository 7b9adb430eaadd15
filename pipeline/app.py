"""Puts the parts together for the command line: configuration, folders, engines, store."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.config import Config, Embed, Generate, load_config
from pipeline.engines.base import EngineSettings
from pipeline.engines.loading import Engines, LoadedEngines
from pipeline.engines.selection import Choice, select_engine
from pipeline.errors import ConfigError
from pipeline.fs.mounts import Mount, clock_is_ours, mount_of, mounts_below, needs_polling
from pipeline.intake.ingest import Ingest
from pipeline.intake.scanner import Rules, Scanner, Settling
from pipeline.intake.watcher import Watcher
from pipeline.outbox.outbox import Outbox
from pipeline.plan import Recipe, plan_variations
from pipeline.progress import Reporter
from pipeline.runner.runner import Runner
from pipeline.service.loop import Processor
from pipeline.service.signals import Signals
from pipeline.store.store import Store
from pipeline.weights import hub
from pipeline.workspace import ENGINES_FOLDER, Workspace

log = logging.getLogger("pipeline")

DEFAULT_CONFIG = Path("config/default.yaml")


@dataclass(frozen=True)
class App:
    """One configuration in one home."""

    home: Path
    config: Config
    config_path: Path | None  # None: built in
    workspace: Workspace

    @classmethod
    def open(cls, home: Path, config_path: Path | None) -> App:
        """Load the given configuration, or the home's own, or the built-in one.

        Raises:
            ConfigError, FolderUnusable: as the loaders say.
        """
        if config_path is None and (home / DEFAULT_CONFIG).exists():
            config_path = home / DEFAULT_CONFIG
        config = load_config(config_path)
        return cls(home, config, config_path, Workspace.of(home, config.folders))

    def settings(self, section: Embed | Generate) -> EngineSettings:
        model = section.model
        if model is not None and (self.home / Path(model).expanduser()).is_dir():
            model = str((self.home / Path(model).expanduser()).resolve())
        return EngineSettings(
            sample_rate=self.config.normalize.sample_rate,
            model=model,
            revision=section.revision,
            device=self.config.device,
            threads=self.config.threads,
            max_memory_gb=getattr(section, "max_memory_gb", None),
            precision=getattr(section, "precision", "auto"),
            state_dir=self.workspace.state / ENGINES_FOLDER,
        )

    def choices(self) -> tuple[Choice, Choice]:
        """The embedder and the generator, chosen without loading or fetching anything."""
        embed, generate = self.config.embed, self.config.generate
        return (
            select_engine("embed", embed.engine, self.settings(embed)),
            select_engine("generate", generate.engine, self.settings(generate)),
        )

    def check_variations(self, generator: Choice) -> None:
        """See that what the variations ask for is on this machine.

        Raises:
            MissingPackage, MissingWeights: it isn't.
        """
        settings = self.settings(self.config.generate)
        for planned in plan_variations(self.config.generate, generator.card):
            generator.card.check_params(planned.params, settings)

    @cached_property
    def recipe(self) -> Recipe:
        embedder, generator = self.choices()
        self.check_variations(generator)
        return Recipe(self.config, embedder, generator)

    def fetch_missing(self) -> None:
        """Download the weights of named engines that are not on this machine yet.

        Raises:
            MissingWeights: they can't be had now.
            MissingPackage, MissingWeights: as `check_variations` says, before anything is downloaded.
        """
        choices = self.choices()
        self.check_variations(choices[1])
        revisions = (self.config.embed.revision, self.config.generate.revision)
        for choice, revision in zip(choices, revisions, strict=True):
            if choice.needs_weights and choice.model is not None:
                log.info("fetching the weights of %s (%s)", choice.model, choice.license)
                hub.fetch(choice.model, revision, layout=choice.card.layout)

    def reopened(self) -> App:
        """The same home with its configuration read again.

        Raises:
            ConfigError: it is wrong, or asks for other folders, which takes a new start.
        """
        fresh = App.open(self.home, self.config_path)
        if fresh.workspace != self.workspace:
            raise ConfigError(f"{fresh.config_path}: other folders need a restart")
        return fresh

    def engines(self, earlier: Engines | None = None) -> Engines:
        """The chosen engines; those loaded earlier are kept if nothing about them has changed."""
        recipe = self.recipe
        for stage, choice in (("embed", recipe.embedder), ("generate", recipe.generator)):
            model = f" ({choice.model} at {(choice.revision or '')[:15]})" if choice.model else ""
            log.info("%s: %s%s: %s", stage, choice.card.name, model, choice.why)
        engines = LoadedEngines(
            recipe.embedder,
            self.settings(self.config.embed),
            recipe.generator,
            self.settings(self.config.generate),
        )
        if isinstance(earlier, LoadedEngines):
            engines.take_over(earlier)
        return engines

    def store(self, *, read_only: bool = False) -> Store | None:
        """The database; None if it is to be read only and isn't there yet."""
        if read_only and not self.workspace.database.exists():
            return None
        return Store(self.workspace.database, read_only=read_only)

    def processor(
        self,
        store: Store,
        root: Path | None,
        reporter: Reporter,
        signals: Signals,
        *,
        earlier: Runner | None = None,
    ) -> Processor:
        """What works by this configuration; `root` is a folder other than the inbox.

        `earlier` is the runner of the configuration before: what it has loaded and seen is kept.
        """
        store.remember_config(self.config.sha256, self.config.canonical())
        outbox = Outbox(self.workspace.outbox)
        folder = self.workspace.inbox if root is None else root
        intake = self.config.intake
        ingest = Ingest(
            root=folder,
            is_inbox=root is None,
            settings=intake,
            disk=self.config.disk,
            recipe=self.recipe,
            store=store,
            outbox=outbox,
            workspace=self.workspace,
            scanner=self.scanner(root),
            settling=Settling(intake.settle_s, trust_times=all(map(clock_is_ours, _mounts(folder)))),
        )
        runner = Runner(
            recipe=self.recipe,
            workspace=self.workspace,
            store=store,
            outbox=outbox,
            engines=self.engines(None if earlier is None else earlier.engines),
            reporter=reporter,
            clock=time.time,
            should_stop=signals.is_stopped,
            outbox_device=self.workspace.outbox.stat().st_dev if earlier is None else earlier.outbox_device,
        )
        return Processor(ingest, runner)

    def scanner(self, root: Path | None) -> Scanner:
        intake = self.config.intake
        rules = Rules(intake.ignore, intake.marker, intake.follow_symlinks, is_inbox=root is None)
        return Scanner(self.workspace.inbox if root is None else root, rules)

    def watcher(self, signals: Signals) -> tuple[Watcher, str]:
        """What watches the inbox, and in which mode and why."""
        wanted = self.config.intake.watch
        reasons = map(needs_polling, _mounts(self.workspace.inbox) if wanted == "auto" else ())
        reason = next(filter(None, reasons), None)
        polling = wanted == "polling" or reason is not None
        why = reason or ("named in the configuration" if wanted != "auto" else "a local file system")
        return Watcher(self.workspace.inbox, signals.wake, polling=polling), (
            f"{'polling' if polling else 'events'} ({why})"
        )


def _mounts(folder: Path) -> list[Mount | None]:
    """The file system a folder is on, and those mounted inside it."""
    return [mount_of(folder), *mounts_below(folder)]
