"""The tasks: everything that takes time, as functions of values."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import audio, stages
from pipeline.audio import DecodeLimits
from pipeline.audio.sndfile import read_whole
from pipeline.config import Gates, Normalize, Output
from pipeline.engines import cards
from pipeline.engines.base import Engine, check_stop
from pipeline.errors import EngineFailure
from pipeline.executors.base import Tools, is_of_a_lost_gpu, portable
from pipeline.executors.encode import FileForm, embedding_file, sound_file
from pipeline.executors.judge import Verdict
from pipeline.executors.versions import made_with
from pipeline.fs.arrays import map_array, write_array
from pipeline.fs.atomic import Written, write_new
from pipeline.gallery.pictures import Picture, draw
from pipeline.plan import AUTO_PROMPT
from pipeline.records import Audio, Failure, MadeBy, Samples, SourceInfo, Variation, VariationRequest
from pipeline.stages import Normalized

PUBLISHED = DecodeLimits(min_duration_s=0.0, max_duration_s=math.inf)  # for own results


@dataclass(frozen=True, eq=False)
class TakeRequest:
    """One take to be made, finished and judged."""

    request: VariationRequest  # its prompt may be AUTO_PROMPT
    source: str  # key of `request.audio`: equal keys, equal sound
    length_s: float  # of the finished take
    source_lufs: float  # loudness of the source file
    gates: Gates


@dataclass(frozen=True, eq=False)
class MadeTake:
    """The result of one request: a take with its verdict, or why there is none."""

    request_id: str
    made_by: MadeBy
    prompt: str = ""  # that the engine was given
    facts: Mapping[str, Any] | None = None  # what the manifest says of its sound, see `Finished.facts`
    verdict: Verdict | None = None
    refused: str | None = None  # why the engine's sound can't be used
    error: BaseException | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)  # see `versions.made_with`


def open_generator(tools: Tools) -> Iterator[None]:
    """Load the generator.

    Raises:
        EngineUnusable: it can't be loaded.
    """
    tools.engines.generator()
    yield


def open_others(tools: Tools, embeds: bool, rates: bool) -> Iterator[None]:
    """Load the engines of these stages. Raises as `open_generator`."""
    if embeds:
        tools.engines.embedder()
    if rates:
        tools.engines.rater()
    yield


def normalize(
    tools: Tools, path: Path, settings: Normalize, limits: DecodeLimits
) -> Iterator[tuple[Normalized, SourceInfo]]:
    """Decode and normalize a file.

    Raises:
        BadAudio: it can't be used.
    """
    decoded, source = audio.decode(path, sample_rate=settings.sample_rate, limits=limits)
    yield stages.normalize(decoded, settings), source


def embed(tools: Tools, sound: Audio) -> Iterator[tuple[bytes, MadeBy, int]]:
    """The file with the embedding of a normalized track, its engine, and the dimensions of its vectors."""
    embedder = tools.engines.embedder()
    result = embedder.embed(sound, should_stop=tools.should_stop)
    yield embedding_file(result, embedder.dim), _made_by(embedder), embedder.dim


def embed_file(tools: Tools, file: Path | bytes) -> Iterator[tuple[Samples, MadeBy, int]]:
    """The vector of a published variation, (dim,), its engine, and its dimensions."""
    embedder = tools.engines.embedder()
    result = embedder.embed(read_whole(_content(file)), should_stop=tools.should_stop)
    yield result.track, _made_by(embedder), embedder.dim


def change(tools: Tools, sound: Audio, settings: Normalize, changes: dict[str, Any]) -> Iterator[Audio]:
    """See `pipeline.stages.change`."""
    yield stages.change(sound, settings, **changes)


def encode(
    tools: Tools, made: Audio | str, form: FileForm, gain_db: float | None = None, place: Path | None = None
) -> Iterator[bytes | Written]:
    """The file of a take, or of the one that `make_takes` has made last, by its id; see `sound_file`.

    Args:
        place: where it is written by a worker that uses the same disk; None: its content is returned.
    """
    sound = tools.kept[made] if isinstance(made, str) else made
    if gain_db is not None:
        sound = audio.amplify(sound, gain_db)
    content = sound_file(sound, form)
    yield content if place is None else write_new(place, content)


def sound_of(tools: Tools, request_id: str) -> Iterator[Audio]:
    """The take that `make_takes` has made last."""
    yield tools.kept[request_id]


def fingerprint(tools: Tools, made: Audio) -> Iterator[Any]:
    """What `Judge.shared` compares of a take."""
    yield tools.judge.sound(made)


def fingerprint_of_file(tools: Tools, file: Path | bytes, sample_rate: int) -> Iterator[Any]:
    """What `Judge.shared` compares of a take that is published."""
    content = _content(file)
    sound, _ = audio.decode_file(io.BytesIO(content), len(content), sample_rate=sample_rate, limits=PUBLISHED)
    yield tools.judge.sound(sound)


def _content(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def pictures(tools: Tools, source: Path | None, *results: Path | bytes) -> Iterator[list[Picture]]:
    """The pictures of sounds for the gallery: see `draw`."""
    yield draw(source, results)


def make_takes(tools: Tools, wanted: Sequence[TakeRequest], output: Output) -> Iterator[MadeTake]:
    """Make takes by one call of the generator, in the order in which they are finished.

    The sound of a take stays here until the next one is asked for: see `encode` and `sound_of`.
    """
    by_id = {one.request.request_id: one for one in wanted}
    _keep_only(tools, {one.source for one in wanted})
    for take, made in _generated(tools, with_prepared(wanted, _words(tools, wanted), {})):
        if made is None:
            yield take
        else:
            yield from _finished(tools, by_id[take.request_id], take, made, output)


def generate(
    tools: Tools, wanted: Sequence[TakeRequest], paths: Mapping[str, Path]
) -> Iterator[tuple[MadeTake, Variation | None]]:
    """As `make_takes`, but of prepared requests, and the sounds are not finished: see `prepare`, `finish`.

    Args:
        paths: where each sound is stored, by request, for a worker that reads the same disk; the result then
            has the file mapped into memory. Empty: nothing is stored.
    """
    for take, made in _generated(tools, wanted):
        path = paths.get(take.request_id)
        yield take, made if made is None or path is None else _stored(made, path)


def finish(  # noqa: PLR0917 - arguments of tasks are positional
    tools: Tools,
    one: TakeRequest,
    source: Audio | None,
    take: MadeTake,
    made: Variation,
    output: Output,
    sources: Collection[str],
) -> Iterator[MadeTake]:
    """The take of a sound that `generate` has made; its sound stays here until the task ends.

    Args:
        one: its request, without the source's audio.
        source: this audio; if it is None and the source was not analysed here before, nothing is yielded.
        sources: keys of all sources of the batch.
    """
    _keep_only(tools, sources)
    if source is not None:
        one = with_audio(one, source)
    elif one.source not in tools.kept:
        return
    yield from _finished(tools, one, take, made, output)


def prepare(
    tools: Tools, wanted: Sequence[TakeRequest], engine: str
) -> Iterator[tuple[dict[str, str], Mapping[str, Any]]]:
    """The part of a generator's work that is done beside it, by request: see `with_prepared`.

    The analyses of the sources stay here for `finish`.

    Args:
        engine: the generator's name.
    """
    _keep_only(tools, {one.source for one in wanted})
    for one in wanted:
        _reference(tools, one)
    words, prepare_requests = _words(tools, wanted), cards()[engine].prepare
    requests = [one.request for one in wanted]
    yield words, {} if prepare_requests is None else prepare_requests(requests, tools.should_stop)


def with_prepared(
    wanted: Sequence[TakeRequest], words: Mapping[str, str], prepared: Mapping[str, Any]
) -> list[TakeRequest]:
    """The requests with words for their prompts and with what is prepared, each by request."""
    found = []
    for one in wanted:
        key, params = one.request.request_id, one.request.params
        params = {**params, "prompt": words[key]} if key in words else params
        request = replace(one.request, params=params, prepared=prepared.get(key))
        found.append(replace(one, request=request))
    return found


def _words(tools: Tools, wanted: Sequence[TakeRequest]) -> dict[str, str]:
    """Words from the analysis of the source, by request, for those whose prompt is AUTO_PROMPT."""
    asked = [one for one in wanted if one.request.params.get("prompt") == AUTO_PROMPT]
    of_sources = {one.source: one for one in asked}
    words = {key: tools.judge.describe(_reference(tools, one)) for key, one in of_sources.items()}
    return {one.request.request_id: words[one.source] for one in asked}


def with_audio(one: TakeRequest, audio: Audio) -> TakeRequest:
    """The request with another source's audio."""
    return replace(one, request=replace(one.request, audio=audio))


def _generated(tools: Tools, wanted: Sequence[TakeRequest]) -> Iterator[tuple[MadeTake, Variation | None]]:
    """What the generator has made, or why there is nothing."""
    generator = tools.engines.generator()
    requests = {one.request.request_id: one.request for one in wanted}
    for made in generator.generate(
        list(requests.values()), progress=tools.progress, should_stop=tools.should_stop
    ):
        made_by, prompt = _made_by(generator), requests[made.request_id].params.get("prompt", "")
        take = MadeTake(made.request_id, made_by, prompt, made_with=made_with(generator.name))
        if isinstance(made, Failure):
            if is_of_a_lost_gpu(made.error):
                raise made.error  # so that the process is replaced
            yield replace(take, error=portable(made.error)), None
        else:
            yield take, made


def _stored(made: Variation, path: Path) -> Variation:
    with path.open("wb") as file:
        write_array(file, made.audio.samples)
    return replace(made, audio=Audio(map_array(path), made.audio.sample_rate))


def _keep_only(tools: Tools, keys: Collection[str]) -> None:
    for key in tools.kept.keys() - set(keys):
        del tools.kept[key]


def _finished(
    tools: Tools, one: TakeRequest, take: MadeTake, made: Variation, output: Output
) -> Iterator[MadeTake]:
    try:
        judged = _judged(tools, one, made, take, output)
    except Exception as e:
        if is_of_a_lost_gpu(e):
            raise
        judged = replace(take, error=portable(e))
    yield judged
    tools.kept.pop(take.request_id, None)


def _judged(tools: Tools, one: TakeRequest, made: Variation, take: MadeTake, output: Output) -> MadeTake:
    try:
        finished = stages.finish(
            made,
            one.request,
            output,
            length_s=one.length_s,
            source_lufs=one.source_lufs,
            on_step=partial(check_stop, tools.should_stop),
        )
    except EngineFailure as e:
        return replace(take, refused=str(e))
    verdict = tools.judge.judge(_reference(tools, one), finished, one.gates, take.prompt)
    tools.kept[made.request_id] = finished.audio
    return replace(take, facts=finished.facts(), verdict=verdict)


def _reference(tools: Tools, one: TakeRequest) -> Any:
    if one.source not in tools.kept:
        tools.kept[one.source] = tools.judge.analyse(one.request.audio)
    return tools.kept[one.source]


def _made_by(engine: Engine) -> MadeBy:
    return MadeBy(engine.name, engine.version)
