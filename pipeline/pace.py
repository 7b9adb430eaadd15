"""How long work will take, by what such work took on this machine before.

Normalization, embedding and the analysis by a weight-free generator take a time that grows with the length
of the source; engines with a model don't analyse it. The time for takes grows with their length. Some takes
are made in place of others that fail a gate, each after another analysis. Medians over the tracks leave out
what took long for a reason of its own, such as the start of a worker. A source that isn't decoded yet is
taken to be as long as others of its format with as many bytes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.records import Stage
from pipeline.store.schema import TrackState, Unfinished, Work

if TYPE_CHECKING:
    from pipeline.plan import Recipe
    from pipeline.store.store import Store

MADE_PER_TAKE = 1.25  # takes for each that is wanted: the mean of six tracks with the default variations
COSTED = 500  # queued tracks whose time is estimated one by one; further ones are taken to be like these


@dataclass(frozen=True)
class Wanted:
    """What a configuration makes of each track."""

    generator: str
    model: str | None
    takes: int  # of each track, without those in place of others
    sound_s: float  # length of these takes together, without those that are as long as the source
    as_source: float  # how many are as long as the source
    kept: float  # share of the takes that are results
    embeds: bool = False  # the results as well as the source

    @classmethod
    def of(cls, recipe: Recipe) -> Wanted:
        planned = [(one.duration_s, one.tried / one.kept) for one in recipe.planned]
        takes = round(sum(n for _, n in planned))
        return cls(
            generator=recipe.generator.card.name,
            model=recipe.generator.model,
            takes=takes,
            sound_s=sum(length * n for length, n in planned if length != "source"),
            as_source=sum(n for length, n in planned if length == "source"),
            kept=len(planned) / takes,
            embeds=recipe.config.embed.variations,
        )

    def takes_s(self, source_s: float) -> float:
        """Length of the takes of a source together."""
        return self.sound_s + self.as_source * source_s


@dataclass(frozen=True)
class Pace:
    """Seconds of work for each second of sound."""

    normalize: float  # per second of the source
    embed: float  # likewise
    analyse: float  # likewise, by the generator
    make: float  # per second of the takes
    takes: float  # that are made for each that is wanted
    s_per_byte: Mapping[str, float]  # length of sources per byte, by the ending of their names

    @classmethod
    def of(cls, work: Sequence[Work], wanted: Wanted) -> Pace | None:
        """The pace of finished tracks, see `Store.work`; None if there are none."""
        if not work:
            return None
        takes, n_wanted = sum(one.takes for one in work), sum(one.results for one in work) / wanted.kept
        before = wanted.takes / 2  # counts as if half a track had been made with MADE_PER_TAKE
        analysis_s = [0.0 if wanted.model else _analysis_s(one) for one in work]
        n_analyses = [max(1 + one.takes - one.results / wanted.kept, 1.0) for one in work]
        s_per_byte = {
            ending: median(one.source_s / max(one.bytes, 1) for one in work if _ending(one.name) == ending)
            for ending in {_ending(one.name) for one in work}
        }
        return cls(
            normalize=median(one.normalize_s / one.source_s for one in work),
            embed=median(one.embed_s / one.source_s for one in work),
            analyse=median(
                s / (n * one.source_s) for one, s, n in zip(work, analysis_s, n_analyses, strict=True)
            ),
            make=median((one.generate_s - s) / one.takes_s for one, s in zip(work, analysis_s, strict=True)),
            takes=(takes + MADE_PER_TAKE * before) / (n_wanted + before),
            s_per_byte=s_per_byte,
        )

    def length_s(self, name: str, n_bytes: int) -> float:
        """An estimate of the length of a source by its size."""
        any_format = median(self.s_per_byte.values())
        return n_bytes * self.s_per_byte.get(_ending(name), any_format)

    def stage_s(self, stage: str, source_s: float, n_takes: int, takes_s: float) -> float:
        """How long a stage of one track takes; `takes_s`: length of its `n_takes` wanted takes together."""
        if stage == Stage.NORMALIZE:
            return self.normalize * source_s
        if stage == Stage.EMBED:
            return self.embed * source_s
        if stage == Stage.EMBED_VARIATIONS:
            return self.embed * takes_s
        n_analyses = 1 + (self.takes - 1) * n_takes
        return self.analyse * source_s * n_analyses + self.make * self.takes * takes_s

    def source_s(self, track: Unfinished) -> float:
        """The length of a track's source, as far as it is known."""
        return track.source_s or self.length_s(track.name, track.bytes)

    def rest_s(self, track: Unfinished, wanted: Wanted) -> float:
        """How long the stages take that a track still needs, without the one that runs."""
        source_s = self.source_s(track)
        needed = [
            (Stage.NORMALIZE, track.source_s is None),
            (Stage.EMBED, not track.is_embedded),
            (Stage.GENERATE, track.stage != Stage.EMBED_VARIATIONS),
            (Stage.EMBED_VARIATIONS, wanted.embeds),
        ]
        wants = [stage for stage, is_needed in needed if is_needed and stage != track.stage]
        takes_s = wanted.takes_s(source_s)
        return sum(self.stage_s(stage, source_s, wanted.takes, takes_s) for stage in wants)


def stage_left_s(
    worker: Mapping[str, Any], pace: Pace | None, wanted: Wanted, source_s: float, *, now: float
) -> float | None:
    """How long the stage that a worker is in still takes, in seconds; None if nothing tells.

    By the pace of earlier tracks and, the more takes are made, by that of this stage.

    Args:
        worker: see `Runner.workers`.
        source_s: length of the track's source.
    """
    stage: str = worker["stage"]
    elapsed_s = max(now - float(worker["since"]), 0.0)
    if stage != Stage.GENERATE:
        takes_s = wanted.takes_s(source_s) * wanted.kept
        return None if pace is None else max(pace.stage_s(stage, source_s, 0, takes_s) - elapsed_s, 0.0)
    done, total = float(worker["done"]), float(worker["total"] or wanted.takes)
    left = total - done
    if pace is None:
        return elapsed_s / done * left if done else None
    take_s, analysis_s = pace.make * wanted.takes_s(source_s) / wanted.takes, pace.analyse * source_s
    again = (pace.takes - 1) * left  # takes in place of those that will fail
    to_analyse_s = (int(left / wanted.takes + 1e-9) + again) * analysis_s
    in_step_s = max(now - float(worker["stepped_at"]), 0.0)
    by_others_s = max((left + again) * take_s + to_analyse_s - in_step_s, max(left - 1, 0) * take_s)
    if not done:
        return by_others_s
    analysed_s = math.ceil(done / wanted.takes - 1e-9) * analysis_s
    by_itself_s = max(elapsed_s - analysed_s, 0.0) / done * (left + again) + to_analyse_s
    return (left * by_others_s + done * by_itself_s) / total


def times_left(
    store: Store, wanted: Wanted, workers: Sequence[Mapping[str, Any]], *, now: float
) -> tuple[list[float | None], float | None]:
    """How long each worker's stage still takes, and all queued and running tracks together, in seconds.

    Args:
        workers: see `Runner.workers`.

    Returns:
        None for what can't be estimated: the queue before the first track is done.
    """
    pace = Pace.of(store.work(wanted.generator, wanted.model), wanted)
    stages = {one["track"]: one["stage"] for one in workers}  # the database may be a moment ahead of these
    running = [
        replace(track, stage=stages.get(track.name, track.stage))
        for track in store.unfinished(TrackState.RUNNING, limit=-1)
    ]
    lengths = {track.name: pace.source_s(track) for track in running} if pace else {}
    mean_s = sum(lengths.values()) / max(len(lengths), 1)
    left = [
        stage_left_s(one, pace, wanted, lengths.get(one["track"], mean_s), now=now) if one["stage"] else 0.0
        for one in workers
    ]
    if pace is None:
        return left, None
    loads_s = [left_s or 0.0 for left_s, one in zip(left, workers, strict=True) if one["makes"]] or [0.0]
    queued = store.unfinished(TrackState.QUEUED, limit=COSTED)
    costs_s = [pace.rest_s(track, wanted) for track in [*running, *queued]]
    n_more = store.counts()[TrackState.QUEUED] - len(queued)
    more_s = n_more * sum(costs_s) / max(len(costs_s), 1) / len(loads_s) if n_more > 0 else 0.0
    return left, makespan_s(loads_s, costs_s) + more_s


def makespan_s(loads_s: Iterable[float], costs_s: Iterable[float]) -> float:
    """How long until all is done, if each next piece of work goes to the worker that is free first."""
    free_at = list(loads_s) or [0.0]
    heapq.heapify(free_at)
    for cost_s in costs_s:
        heapq.heappush(free_at, heapq.heappop(free_at) + cost_s)
    return max(free_at)


def rough(seconds: float) -> str:
    """A time in a word or two, such as "12 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _analysis_s(work: Work) -> float:
    """How much longer the takes took than if each had taken as long as the shortest."""
    return work.generate_s - work.shortest_take_s * work.takes


def _ending(name: str) -> str:
    return PurePath(name).suffix.lower()
