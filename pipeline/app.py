"""Puts the parts together for the command line: configuration, folders, engines, store."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline import weights
from pipeline.arrivals import Arrivals
from pipeline.choice import Choice, choose
from pipeline.config import Config, Embed, Generate, load_config
from pipeline.engine_room import Engines, LoadedEngines
from pipeline.engines.base import EngineSettings
from pipeline.intake import Settling
from pipeline.outbox import Outbox
from pipeline.plan import Recipe
from pipeline.report import Reporter
from pipeline.runner import Runner
from pipeline.service import Alarm
from pipeline.store import Store
from pipeline.workplace import Workplace

log = logging.getLogger("pipeline")

DEFAULT_CONFIG = Path("config/default.yaml")


@dataclass(frozen=True)
class App:
    """One configuration in one home."""

    home: Path
    config: Config
    config_path: Path | None  # None: built in
    workplace: Workplace

    @classmethod
    def open(cls, home: Path, config_path: Path | None) -> App:
        """Load the given configuration, or the home's own, or the built-in one.

        Raises:
            ConfigError, FolderUnusable: as the loaders say.
        """
        if config_path is None and (home / DEFAULT_CONFIG).exists():
            config_path = home / DEFAULT_CONFIG
        config = load_config(config_path)
        return cls(home, config, config_path, Workplace.of(home, config.folders))

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
        )

    def choices(self) -> tuple[Choice, Choice]:
        """The embedder and the generator, chosen without loading or fetching anything."""
        embed, generate = self.config.embed, self.config.generate
        return (
            choose("embed", embed.engine, self.settings(embed)),
            choose("generate", generate.engine, self.settings(generate)),
        )

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(self.config, *self.choices())

    def fetch_missing(self) -> None:
        """Download the weights of named engines that are not on this machine yet.

        Raises:
            MissingWeights: they can't be had now.
        """
        revisions = (self.config.embed.revision, self.config.generate.revision)
        for choice, revision in zip(self.choices(), revisions, strict=True):
            if choice.needs_weights and choice.model is not None:
                log.info("fetching the weights of %s (%s)", choice.model, choice.license)
                weights.fetch(choice.model, revision)

    def engines(self) -> Engines:
        recipe = self.recipe
        for stage, choice in (("embed", recipe.embedder), ("generate", recipe.generator)):
            model = f" ({choice.model} at {(choice.revision or '')[:15]})" if choice.model else ""
            log.info("%s: %s%s: %s", stage, choice.card.name, model, choice.why)
        return LoadedEngines(
            recipe.embedder,
            self.settings(self.config.embed),
            recipe.generator,
            self.settings(self.config.generate),
        )

    def store(self, *, read_only: bool = False) -> Store | None:
        """The database; None if it is to be read only and isn't there yet."""
        if read_only and not self.workplace.database.exists():
            return None
        return Store(self.workplace.database, read_only=read_only)

    def arrivals(self, store: Store, root: Path | None) -> Arrivals:
        return Arrivals(
            root=self.workplace.inbox if root is None else root,
            is_inbox=root is None,
            settings=self.config.intake,
            recipe=self.recipe,
            store=store,
            outbox=Outbox(self.workplace.outbox),
            settling=Settling(self.config.intake.settle_s),
        )

    def runner(self, store: Store, reporter: Reporter, alarm: Alarm) -> Runner:
        store.remember_config(self.config.sha256, self.config.canonical())
        return Runner(
            recipe=self.recipe,
            workplace=self.workplace,
            store=store,
            outbox=Outbox(self.workplace.outbox),
            engines=self.engines(),
            reporter=reporter,
            clock=time.time,
            should_stop=alarm.is_stopped,
        )
