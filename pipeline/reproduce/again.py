"""Makes takes again, in this process, by the tasks that made them.

Seed, parameters, settings and engine are those of the record. Device, threads and the engines' own
sections are those of the configuration. What chose the take among others plays no part: its own seed is
recorded. Of other takes only the loudness of an album depends, which is recorded as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.config import Gates, Normalize
from pipeline.config.sweeps import complete_params
from pipeline.engines import cards
from pipeline.engines.base import EngineSettings, ProgressFn
from pipeline.engines.loading import LoadedEngines
from pipeline.engines.selection import Choice, select_engine
from pipeline.errors import BadAudio, EngineUnusable, MissingWeights, SourceGone
from pipeline.executors import tasks
from pipeline.executors.base import Task, result_of
from pipeline.executors.inline import InlineExecutor
from pipeline.executors.judge import ScoringJudge
from pipeline.executors.tasks import MadeTake, TakeRequest
from pipeline.executors.versions import PROGRAM
from pipeline.fs import copying
from pipeline.fs.names import printable
from pipeline.outbox.manifest import SOFTWARE, normalized_record
from pipeline.plan import digest
from pipeline.reproduce.compare import Outcome, compared, differing, outcome_of, versions_of
from pipeline.reproduce.recorded import BadRecord, Recorded, read_tags
from pipeline.runner.attempts import error_text
from pipeline.runner.making import Source, at_album_loudness, file_form, limits_of, record_of, take_request
from pipeline.store.store import Store
from pipeline.weights import hub
from pipeline.workspace import Workspace


def never() -> bool:
    return False


@dataclass
class Again:
    """Makes takes again; engines and the last source stay loaded between two calls."""

    settings: EngineSettings  # of the configuration, for its device, threads and sections
    source_of: Callable[[str], Path]  # a file with the bytes of this SHA-256; raises SourceGone
    progress: ProgressFn = lambda *_: None  # by the file of a take
    _engines: LoadedEngines | None = None
    _sources: dict[str, Source] = field(default_factory=dict)  # the last track's, by their keys

    def run(self, takes: Sequence[Recorded]) -> Iterator[Outcome]:
        """Make takes again, in the order in which they are finished; what fails is an outcome too."""
        groups: dict[str, list[Recorded]] = {}
        for take in takes:
            facts = take.facts
            said = {**facts.get("settings", {}), "length_s": None}
            same = [take.source_sha256, said, *(facts.get(key) for key in ("engine", "model", "revision"))]
            groups.setdefault(digest(same), []).append(take)
        for group in groups.values():
            left = {take.take.key: take for take in group}
            try:
                for key, outcome in self._made_again(dict(left)):
                    del left[key]
                    yield outcome
                why = "the engine made nothing"
            except Exception as e:  # whatever an engine or a package raises is said of its takes alone
                why = error_text(e)
            yield from (outcome_of(take, "untried", why) for take in left.values())

    def _made_again(self, takes: Mapping[str, Recorded]) -> Iterator[tuple[str, Outcome]]:
        """Takes of one source, engine and settings, by their keys, by one call of the generator."""
        first = next(iter(takes.values()))
        settings = first.settings
        choice = self._choice(first)
        executor = self._executor(choice, settings.normalize)
        requests: list[TakeRequest] = []
        for key, take in takes.items():
            try:
                requests.append(self._request(executor, take, choice))
            except BadRecord as e:
                yield key, outcome_of(take, "untried", str(e))
        for made in executor.run(
            tasks.make_takes,
            requests,
            settings.output,
            progress=lambda key, *steps: self.progress(takes[key].file, *steps),
            should_stop=never,
        ):
            take = takes[made.request_id]
            if isinstance(made.error, Exception):
                yield made.request_id, outcome_of(take, "untried", error_text(made.error))
            elif made.refused:
                yield made.request_id, outcome_of(take, "untried", made.refused)
            else:
                yield made.request_id, self._outcome(executor, take, made, choice)

    def _choice(self, take: Recorded) -> Choice:
        """The engine that a record names, with its model.

        Raises:
            EngineUnusable: it is not to be had.
        """
        name, facts = take.facts["engine"], take.facts
        if name not in cards():
            raise EngineUnusable(f"there is no engine {name}")
        settings = replace(self.settings, model=facts.get("model"), revision=facts.get("revision"))
        choice = select_engine("generate", name, settings)
        if choice.needs_weights:
            revision = facts.get("revision")
            raise MissingWeights(f"{choice.model} at {revision} is not on this machine: {hub.FETCH_COMMAND}")
        return choice

    def _executor(self, choice: Choice, normalize: Normalize) -> InlineExecutor:
        """Of the judge only tempo and key are needed: no model embeds or rates."""
        plain = EngineSettings(sample_rate=normalize.sample_rate)
        settings = replace(
            self.settings,
            sample_rate=normalize.sample_rate,
            model=choice.model,
            revision=choice.revision,
            state_dir=None,  # nothing is written
            bucket_dir=None,
        )
        embedder = select_engine("embed", "descriptors", plain), plain
        self._engines = LoadedEngines(embedder, (choice, settings), None, self._engines)
        return InlineExecutor(self._engines, ScoringJudge(self._engines, never))

    def _request(self, executor: InlineExecutor, one: Recorded, choice: Choice) -> TakeRequest:
        settings, take = one.settings, one.take
        try:
            params = complete_params(choice.card, take.params, None)
        except ValueError as e:
            text = f"engine {choice.card.name} {choice.card.version} does not take its parameters"
            raise BadRecord(text) from e
        if "prompt" in one.facts:  # the words that were found for `auto`
            params["prompt"] = one.facts["prompt"]
        source = self._source(executor, one.source_sha256, settings.normalize, take.change)
        asked = replace(take, params=params)
        return take_request(asked, source, settings.length_s, settings.output, Gates())

    def _source(
        self, executor: InlineExecutor, sha256: str, settings: Normalize, change: Mapping[str, Any]
    ) -> Source:
        """The normalized source, in the key and tempo that are asked for."""
        plain = digest([sha256, settings.model_dump(mode="json")])
        if plain not in self._sources:
            path, limits = self.source_of(sha256), limits_of(settings)
            normalized, info = self._result(executor, tasks.normalize, path, settings, limits)
            loudness_lufs = normalized_record(info, normalized)["source"]["loudness_lufs"]
            self._sources = {plain: Source(sha256, plain, normalized.audio, loudness_lufs)}
        key, source = digest([plain, change]), self._sources[plain]
        if change and key not in self._sources:
            changed = self._result(executor, tasks.change, source.audio, settings, dict(change))
            self._sources[key] = replace(source, key=key, audio=changed)
        return self._sources[key] if change else source

    def _result(self, executor: InlineExecutor, task: Task, *args: Any) -> Any:
        return result_of(executor, task, *args, should_stop=never)

    def _outcome(self, executor: InlineExecutor, one: Recorded, made: MadeTake, choice: Choice) -> Outcome:
        """Write a take as it was written, with the version of this program that made it, and compare."""
        published = one.read()
        software = read_tags(published).get("software") if published else None
        record, gain_db = record_of(one.take, made, choice, one.settings, self.settings.device), None
        if (album_lufs := one.facts.get("album_lufs")) is not None:
            record, gain_db = at_album_loudness(record, album_lufs)
        form = file_form(
            one.source_name,
            one.source_sha256,
            one.name,
            record,
            one.settings.output,
            software=software or SOFTWARE,
        )
        content = self._result(executor, tasks.encode, made.request_id, form, gain_db)
        program = (software or "").rpartition(" ")[2] or one.facts.get("made_with", {}).get(PROGRAM)
        versions = differing(versions_of(one.facts, program), versions_of(record, __version__))
        return compared(one, published, content, versions)


def source_of(
    sha256: str, store: Store | None, workspace: Workspace, scratch: Path, given: Path | None
) -> Path:
    """A source by its SHA-256: the file that is given, or one that the database knows.

    The latter is copied to `scratch`, in the place of the one before.

    Raises:
        SourceGone: it is not there.
    """
    if given is not None:
        found = copying.hash_file(given)
        if found != sha256:
            raise SourceGone(f"{printable(given)} is not its source: its SHA-256 is {found}, not {sha256}")
        return given
    target = scratch / "source"
    for known in store.files_of(sha256) if store else ():
        with suppress(BadAudio, copying.FileChanged, FileNotFoundError):
            files = workspace.files_at(known.root)
            if files.copy_in(known.current_path, target, follow=True) == sha256:
                return target
    raise SourceGone(f"its source (SHA-256 {sha256}) isn't at hand: name the file with --source")
