"""The generator: requests in, variations out, as they finish."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property, partial
from typing import Any

import numpy as np

from pipeline.engines.base import ProgressFn, StopFn, check_stop
from pipeline.engines.musicgen import VERSION, MusicgenParams, codec, memory_budget
from pipeline.engines.musicgen.checkpoint import Checkpoint, LazyModel
from pipeline.engines.musicgen.conditioning import ConditionBuilder
from pipeline.engines.musicgen.decoder import UNKNOWN, Decoder
from pipeline.engines.musicgen.precision_check import PrecisionCheck
from pipeline.engines.musicgen.sampling import Sampler
from pipeline.engines.musicgen.savepoints import Savepoints
from pipeline.engines.musicgen.scheduler import (
    REQUEST_ERRORS,
    RequestState,
    Scheduler,
    distinct_prefixes,
)
from pipeline.engines.musicgen.windows import STRIDE, windows
from pipeline.engines.pretrained import first_line
from pipeline.errors import EngineFailure, EngineUnusable
from pipeline.records import Audio, Failure, Variation, VariationRequest

log = logging.getLogger("pipeline")

# Audio between two savepoints of a variation: some seconds of work. A GPU waits 2 to 3 ms for each.
SAVE_EVERY_S, SAVE_EVERY_S_ON_GPU = 2.0, 10.0
GPU_THREADS = 3  # that decode to sound, as one leaves most of a GPU idle


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
        check: PrecisionCheck | None = None,
        *,
        max_memory_gb: float | None = None,
        saved: Savepoints | None = None,
    ) -> None:
        """Wrap an open checkpoint.

        Args:
            check: of the fast precision, for the manifest.
            max_memory_gb: of the whole process, on a GPU of its memory; None: a share of what is free.
            saved: None: an interrupted call begins again.
        """
        self.checkpoint, self.decoder, self.check = checkpoint, decoder, check
        self.sample_rate, self.on_gpu = checkpoint.sample_rate, checkpoint.device != "cpu"
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
            Stopped: within one step, or one piece of sound, of `should_stop` turning true; on a GPU within
                the steps of 0.15 s.
        """
        by_id = {request.request_id: request for request in requests}
        encodec = LazyModel(self.checkpoint.codec, self.checkpoint.device)

        def report(state: RequestState, pieces: int) -> None:
            frames = state.codes.shape[1]
            progress(state.request_id, frames + pieces, frames + self._pieces(state))
            check_stop(should_stop)

        def decode(state: RequestState | Failure) -> tuple[Any, Variation | Failure]:
            if isinstance(state, Failure):
                return state, state
            try:
                if state.error is not None:
                    raise state.error
                check_stop(should_stop)
                # Progress is reported by one thread alone.
                on_piece = (lambda _: check_stop(should_stop)) if self.on_gpu else partial(report, state)
                return state, self._variation(by_id[state.request_id], state, encodec, on_piece)
            except REQUEST_ERRORS as error:
                return state, Failure(state.request_id, error)

        tokens = self.run(requests, progress, should_stop)
        if self.on_gpu:
            encodec.open()  # once, before several threads want it
        try:
            for state, result in self._beside(tokens, decode) if self.on_gpu else map(decode, tokens):
                if isinstance(result, Failure):
                    yield result
                    continue
                if self.on_gpu:
                    report(state, self._pieces(state))
                yield result
                self.saved.drop(state.identity)
        finally:
            encodec.close()

    def run(
        self, requests: Sequence[VariationRequest], progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[RequestState | Failure]:
        """The tokens of all requests, as they finish.

        Where memory runs out in spite of the budget, it goes on with half of the rows.
        """
        prepared = self.prepare(requests, should_stop)
        yield from (failure for failure in prepared if isinstance(failure, Failure))
        states = [state for state in prepared if isinstance(state, RequestState)]
        if not states:
            return

        save_every_s = SAVE_EVERY_S_ON_GPU if self.on_gpu else SAVE_EVERY_S
        save_steps = round(save_every_s * self.checkpoint.frames_per_s)

        def on_step(state: RequestState) -> None:
            frames = state.codes.shape[1]
            made = min(state.delayed.window.start + state.position, frames)
            progress(state.request_id, made, frames + self._pieces(state))
            new = state.position - state.saved
            if new >= save_steps or (new > 0 and state.position == state.delayed.steps):
                self.saved.save(state.identity, state.codes)
                state.saved = state.position

        unfinished, most_rows = list(states), self.decoder.most_rows
        try:
            while unfinished:
                scheduler = self.scheduler(unfinished, on_step, partial(check_stop, should_stop), most_rows)
                try:
                    for finished in scheduler.run(list(unfinished)):
                        yield finished
                        unfinished.remove(finished)  # the caller that asks for more has used this result
                except (MemoryError, RuntimeError) as error:
                    if not memory_budget.is_exhausted(error) or scheduler.rows <= memory_budget.LEAST_ROWS:
                        raise
                    most_rows = max(scheduler.rows // 2, memory_budget.LEAST_ROWS)
                    log.warning(
                        "musicgen: no memory for %d rows; it goes on with %d", scheduler.rows, most_rows
                    )
                    for state in unfinished:
                        state.slots, state.prefixes = [], []
                    del scheduler  # and its cache, before there is another
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
        on_step: Callable[[RequestState], None],
        check_stop: Callable[[], None],
        most_rows: int | None = None,
    ) -> Scheduler:
        """A scheduler for these requests, with as many rows as memory allows, `most_rows` at most.

        Raises:
            EngineUnusable: there is no memory for one variation.
        """
        steps = max(window.frames for state in states for window in state.windows) + int(self.delays.max())
        prefix_steps = self.checkpoint.chroma_length + max(len(state.conditions.text) for state in states)
        row_bytes, prefix_bytes = (self.decoder.cache_bytes(n) for n in (steps, prefix_steps))
        n_prefixes = distinct_prefixes(states)
        rows = memory_budget.rows_at_once(
            lambda rows: rows * row_bytes + min(rows, n_prefixes) * prefix_bytes,
            min(sum(state.n_rows for state in states), most_rows or self.decoder.most_rows),
            self.max_memory_gb,
            codec.decoding_bytes(self.checkpoint, max(state.codes.shape[1] for state in states))
            * (GPU_THREADS if self.on_gpu else 1),
            self.checkpoint.device,
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
        source, melody_source = builder.melody(request, params.melody)
        identity = self._identity(request, melody_source)
        codes = self.saved.load(identity, shape)
        return RequestState(
            request_id=request.request_id,
            conditions=builder.conditions(source, params.prompt, starts),
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
        on_piece: Callable[[int], None],
    ) -> Variation:
        samples = codec.decode(self.checkpoint, encodec.open(), state.codes, on_piece)
        samples = np.ascontiguousarray(samples[:, : self._n_samples(request)])
        if not np.isfinite(samples).all() or not samples.any():
            raise EngineFailure("musicgen made silence or NaN.")
        details: dict[str, Any] = {
            "frames": state.codes.shape[1],
            "windows": len(state.windows),
            "melody": state.melody_source,
            "precision": self.decoder.precision,
        }
        if self.check is not None:
            details[f"{self.check.precision}_check"] = self.check.facts
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

    def _beside(
        self, tokens: Iterable[RequestState | Failure], decode: Callable[[RequestState | Failure], Any]
    ) -> Iterator[Any]:
        """`decode` of everything in order, in other threads while the next tokens are made.

        They are decoded one by one: in a batch, a sound would have other bits in another company.
        """
        waiting: deque[Future[Any]] = deque()
        try:
            for state in tokens:
                waiting.append(self._threads.submit(decode, state))
                while waiting and waiting[0].done():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after a stop or an error the next call finds the threads and the memory free
            for future in waiting:
                future.cancel()
            wait(waiting)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        """Threads with a stream of the GPU each; they are kept, because a new one is slow at first."""
        import torch

        def own_stream() -> None:
            torch.cuda.set_stream(torch.cuda.Stream(self.checkpoint.device))  # type: ignore[no-untyped-call]

        return ThreadPoolExecutor(GPU_THREADS, "musicgen", own_stream)
