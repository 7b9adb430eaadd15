"""The generator: requests in, variations out, as they finish."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from pipeline.engines.base import ProgressFn, StopFn, check_stop
from pipeline.engines.musicgen import VERSION, MusicgenParams, codec, memory_budget
from pipeline.engines.musicgen.checkpoint import Checkpoint, LazyModel
from pipeline.engines.musicgen.conditioning import ConditionBuilder
from pipeline.engines.musicgen.decoder import Decoder
from pipeline.engines.musicgen.int8_check import Int8Check
from pipeline.engines.musicgen.sampling import Sampler
from pipeline.engines.musicgen.savepoints import Savepoints
from pipeline.engines.musicgen.scheduler import (
    REQUEST_ERRORS,
    RequestState,
    Scheduler,
    distinct_prefixes,
)
from pipeline.engines.musicgen.windows import STRIDE, UNKNOWN, windows
from pipeline.engines.pretrained import first_line
from pipeline.errors import EngineFailure, EngineUnusable
from pipeline.records import Audio, Failure, Variation, VariationRequest

SAVE_EVERY_S = 2.0  # of audio


class MusicgenGenerator:
    """MusicGen-Melody behind the generator protocol.

    The same request gives the same tokens alone, among any others, in any order and after an
    interruption, on the same kind of processor and with the same torch. Elsewhere torch may round the
    conditions differently, and one different token changes the rest; the decoder on a CPU computes the
    same bits everywhere.
    """

    name = "musicgen"
    version = VERSION

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder[Any],
        check: Int8Check | None = None,
        *,
        max_memory_gb: float | None = None,
        saved: Savepoints | None = None,
    ) -> None:
        """Wrap an open checkpoint.

        Args:
            check: of int8, for the manifest.
            max_memory_gb: of the whole process; None: a share of what the system has free.
            saved: None: an interrupted call begins again.
        """
        self.checkpoint, self.decoder, self.check = checkpoint, decoder, check
        self.sample_rate = checkpoint.sample_rate
        self.max_memory_gb, self.saved = max_memory_gb, saved or Savepoints(None)
        self.window_frames = round(checkpoint.window_s * checkpoint.frames_per_s)
        self.stride_frames = round(checkpoint.window_s * STRIDE * checkpoint.frames_per_s)
        self.delays = np.arange(decoder.shape.codebooks, dtype=np.int64) // checkpoint.channels

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        """Yield a result per request, as they finish.

        Progress counts frames of tokens, 50 a second, then the pieces that are decoded to sound. The
        tokens of a request without a result are saved, and not made again by a later call.

        Raises:
            Stopped: within one step, or one piece of sound, of `should_stop` turning true.
        """
        by_id = {request.request_id: request for request in requests}
        encodec = LazyModel(self.checkpoint.codec)
        try:
            for state in self.run(requests, progress, should_stop):
                if isinstance(state, Failure):
                    yield state
                    continue
                try:
                    if state.error is not None:
                        raise state.error
                    result = self._variation(by_id[state.request_id], state, encodec, progress, should_stop)
                except REQUEST_ERRORS as error:
                    yield Failure(state.request_id, error)
                    continue
                yield result
                self.saved.drop(state.identity)
        finally:
            encodec.close()

    def run(
        self, requests: Sequence[VariationRequest], progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[RequestState | Failure]:
        """The tokens of all requests, as they finish."""
        prepared = self.prepare(requests, should_stop)
        yield from (failure for failure in prepared if isinstance(failure, Failure))
        states = [state for state in prepared if isinstance(state, RequestState)]
        if not states:
            return

        def on_step(state: RequestState, is_new: bool) -> None:
            frames = state.codes.shape[1]
            made = min(state.delayed.window.start + state.position, frames)
            progress(state.request_id, made, frames + self._pieces(state))
            is_due = state.position % round(SAVE_EVERY_S * self.checkpoint.frames_per_s) == 0
            if is_new and (is_due or state.position == state.delayed.steps):
                self.saved.save(state.identity, state.codes)

        unfinished = list(states)
        scheduler = self.scheduler(states, on_step, partial(check_stop, should_stop))
        try:
            for finished in scheduler.run(states):
                yield finished
                unfinished.remove(finished)  # the caller that asks for more has used this result
        finally:  # also after a stop, an error, or when the caller asks for no more
            for state in unfinished:
                if (state.codes != UNKNOWN).any():
                    self.saved.save(state.identity, state.codes)

    def prepare(
        self, requests: Sequence[VariationRequest], should_stop: StopFn
    ) -> list[RequestState | Failure]:
        """The conditions and saved tokens of each request, or why it can't be made."""
        builder = ConditionBuilder(self.checkpoint, should_stop)
        prepared: list[RequestState | Failure] = []
        for request in requests:
            try:
                check_stop(should_stop)
                prepared.append(self._state(request, builder))
            except REQUEST_ERRORS as error:
                prepared.append(Failure(request.request_id, error))
        builder.close()  # the traceback of an error may still refer to it
        return prepared

    def scheduler(
        self,
        states: Sequence[RequestState],
        on_step: Callable[[RequestState, bool], None],
        check_stop: Callable[[], None],
    ) -> Scheduler:
        """A scheduler for these requests, with as many rows as memory allows.

        Raises:
            EngineUnusable: there is no memory for one variation.
        """
        steps = max(window.frames for state in states for window in state.windows) + int(self.delays.max())
        prefix_steps = self.checkpoint.chroma_length + max(len(state.conditions.text) for state in states)
        row_bytes, prefix_bytes = (self.decoder.cache_bytes(n) for n in (steps, prefix_steps))
        n_prefixes = distinct_prefixes(states)
        rows = memory_budget.rows_at_once(
            lambda rows: rows * row_bytes + min(rows, n_prefixes) * prefix_bytes,
            sum(state.n_rows for state in states),
            self.max_memory_gb,
            codec.decoding_bytes(self.checkpoint, max(state.codes.shape[1] for state in states)),
        )
        while True:
            try:
                return Scheduler(
                    decoder=self.decoder,
                    rows=rows,
                    n_prefixes=min(rows, n_prefixes),
                    steps=steps,
                    prefix_steps=prefix_steps,
                    delays=self.delays,
                    on_step=on_step,
                    check_stop=check_stop,
                )
            except (MemoryError, RuntimeError) as error:  # the latter from torch, for a device's memory
                if rows <= memory_budget.LEAST_ROWS:
                    text = f"musicgen has no memory for one variation ({first_line(error)})"
                    raise EngineUnusable(text) from error
                rows = max(rows // 2, memory_budget.LEAST_ROWS)

    def _state(self, request: VariationRequest, builder: ConditionBuilder) -> RequestState:
        params = MusicgenParams.model_validate(dict(request.params))
        n_frames = max(1, math.ceil(self._n_samples(request) / self.checkpoint.hop_samples))
        all_windows = windows(n_frames, self.window_frames, self.stride_frames)
        starts = tuple(window.start for window in all_windows)
        shape = (self.decoder.shape.codebooks, n_frames)
        melody_source = builder.melody(request.audio, params.melody)[1]
        identity = self._identity(request, melody_source)
        codes = self.saved.load(identity, shape)
        return RequestState(
            request_id=request.request_id,
            conditions=builder.conditions(request.audio, params.melody, params.prompt, starts),
            melody_source=melody_source,
            identity=identity,
            sampler=Sampler(params, request.seed),
            windows=all_windows,
            codes=np.full(shape, UNKNOWN, np.int64) if codes is None else codes,
        )

    def _variation(
        self,
        request: VariationRequest,
        state: RequestState,
        encodec: LazyModel,
        progress: ProgressFn,
        should_stop: StopFn,
    ) -> Variation:
        frames, pieces = state.codes.shape[1], self._pieces(state)

        def on_piece(made: int) -> None:
            progress(request.request_id, frames + made, frames + pieces)
            check_stop(should_stop)

        check_stop(should_stop)
        samples = codec.decode(self.checkpoint, encodec.open(), state.codes, on_piece)
        samples = np.ascontiguousarray(samples[:, : self._n_samples(request)])
        if not np.isfinite(samples).all() or not samples.any():
            raise EngineFailure("musicgen made silence or NaN.")
        details: dict[str, Any] = {
            "frames": frames,
            "windows": len(state.windows),
            "melody": state.melody_source,
            "precision": self.decoder.precision,
        }
        if self.check is not None:
            details["int8_check"] = self.check.facts
        return Variation(request.request_id, Audio(samples, self.sample_rate), details)

    def _identity(self, request: VariationRequest, melody_source: str) -> str:
        """A digest of everything that a request's tokens depend on.

        The melody source is part of it because it can depend on what is installed.
        """
        facts = [
            VERSION,
            self.checkpoint.weights.revision,
            self.decoder.precision,
            self.checkpoint.device,
            self.stride_frames,
            melody_source,
            request.request_id,
            request.track_id,
            request.duration_s,
            request.seed,
            dict(request.params),
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def _pieces(self, state: RequestState) -> int:
        return len(codec.pieces(self.checkpoint, state.codes.shape[1]))

    def _n_samples(self, request: VariationRequest) -> int:
        return round(request.duration_s * self.sample_rate)
