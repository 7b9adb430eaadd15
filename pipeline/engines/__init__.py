"""The registry of engines: every module of this package with an `ENGINE` is one, see `base`."""

from __future__ import annotations

import copyreg
import importlib
import pkgutil
from functools import cache

from pipeline.engines.base import EngineCard


@cache
def cards() -> dict[str, EngineCard]:
    """Every engine's card by name, in the order `auto` tries them: highest rank first."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        card = getattr(importlib.import_module(f"{__name__}.{module.name}"), "ENGINE", None)
        if isinstance(card, EngineCard):
            found.append(card)
    return {card.name: card for card in sorted(found, key=lambda card: (-card.rank, card.name))}


def _card_named(name: str) -> EngineCard:
    return cards()[name]


# Its functions can't be pickled, and the other process has the same card.
copyreg.pickle(EngineCard, lambda card: (_card_named, (card.name,)))
