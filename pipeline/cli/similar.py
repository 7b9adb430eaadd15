"""`similar`, which finds what sounds alike, and the library whose vectors `embeddings export` writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from pipeline import stages
from pipeline.app import App
from pipeline.cli.score import read_sound
from pipeline.engines import cards
from pipeline.engines.base import Embedder, TextEmbedder
from pipeline.engines.selection import Choice
from pipeline.errors import BadAudio, ConfigError, MissingWeights, UnknownTrack
from pipeline.fs.copying import hash_file
from pipeline.fs.files import bucket_path
from pipeline.fs.names import printable
from pipeline.outbox.outbox import Outbox
from pipeline.plan import identity_of
from pipeline.records import Samples
from pipeline.search.large import candidates
from pipeline.search.nearest import combined, near_duplicates, nearest
from pipeline.search.vectors import Vectors, load_vectors
from pipeline.store.schema import Track
from pipeline.store.store import Store
from pipeline.weights import hub


@dataclass
class Library:
    """The vectors of the configured embedder, and what they are of."""

    app: App
    choice: Choice
    store: Store
    outbox: Outbox
    vectors: Vectors
    queried: set[int] = field(default_factory=set)  # the rows that were asked for
    _tracks: dict[str, Track | None] = field(default_factory=dict)

    @classmethod
    def open(cls, app: App, say: Callable[[str], None]) -> Library:
        """Bring the vectors up to date; `say`: see `load_vectors`.

        Raises:
            UnknownTrack: there are no vectors.
            MissingWeights: which vectors are meant can't be told before the weights are on this machine.
        """
        store, choice = app.read_store(), app.choice("embed")
        if store is None:
            raise UnknownTrack("nothing has been processed yet")
        if choice.needs_weights:
            raise MissingWeights(f"{choice.model} is not on this machine: {hub.FETCH_COMMAND}")
        outbox = Outbox(app.workspace.outbox_files)
        vectors = load_vectors(app.workspace.vectors, identity_of(choice), store, outbox, say)
        if not len(vectors.rows):
            raise UnknownTrack(
                f"no finished track has vectors by {choice.card.name} ({choice.why}): `once` makes them, or"
                " set embed.engine to the engine that has made the vectors in the outbox"
            )
        return cls(app, choice, store, outbox, vectors)

    # -- queries ---------------------------------------------------------------------------------

    def vector_of(self, wanted: str) -> Samples:
        """The vector of a file, or of the source of a track.

        Raises:
            UnknownTrack: there is no such file or track, or it has no vector.
            BadAudio: the file can't be used.
        """
        path = Path(wanted)
        row = self._row_in_outbox(wanted)
        if row is None and path.is_file():
            row = self.vectors.find(hash_file(path))
            if row is None:
                return self._embedded(path)
        if row is None:
            track = self._track(wanted)
            row = self.vectors.find(track)
        if row is None:
            raise UnknownTrack(
                f"{wanted} has no vector by {self.choice.card.name}: it isn't finished, or `requeue` it"
            )
        self.queried.add(row)
        return np.asarray(self.vectors.matrix[row])

    def _track(self, wanted: str) -> str:
        try:
            return self.store.find(wanted).sha256
        except UnknownTrack as e:
            raise UnknownTrack(f"{wanted} is no file, and {e}") from e

    def _row_in_outbox(self, wanted: str) -> int | None:
        """The row of a variation that is given by its path or URL."""
        place = bucket_path(wanted) or Path(os.path.realpath(wanted))
        if not place.is_relative_to(self.outbox.root) or len(place.parts) < len(self.outbox.root.parts) + 3:
            return None
        folder = place.parent.parent
        manifest = self.outbox.read_manifest(str(folder.relative_to(self.outbox.root)))
        if manifest is None:
            return None
        return self.vectors.find(manifest["source"]["sha256"], str(place.relative_to(folder)))

    def _embedded(self, path: Path) -> Samples:
        """The vector of a file as if it were a source of the library."""
        decoded = read_sound(self.app, path)
        try:
            sound = stages.normalize(decoded, self.app.config.normalize).audio
        except BadAudio as e:
            raise BadAudio(f"{printable(path)} {e}") from e
        return self._embedder.embed(sound, should_stop=lambda: False).track

    def vectors_of_texts(self, texts: Sequence[str]) -> list[Samples]:
        """The vectors of texts.

        Raises:
            ConfigError: the embedder knows no texts.
        """
        if not texts:
            return []
        if not isinstance(embedder := self._embedder, TextEmbedder):
            install = cards()["clap"].install
            raise ConfigError(
                f"texts can't be compared with vectors by {self.choice.card.name}: set embed.engine: clap"
                f" (`{install}`, then `{hub.FETCH_COMMAND}`), and process the library with it"
            )
        return list(embedder.embed_texts(texts))

    @cached_property
    def _embedder(self) -> Embedder:
        return cast(Embedder, self.choice.card.load(self.app.settings("embed")))

    # -- results ---------------------------------------------------------------------------------

    def describe(self, row: int) -> dict[str, Any] | None:
        """What a row is of; None if its track was removed meanwhile."""
        sha256, file, variation = self.vectors.row(row)
        if sha256 not in self._tracks:
            self._tracks[sha256] = self.store.track(sha256)
        if (track := self._tracks[sha256]) is None:
            return None
        paths = [self.outbox.root / track.folder / file] if file else self._sources(sha256)
        return {
            "name": f"{track.name} ({variation})" if file else track.name,
            "variation": variation or None,
            "track": sha256,
            "file": printable(paths[-1]) if paths else None,
        }

    def _sources(self, sha256: str) -> list[Path]:
        """Where the files of a track are now."""
        return [file.current_path for file in self.store.files_of(sha256)]

    def everything(self) -> tuple[Samples, list[dict[str, Any]]]:
        """All vectors, (n, d), and what they are of."""
        described = [(row, what) for row in range(len(self.vectors.rows)) if (what := self.describe(row))]
        return self.vectors.matrix[[row for row, _ in described]], [what for _, what in described]

    @property
    def engine(self) -> dict[str, str]:
        """The engine of the vectors."""
        card = self.choice.card
        facts = {"engine": card.name, "model": self.choice.model, "revision": self.choice.revision}
        return {
            name: value for name, value in {**facts, "version": card.version}.items() if value is not None
        }


def similar_facts(
    library: Library,
    wanted: Sequence[str],
    unwanted: Sequence[str],
    *,
    texts: Sequence[str],
    unwanted_texts: Sequence[str],
    top: int,
) -> list[dict[str, Any]]:
    """What `similar --json` prints: what sounds most like some things and least like others, best first.

    Raises:
        UnknownTrack, BadAudio, ConfigError: see `Library`.
        ConfigError: nothing is left of the sum.
    """
    added = [*map(library.vector_of, wanted), *library.vectors_of_texts(texts)]
    subtracted = [*map(library.vector_of, unwanted), *library.vectors_of_texts(unwanted_texts)]
    query = combined(added, subtracted)
    if query is None:
        raise ConfigError("what is subtracted leaves nothing of what is asked for")
    vectors, without = library.vectors, [*library.queried]
    among = None if vectors.index is None else candidates(vectors.index, query, top + len(without))
    found = nearest(vectors.matrix, query, top, without=without, among=among)
    return [
        {**what, "similarity": round(similarity, 4)}
        for row, similarity in found
        if (what := library.describe(row))
    ]


def similar_text(facts: Sequence[dict[str, Any]]) -> Iterator[str]:
    width = max((len(one["name"]) for one in facts), default=0)
    for one in facts:
        yield f"{one['similarity']:6.3f}  {one['name']:<{width}}  {one['file'] or ''}".rstrip()
    if not facts:
        yield "there is nothing else in the library"


def duplicate_facts(library: Library, above: float) -> list[dict[str, Any]]:
    """What `similar --duplicates --json` prints: pairs of sources that are nearly the same, nearest first."""
    vectors = library.vectors
    pairs = near_duplicates(vectors.matrix, vectors.sources, above)
    described = ((library.describe(a), library.describe(b), similarity) for a, b, similarity in pairs)
    return [
        {**one, "other": other, "similarity": round(similarity, 4)}
        for one, other, similarity in described
        if one and other
    ]


def duplicate_text(facts: Sequence[dict[str, Any]], above: float) -> Iterator[str]:
    for one in facts:
        yield f"{one['similarity']:6.3f}  {_where(one)}  =  {_where(one['other'])}"
    if not facts:
        yield f"no two sources have a similarity of {above:g} or more"


def _where(one: dict[str, Any]) -> str:
    return str(one["file"] or one["name"])
