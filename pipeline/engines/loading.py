"""Loads engines when they are first needed. Tests pass their own engines in the place of these."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Protocol, cast

from pipeline.engines.base import Embedder, EngineSettings, Generator
from pipeline.engines.selection import Choice
from pipeline.errors import EngineUnusable, PipelineError, Stopped
from pipeline.fs.disk import environment_error

log = logging.getLogger("pipeline")


class Engines(Protocol):
    """The source of the runner's engines. Both methods raise EngineUnusable if there is none to be had."""

    def embedder(self) -> Embedder: ...
    def generator(self) -> Generator: ...


@dataclass
class LoadedEngines:
    """The chosen engines, each loaded once."""

    embedder_choice: Choice
    embedder_settings: EngineSettings
    generator_choice: Choice
    generator_settings: EngineSettings
    _embedder: Embedder | None = field(default=None, init=False)
    _generator: Generator | None = field(default=None, init=False)

    def take_over(self, earlier: LoadedEngines) -> None:
        """Use engines that are loaded already, where choice and settings are the same."""
        if (earlier.embedder_choice, earlier.embedder_settings) == (
            self.embedder_choice,
            self.embedder_settings,
        ):
            self._embedder = earlier._embedder
        if (earlier.generator_choice, earlier.generator_settings) == (
            self.generator_choice,
            self.generator_settings,
        ):
            self._generator = earlier._generator

    def embedder(self) -> Embedder:
        if self._embedder is None:
            self._embedder = cast(Embedder, _load(self.embedder_choice, self.embedder_settings))
        return self._embedder

    def generator(self) -> Generator:
        if self._generator is None:
            self._generator = cast(Generator, _load(self.generator_choice, self.generator_settings))
        return self._generator


def _load(choice: Choice, settings: EngineSettings) -> Generator | Embedder:
    """Load an engine.

    Raises:
        EngineUnusable: it can't be loaded, for whatever reason.
        FolderUnusable: the disk is full, or a folder can't be used.
    """
    start = time.perf_counter()
    try:
        engine = choice.card.load(settings)
    except (EngineUnusable, Stopped):
        raise
    except Exception as e:
        text = str(e) if isinstance(e, PipelineError) else f"{type(e).__name__}: {e}".rstrip(": ")
        sentence = f"the {choice.card.stage} engine {choice.card.name} can't be loaded: {text}"
        raise environment_error(e) or EngineUnusable(sentence) from e
    what = choice.card.name if choice.model is None else f"{choice.card.name} ({choice.model})"
    log.debug("%s loaded in %.1f s", what, time.perf_counter() - start)
    return engine
