"""Loads engines when they are first needed. Tests pass their own engines in the place of these."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from pipeline.engines.base import Embedder, Engine, EngineSettings, Generator, Rater
from pipeline.engines.selection import Choice
from pipeline.errors import EngineUnusable, PipelineError
from pipeline.fs.disk import environment_error

Wanted = tuple[Choice, EngineSettings]
EngineChoices = tuple[Wanted, Wanted, Wanted | None]  # of the stages embed, generate and judge

log = logging.getLogger("pipeline")


class Engines(Protocol):
    """The source of the runner's engines. The methods raise EngineUnusable if there is none to be had."""

    @property
    def loaded(self) -> Sequence[str]:
        """The names of those that are loaded now, with their models."""
        ...

    def embedder(self) -> Embedder: ...
    def generator(self) -> Generator: ...
    def rater(self) -> Rater | None:
        """None: the configuration has no engine for it."""
        ...


class LoadedEngines:
    """The chosen engines, each loaded once. Engines of `earlier` that are the same are used again."""

    def __init__(
        self,
        embedder: Wanted,
        generator: Wanted,
        rater: Wanted | None = None,
        earlier: LoadedEngines | None = None,
        on_change: Callable[[list[str]], None] = lambda loaded: None,
    ) -> None:
        """Args:
        on_change: called with `loaded`, now and whenever it changes.
        """
        self._wanted: EngineChoices = (embedder, generator, rater)
        before = earlier._loaded if earlier else []
        self._loaded: list[tuple[Wanted, Engine]] = [
            (wanted, engine) for wanted, engine in before if wanted in self._wanted
        ]
        self._on_change = on_change
        on_change(self.loaded)

    @property
    def loaded(self) -> list[str]:
        """See `Engines`."""
        return [_described(choice) for (choice, _), _ in self._loaded]

    def embedder(self) -> Embedder:
        return cast(Embedder, self._load_once(self._wanted[0]))

    def generator(self) -> Generator:
        return cast(Generator, self._load_once(self._wanted[1]))

    def rater(self) -> Rater | None:
        wanted = self._wanted[2]
        return None if wanted is None else cast(Rater, self._load_once(wanted))

    def _load_once(self, wanted: Wanted) -> Engine:
        for loaded, engine in self._loaded:
            if loaded == wanted:
                return engine
        engine = _load(*wanted)
        self._loaded.append((wanted, engine))
        self._on_change(self.loaded)
        return engine


def _load(choice: Choice, settings: EngineSettings) -> Engine:
    """Load an engine.

    Raises:
        EngineUnusable: it can't be loaded, for whatever reason.
        FolderUnusable: the disk is full, or a folder can't be used.
    """
    start = time.perf_counter()
    try:
        engine = choice.card.load(settings)
    except EngineUnusable:
        raise
    except Exception as e:
        text = str(e) if isinstance(e, PipelineError) else f"{type(e).__name__}: {e}".rstrip(": ")
        sentence = f"the {choice.card.stage} engine {choice.card.name} can't be loaded: {text}"
        raise environment_error(e) or EngineUnusable(sentence) from e
    log.debug("%s loaded in %.1f s", _described(choice), time.perf_counter() - start)
    return engine


def _described(choice: Choice) -> str:
    return choice.card.name if choice.model is None else f"{choice.card.name} ({choice.model})"
