"""The models that the engines use: which are on this machine, and which the configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.app import App
from pipeline.engines import cards
from pipeline.weights import hub
from pipeline.weights.layout import TRANSFORMERS, Layout

MODEL_TYPES = ("musicgen_melody", "clap")
LICENSE_UNKNOWN = "licence: see the model's page on the hub"


def model_lines(app: App) -> Iterator[str]:
    """One line per cached model, then one per model that the configuration uses and that is missing."""
    cached = [one for one in hub.cached() if one.model_type in MODEL_TYPES]
    for one in cached:
        state = "" if one.complete else ", incomplete"
        yield f"{one.model} {one.revision[:12]}: {one.size_bytes / 1e9:.2f} GB ({one.model_type}{state})"
    complete = {one.model for one in cached if one.complete}
    for model, revision, terms, layout in wanted_models(app, None):
        if layout is TRANSFORMERS and model in complete:
            continue
        if (found := hub.locate(model, revision, layout=layout)) is None:
            yield f"{model}: not on this machine; {terms}; {hub.FETCH_COMMAND}"
        elif layout is not TRANSFORMERS:
            yield f"{model} {found.revision[:12]}: in {found.folder}"


def wanted_models(app: App, names: Sequence[str] | None) -> Iterator[tuple[str, str | None, str, Layout]]:
    """Model, revision, licence and layout of `names`, or of all that the configuration's engines can use."""
    for name in names or ():
        yield name, None, LICENSE_UNKNOWN, TRANSFORMERS
    if names:
        return
    for stage in app.stages:
        section = app.section(stage)
        for card in cards().values():
            is_candidate = card.stage == stage and card.is_meant_by(section.engine)
            if is_candidate and card.default_model is not None:
                model = section.model or card.default_model
                yield model, section.revision, card.license_of(model), card.layout
                yield from ((name, None, LICENSE_UNKNOWN, TRANSFORMERS) for name in card.companions)
