"""The generator: requests in, variations out, as they finish."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engines.base import ProgressFn, StopFn, check_stop
from pipeline.engines.musicgen import (
    VERSION,
    MusicgenParams,
    codec,
    conditioning,
    melody,
    memory_budget,
    savepoints,
)
from pipeline.engines.musicgen.checkpoint import Checkpoint
from pipeline.engines.musicgen.melody import Heard, Melody
from pipeline.engines.musicgen.precision import Opened
from pipeline.engines.musicgen.sampling import Sampler, SamplingParams
from pipeline.engines.musicgen.savepoints import Savepoints
from pipeline.engines.musicgen.scheduler import BREAKING, Batch, Ended, Voice, distinct_prefixes
from pipeline.engines.musicgen.shm import Shelf
from pipeline.engines.musicgen.windows import STRIDE, UNKNOWN, windows
from pipeline.engines.pretrained import first_line
from pipeline.errors import EngineFailure, PipelineError, Stopped
from pipeline.records import Audio, Failure, Samples, Variation, VariationRequest

SAVE_EVERY_S = 2.0  # of audio


class MusicgenGenerator:
    """MusicGen-Melody behind the generator protocol.

    The same request gives the same tokens alone, among any others, in any order and after an
    interruption, on the same kind of processor and with the same torch. Elsewhere torch may round the
    conditions otherwise, and one other token changes the rest; the decoder itself finds the same bits.
    """

    name = "musicgen"
    version = VERSION

    def __init__(
        self,
        checkpoint: Checkpoint,
        opened: Opened,
        *,
        max_memory_gb: float | None = None,
        saved: Savepoints | None = None,
        shelf: Shelf | None = None,
        stride: float = STRIDE,
        cache_dir: Path | None = None,
    ) -> None:
        """`saved` None: an interrupted call begins anew. `stride`: of windows, as a share of their length.

        `shelf`: where keys and values outlive a kill; None: nowhere. `cache_dir`: the hub's, None: the
        library's own.
        """
        self.checkpoint, self.decoder, self.check = checkpoint, opened.decoder, opened.check
        self.sample_rate = checkpoint.sample_rate
        self.max_memory_gb, self.cache_dir = max_memory_gb, cache_dir
        self.saved = saved or Savepoints(None)
        self.shelf = shelf or Shelf(None)
        rate = checkpoint.sample_rate / checkpoint.hop_samples
        self.frames_per_s = rate
        self.window_frames = round(checkpoint.window_s * rate)
        self.stride_frames = round(checkpoint.window_s * stride * rate)
        self.lags = np.arange(checkpoint.codebooks, dtype=np.int64) // checkpoint.channels

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        """Yield a result per request, as they finish.

        Progress counts frames of tokens, 50 a second, then pieces of sound. What was made of a
        request that didn't get a result is kept, and made no second time.

        Raises:
            Stopped: within one step, or one piece of sound, of `should_stop` turning true.
        """
        by_id = {request.request_id: request for request in requests}
        sounding = Sounding(self.checkpoint)
        try:
            for ended in self.run(requests, progress, should_stop):
                if isinstance(ended, Failure):
                    yield ended
                    continue
                request = by_id[ended.voice.request_id]
                try:
                    if ended.error is not None:
                        raise ended.error
                    result = self._variation(request, ended.voice, sounding, progress, should_stop)
                except Stopped:
                    raise
                except BREAKING as error:
                    yield Failure(request.request_id, _failure(error))
                    continue
                yield result
                self.saved.drop(ended.voice.identity)
        finally:
            sounding.close()

    def run(
        self, requests: Sequence[VariationRequest], progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Ended | Failure]:
        """The tokens of all requests, as they finish."""
        prepared = self.prepare(requests, should_stop)
        yield from (failure for failure in prepared if isinstance(failure, Failure))
        voices = [voice for voice in prepared if isinstance(voice, Voice)]
        if not voices:
            return

        def on_step(voice: Voice, new: bool) -> None:
            assert voice.delayed is not None
            frames = voice.codes.shape[1]
            made = min(voice.delayed.window.start + voice.position, frames)
            progress(voice.request_id, made, frames + self._pieces(voice))
            is_due = voice.position % round(SAVE_EVERY_S * self.frames_per_s) == 0
            if new and (is_due or voice.position == voice.delayed.steps):  # then its rows are given away
                self.saved.save(voice.identity, voice.codes)

        going = list(voices)
        try:
            for ended in self.batch(voices, on_step, partial(check_stop, should_stop, self.name)).run(voices):
                if ended.error is None:
                    self.saved.save(ended.voice.identity, ended.voice.codes)
                yield ended
                going.remove(ended.voice)  # whoever asks for the next has had this one's result
        finally:  # whatever it was that ended it
            for voice in going:
                if (voice.codes != UNKNOWN).any():
                    self.saved.save(voice.identity, voice.codes)

    def prepare(self, requests: Sequence[VariationRequest], should_stop: StopFn) -> list[Voice | Failure]:
        """What each request needs before its first token."""
        ears = Ears(self.checkpoint, self.cache_dir, should_stop)
        prepared: list[Voice | Failure] = []
        for request in requests:
            try:
                check_stop(should_stop, self.name)
                prepared.append(self.voice(request, ears))
            except Stopped:
                raise
            except BREAKING as error:
                prepared.append(Failure(request.request_id, _failure(error)))
        ears.close()  # an error's traceback may hold it
        return prepared

    def batch(self, voices: Sequence[Voice], on_step: Any, check_stop: Any) -> Batch:
        """Room for the longest window and prefix among these voices."""
        steps = max(window.frames for voice in voices for window in voice.windows) + int(self.lags.max())
        prefix_steps = self.checkpoint.chroma_length + max(len(voice.conditions.text) for voice in voices)
        row_bytes, prefix_bytes = (self.decoder.bytes_of(n) for n in (steps, prefix_steps))
        n_prefixes = distinct_prefixes(voices, self.frames_per_s)

        def needs(rows: int) -> int:
            return rows * row_bytes + min(rows, n_prefixes) * prefix_bytes

        rows = memory_budget.rows_at_once(
            needs,
            sum(voice.n_rows for voice in voices),
            self.max_memory_gb,
            codec.decoding_bytes(self.checkpoint, max(voice.codes.shape[1] for voice in voices)),
            self.shelf.held_bytes,
        )
        facts = {
            "version": VERSION,
            "revision": self.checkpoint.weights.revision,
            "precision": self.decoder.precision,
        }
        return Batch(
            decoder=self.decoder,
            rows=rows,
            n_prefixes=min(rows, n_prefixes),
            steps=steps,
            prefix_steps=prefix_steps,
            lags=self.lags,
            frames_per_s=self.frames_per_s,
            on_step=on_step,
            check_stop=check_stop,
            files=partial(self.shelf.open, facts, needs(rows)),
        )

    def voice(self, request: VariationRequest, ears: Ears) -> Voice:
        params = MusicgenParams.model_validate(dict(request.params))
        n_frames = max(1, math.ceil(self._n_samples(request) / self.checkpoint.hop_samples))
        its_windows = windows(n_frames, self.window_frames, self.stride_frames)
        end_s = its_windows[-1].start / self.frames_per_s + self.checkpoint.window_s
        shape = (self.checkpoint.codebooks, n_frames)
        heard = ears.heard(request, params.melody).how
        identity = self._identity(request, heard)
        codes = self.saved.load(identity, shape)
        return Voice(
            request_id=request.request_id,
            conditions=conditioning.Conditions(
                chroma=ears.chroma(request, params.melody, end_s),
                frames_per_s=conditioning.chroma_rate(self.checkpoint),
                text=ears.text(params.prompt),
                checkpoint=self.checkpoint,
            ),
            heard=heard,
            identity=identity,
            sampler=Sampler(
                SamplingParams(params.temperature, params.top_k, params.top_p, params.guidance), request.seed
            ),
            windows=its_windows,
            codes=np.full(shape, UNKNOWN, np.int64) if codes is None else codes,
        )

    def _variation(
        self,
        request: VariationRequest,
        voice: Voice,
        sounding: Sounding,
        progress: ProgressFn,
        should_stop: StopFn,
    ) -> Variation:
        frames, pieces = voice.codes.shape[1], self._pieces(voice)

        def on_piece(made: int) -> None:
            progress(request.request_id, frames + made, frames + pieces)
            check_stop(should_stop, self.name)

        check_stop(should_stop, self.name)
        samples = codec.decode(self.checkpoint, sounding.codec, voice.codes, on_piece)
        samples = np.ascontiguousarray(samples[:, : self._n_samples(request)])
        if not np.isfinite(samples).all() or not samples.any():
            raise EngineFailure("musicgen made silence or NaN.")
        details: dict[str, Any] = {
            "frames": frames,
            "windows": len(voice.windows),
            "melody": voice.heard,
            "precision": self.decoder.precision,
        }
        if self.check is not None:
            details["int8_check"] = self.check.facts
        return Variation(request.request_id, Audio(samples, self.sample_rate), details)

    def _identity(self, request: VariationRequest, heard: str) -> str:
        """Of all that a request's tokens depend on; what is heard can depend on what is installed."""
        return savepoints.identity(
            VERSION,
            self.checkpoint.weights.revision,
            self.decoder.precision,
            self.checkpoint.device,
            self.stride_frames,
            heard,
            request.request_id,
            request.track_id,
            request.duration_s,
            request.seed,
            dict(request.params),
        )

    def _pieces(self, voice: Voice) -> int:
        return len(codec.pieces(self.checkpoint, voice.codes.shape[1]))

    def _n_samples(self, request: VariationRequest) -> int:
        return round(request.duration_s * self.sample_rate)


@dataclass(eq=False)
class Ears:
    """Each track's chroma and each prompt once per call; the requests of a track share their audio object.

    To be let go of when the requests are prepared: it may hold the text encoder.
    """

    checkpoint: Checkpoint
    cache_dir: Path | None  # of the hub
    should_stop: StopFn
    _heard: dict[tuple[int, str], Heard] = field(default_factory=dict)
    _chroma: dict[tuple[int, str, float], Samples] = field(default_factory=dict)
    _texts: dict[str, Samples] = field(default_factory=dict)

    def heard(self, request: VariationRequest, how: Melody) -> Heard:
        key = (id(request.audio), how)
        if key not in self._heard:
            self._heard[key] = melody.listen(
                request.audio,
                how,
                should_stop=self.should_stop,
                device=self.checkpoint.device,
                cache_dir=self.cache_dir,
            )
        return self._heard[key]

    def chroma(self, request: VariationRequest, how: Melody, end_s: float) -> Samples:
        key = (id(request.audio), how, end_s)
        if key not in self._chroma:
            heard = self.heard(request, how).audio
            self._chroma[key] = conditioning.listen(self.checkpoint, heard, end_s)
        return self._chroma[key]

    def text(self, prompt: str) -> Samples:
        if prompt not in self._texts:
            self._texts[prompt] = conditioning.text(self.checkpoint, prompt, lambda: self._text_encoder)
        return self._texts[prompt]

    def close(self) -> None:
        """Let go of everything."""
        self._heard.clear()
        self._chroma.clear()
        self._texts.clear()
        if self.__dict__.pop("_text_encoder", None) is not None:
            memory_budget.tidy()

    @cached_property
    def _text_encoder(self) -> Any:
        return self.checkpoint.text_encoder()


@dataclass(eq=False)
class Sounding:
    """EnCodec, from the first request that has its tokens to the last."""

    checkpoint: Checkpoint

    @cached_property
    def codec(self) -> Any:
        return self.checkpoint.codec()

    def close(self) -> None:
        if self.__dict__.pop("codec", None) is not None:
            memory_budget.tidy()


def _failure(error: Exception) -> PipelineError:
    if isinstance(error, PipelineError):
        return error
    failure = EngineFailure(f"musicgen broke off: {type(error).__name__}: {first_line(error)}.")
    failure.__cause__ = error
    return failure
