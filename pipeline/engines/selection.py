"""The choice of an engine for a stage, made without loading it.

`auto` takes the engine of the highest rank that can be used: its packages are installed, and its
weights, if it needs any, are on this machine. For an engine that is named there is no replacement.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipeline.engines import cards
from pipeline.engines.base import EngineCard, EngineSettings
from pipeline.errors import BadCheckpoint, MissingPackage
from pipeline.weights import hub


@dataclass(frozen=True)
class Choice:
    """The engine that a stage uses."""

    card: EngineCard
    model: str | None  # hub id or folder; None: an engine without weights
    revision: str | None  # of the weights on this machine; None: no weights, or not downloaded yet
    why: str  # reason for the choice, for the log and `doctor`
    folder: Path | None = None  # of the weights

    @property
    def license(self) -> str:
        return self.card.license_of(self.model)

    @property
    def needs_weights(self) -> bool:
        """Whether the weights have to be downloaded before the engine can be loaded."""
        return self.model is not None and self.folder is None


def select_engine(stage: str, engine: str, settings: EngineSettings) -> Choice:
    """Choose the engine for a stage: `engine` is a name or "auto".

    Raises:
        MissingPackage: packages of a named engine are not installed, or `auto` finds no engine.
        BadCheckpoint: the folder that the configuration names is not a usable checkpoint.
    """
    if engine != "auto":
        card = cards()[engine]
        if missing := missing_packages(card):
            raise MissingPackage(f"{stage}.engine {card.name} needs {', '.join(missing)}: {card.install}")
        return _with_weights(card, settings, why="named in the configuration")
    reasons = []
    for card in (card for card in cards().values() if card.stage == stage and card.is_meant_by(engine)):
        if missing := missing_packages(card):
            reasons.append(f"{card.name}: {', '.join(missing)} not installed")
            continue
        try:
            choice = _with_weights(card, settings, why="; ".join([*reasons, "auto"]))
        except BadCheckpoint as e:
            if settings.model is not None:
                raise
            reasons.append(f"{card.name}: {e}")
            continue
        if not choice.needs_weights:
            return choice
        reasons.append(f"{card.name}: no weights of {choice.model} on this machine")
    raise MissingPackage(f"no engine for {stage} can be used: {'; '.join(reasons)}")


def missing_packages(card: EngineCard) -> list[str]:
    return [name for name in card.packages if find_spec(name) is None]


def _with_weights(card: EngineCard, settings: EngineSettings, *, why: str) -> Choice:
    if card.default_model is None:
        return Choice(card, None, None, why)
    model = settings.model or card.default_model
    found = hub.locate(model, settings.revision, layout=card.layout)
    if found is None:
        return Choice(card, model, None, why)
    return Choice(card, model, found.revision, why, found.folder)
