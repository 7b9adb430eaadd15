"""The generator: analysis shared by the requests of a track, then a way and its sound for each."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.engines.base import ProgressFn, StopFn
from pipeline.engines.remix import VERSION, RemixParams
from pipeline.engines.remix.analysis import Analysis, analyse
from pipeline.engines.remix.path import Way, find
from pipeline.engines.remix.render import Join, render
from pipeline.errors import BadAudio, EngineFailure, PipelineError, Stopped
from pipeline.records import Audio, Failure, Variation, VariationRequest

STEPS = 3  # analysis, search, rendering
KEPT_TRACKS = 2
SHORTEST_S = 0.25
SILENT = 1e-5  # a peak below this is silence


class RemixGenerator:
    """A `Generator`: see `pipeline.engines.base`."""

    name = "remix"
    version = VERSION

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self._tracks: OrderedDict[bytes, Analysis] = OrderedDict()  # a cache: saves time, changes nothing

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        """Yield one result per request, the requests of a track together."""
        order = {track_id: at for at, track_id in enumerate(dict.fromkeys(r.track_id for r in requests))}
        for request in sorted(requests, key=lambda r: order[r.track_id]):
            try:
                yield self._vary(request, progress, should_stop)
            except Stopped:
                raise
            except PipelineError as e:
                yield Failure(request.request_id, e)
            except (ValueError, ArithmeticError, MemoryError) as e:
                error = EngineFailure(f"remix could not be made ({type(e).__name__}: {e})")
                error.__cause__ = e
                yield Failure(request.request_id, error)

    def _vary(self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn) -> Variation:
        steps = _Steps(request.request_id, progress, should_stop)
        params = RemixParams.model_validate(dict(request.params))
        n_samples = round(request.duration_s * self.sample_rate)
        _check(request, self.sample_rate, n_samples)
        track = self._analysis(request.audio)
        steps.next()
        way = find(
            track,
            request.duration_s,
            temperature=params.temperature,
            min_segment=params.min_segment_beats,
            seed=request.seed,
        )
        steps.next()
        samples, joins = render(request.audio, track, way, n_samples, params.crossfade_ms / 1000)
        if not np.isfinite(samples).all() or np.abs(samples).max() < SILENT:
            raise EngineFailure("remix made silence or numbers that are not finite")
        steps.next()
        details = describe(track, way, joins, request.duration_s)
        return Variation(request.request_id, Audio(samples, self.sample_rate), details)

    def _analysis(self, audio: Audio) -> Analysis:
        """The analysis of this sound, made or remembered."""
        key = hashlib.blake2b(np.ascontiguousarray(audio.samples).data, digest_size=16)
        key.update(repr((audio.samples.shape, audio.sample_rate)).encode())
        digest = key.digest()
        if digest not in self._tracks:
            self._tracks[digest] = analyse(audio)
        self._tracks.move_to_end(digest)
        while len(self._tracks) > KEPT_TRACKS:
            self._tracks.popitem(last=False)
        return self._tracks[digest]


class _Steps:
    """Tells how far a request is, and stops between its steps."""

    def __init__(self, request_id: str, progress: ProgressFn, should_stop: StopFn) -> None:
        self._request_id, self._progress, self._should_stop = request_id, progress, should_stop
        self._done = -1
        self.next()

    def next(self) -> None:
        """One step further.

        Raises:
            Stopped: it was asked to.
        """
        self._done += 1
        self._progress(self._request_id, self._done, STEPS)
        if self._done < STEPS and self._should_stop():
            raise Stopped("stopped while remixing")


def _check(request: VariationRequest, sample_rate: int, n_samples: int) -> None:
    audio = request.audio
    if audio.sample_rate != sample_rate:
        raise EngineFailure(f"remix was loaded for {sample_rate} Hz and given {audio.sample_rate} Hz")
    if n_samples < 1:
        raise EngineFailure(f"remix was asked for {request.duration_s} s, which is no sample")
    if audio.duration_s < SHORTEST_S:
        raise BadAudio(f"the normalized audio lasts {audio.duration_s:.2f} s; remix needs {SHORTEST_S} s")
    if not np.isfinite(audio.samples).all():
        raise BadAudio("the normalized audio has numbers that are not finite")
    if np.abs(audio.samples).max() < SILENT:
        raise BadAudio("the normalized audio is silent")


def describe(track: Analysis, way: Way, joins: Sequence[Join], duration_s: float) -> Mapping[str, Any]:
    """What the manifest says of a remix, as JSON values.

    A join's `score` is its similarity: 1 where what surrounds both sides is the same, 0 where it is as
    different as the typical pair of places at the same position in the bar.
    """
    scores = [float(track.similarities[join.edges]) for join in joins]
    return {
        "mode": "grid" if track.tempo_bpm is None else "beats",
        "tempo_bpm": None if track.tempo_bpm is None else round(track.tempo_bpm, 2),
        "meter": None if track.tempo_bpm is None else track.meter,
        "beats": track.n_beats,
        "pulse_clarity": round(track.pulse_clarity, 3),
        "start_s": round(way.start_s, 3),
        "ending": "own" if way.ends else "fade",
        "joins": [
            {
                "out_s": round(join.out_s, 3),
                "from_s": round(join.from_s, 3),
                "to_s": round(join.to_s, 3),
                "score": round(score, 3),
            }
            for join, score in zip(joins, scores, strict=True)
        ],
        "mean_score": round(float(np.mean(scores)), 3) if scores else None,
        "coverage": round(_coverage(track.duration_s, way, joins, duration_s), 3),
    }


def _coverage(source_s: float, way: Way, joins: Sequence[Join], duration_s: float) -> float:
    """Share of the source that is heard at least once."""
    heard = np.zeros(max(1, round(source_s * 100)), dtype=bool)
    at_s, position_s = 0.0, way.start_s
    for join in joins:
        heard[round(position_s * 100) : round(join.from_s * 100)] = True
        at_s, position_s = join.out_s, join.to_s
    heard[round(position_s * 100) : round((position_s + duration_s - at_s) * 100)] = True
    return float(heard.mean())
