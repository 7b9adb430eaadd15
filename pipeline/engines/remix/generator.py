"""The generator: one analysis for all requests of a track, then a path and its rendering for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.engines.base import ProgressFn, StopFn, check_stop
from pipeline.engines.remix import VERSION, RemixParams
from pipeline.engines.remix.analysis import Analysis, analyse
from pipeline.engines.remix.path import BeatPath, find_path
from pipeline.engines.remix.render import Join, first_s, render
from pipeline.errors import BadAudio, PipelineError
from pipeline.music.beats import Beats
from pipeline.records import Audio, Failure, Variation, VariationRequest

STEPS = 3  # analysis, search, rendering
MIN_DURATION_S = 0.25  # of the source


class RemixGenerator:
    """A `Generator`: see `pipeline.engines.base`."""

    name = "remix"
    version = VERSION

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        """Yield one result per request, in order; a track whose requests are consecutive is analysed once."""
        analyse_once = lru_cache(maxsize=1)(analyse)
        for request in requests:
            try:
                yield self._vary(request, analyse_once, progress, should_stop)
            except (PipelineError, ValueError, ArithmeticError, MemoryError) as e:
                yield Failure(request.request_id, e)

    def _vary(
        self,
        request: VariationRequest,
        analyse: Callable[[Audio, str], Analysis],
        progress: ProgressFn,
        should_stop: StopFn,
    ) -> Variation:
        def step(done: int) -> None:
            progress(request.request_id, done, STEPS)
            if done < STEPS:
                check_stop(should_stop)

        step(0)
        params, source = RemixParams.model_validate(dict(request.params)), request.audio
        if source.duration_s < MIN_DURATION_S:
            raise BadAudio(
                f"the normalized audio lasts {source.duration_s:.2f} s; remix needs {MIN_DURATION_S} s"
            )
        track = analyse(source, params.emphasis)
        step(1)
        path = find_path(
            track,
            request.duration_s,
            temperature=params.temperature,
            min_segment=params.min_segment_beats,
            seed=request.seed,
        )
        step(2)
        n_samples = round(request.duration_s * self.sample_rate)
        samples, joins = render(source, track, path, n_samples, params.crossfade_ms / 1000)
        step(STEPS)
        details = _details(track, path, joins)
        beats = own_beats(track, path, joins, request.duration_s)
        return Variation(request.request_id, Audio(samples, self.sample_rate), details, beats)


def own_beats(track: Analysis, path: BeatPath, joins: Sequence[Join], duration_s: float) -> Beats:
    """The beats of a remix: those of the passages that it plays, with an edge at each join."""
    found_s, edges = list[float](), list[int]()  # in the remix, and which of the source's they are
    lengths_s = np.diff(track.edges_s)
    half_s = 0.5 * np.append(lengths_s, lengths_s[-1])  # a passage begins at the edge nearest to its join
    starts_s, offsets_s = [0.0], [first_s(path)]
    starts_s += [join.out_s for join in joins]
    offsets_s += [join.to_s - join.out_s for join in joins]
    for start_s, stop_s, offset_s in zip(starts_s, [*starts_s[1:], np.inf], offsets_s, strict=True):
        at_s = track.edges_s - offset_s
        inside = (at_s > start_s - half_s) & (at_s < stop_s - half_s) & (at_s >= 0.0) & (at_s <= duration_s)
        found_s += np.maximum(at_s[inside], start_s).tolist()
        edges += np.flatnonzero(inside).tolist()
    positions = (np.array(edges, np.int64) - track.first) % track.meter  # in their bars
    phase = int(np.argmin(positions)) % track.meter if edges else 0
    return Beats(np.array(found_s), track.tempo_bpm, track.pulse_clarity, track.meter, phase)


def _details(track: Analysis, path: BeatPath, joins: Sequence[Join]) -> Mapping[str, Any]:
    """A remix's details for the manifest, as JSON values.

    A join's `score` is 1 if the contexts of both sides are the same and no sound breaks off, 0 if they differ
    as much as those of a typical pair of points. Bars are the source's, the first whole one is 1.
    """
    scores = [float(track.natural[join.points]) for join in joins]
    return {
        "mode": "grid" if track.tempo_bpm is None else "beats",
        "tempo_bpm": None if track.tempo_bpm is None else round(track.tempo_bpm, 2),
        "meter": None if track.tempo_bpm is None else track.meter,
        "beats": track.n_beats,
        "pulse_clarity": round(track.pulse_clarity, 3),
        "start_s": round(path.start_s, 3),
        "ending": "own" if path.to_ending else "fade",
        "joins": [
            {
                "out_s": round(join.out_s, 6),
                "from_s": round(join.from_s, 6),
                "to_s": round(join.to_s, 6),
                "score": round(score, 3),
                **_bars(track, join),
            }
            for join, score in zip(joins, scores, strict=True)
        ],
    }


def _bars(track: Analysis, join: Join) -> Mapping[str, Any]:
    """The bars of a join, if the music has any."""
    if track.tempo_bpm is None:
        return {}
    beats = [point * track.step for point in join.points]
    left, entered = (beat // track.meter + 1 for beat in beats)
    return {
        "from_bar": left,
        "to_bar": entered,
        "bars_jumped": entered - left,
        "keeps_bar_position": (beats[1] - beats[0]) % track.meter == 0,
    }
