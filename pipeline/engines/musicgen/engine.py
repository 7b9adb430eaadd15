"""The generator: requests in, variations out, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.engines.base import ProgressFn, StopFn
from pipeline.engines.musicgen import VERSION, MusicgenParams, conditioning
from pipeline.engines.musicgen.generation import Generated, generate
from pipeline.engines.musicgen.loader import Checkpoint
from pipeline.engines.musicgen.sampling import Sampler, SamplingParams
from pipeline.engines.pretrained import first_line
from pipeline.errors import ConfigError, EngineFailure, PipelineError, Stopped
from pipeline.records import Audio, Failure, Variation, VariationRequest

MIN_FRAMES = 4  # below 2 * 4 - 1 positions the library doesn't apply the delay pattern


class MusicgenGenerator:
    """MusicGen-Melody behind the generator protocol.

    The same request gives the same samples bit for bit on the same machine, with the same torch
    and number of threads; elsewhere sums may round otherwise, and one other token changes the rest.
    """

    name = "musicgen"
    version = VERSION

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.sample_rate = checkpoint.sample_rate

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        """Yield a result per request, in order. A step makes one frame: 50 are one second.

        Longer than the model's own window (30 s) is a Failure: it has never seen more at once.

        Raises:
            Stopped: within one step of `should_stop` turning true.
        """
        for request in requests:
            yield self._result(request, progress, should_stop)

    def run(self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn) -> Generated:
        """Whole frames of tokens and sound, at least as long as asked for."""

        def on_step(done: int, total: int) -> None:
            if should_stop():
                raise Stopped("musicgen was asked to stop.")
            progress(request.request_id, done, total)

        if should_stop():
            raise Stopped("musicgen was asked to stop.")
        params = MusicgenParams.model_validate(dict(request.params))
        extractor = self.checkpoint.feature_extractor
        window = conditioning.melody(request.audio, extractor.sampling_rate, extractor.n_samples)
        return generate(
            self.checkpoint,
            chroma=conditioning.chroma(extractor, window),
            text=conditioning.text(self.checkpoint.tokenizer, params.prompt),
            n_frames=max(MIN_FRAMES, math.ceil(self._n_samples(request) / self.checkpoint.hop_samples)),
            sampler=Sampler(
                SamplingParams(params.temperature, params.top_k, params.top_p, params.guidance), request.seed
            ),
            on_step=on_step,
        )

    def _result(
        self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn
    ) -> Variation | Failure:
        try:
            return self._variation(request, progress, should_stop)
        except Stopped:
            raise
        except PipelineError as error:
            return Failure(request.request_id, error)
        except (
            RuntimeError,
            ValueError,
            MemoryError,
        ) as error:  # torch: no memory left, shapes that don't fit
            failure = EngineFailure(f"musicgen broke off: {type(error).__name__}: {first_line(error)}.")
            failure.__cause__ = error
            return Failure(request.request_id, failure)

    def _variation(self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn) -> Variation:
        limit_s = self.checkpoint.max_duration_s
        if request.duration_s > limit_s:
            raise ConfigError(
                f"generate.duration_s: {request.duration_s:g} s is more than the {limit_s:g} s that "
                f"{self.checkpoint.weights.model} makes at once; ask for {limit_s:g} or less."
            )
        made = self.run(request, progress, should_stop)
        samples = np.ascontiguousarray(made.samples[:, : self._n_samples(request)])
        if not np.isfinite(samples).all() or not samples.any():
            raise EngineFailure("musicgen made silence or NaN.")
        details = {"frames": int(made.codes.shape[1]), "melody_s": min(request.audio.duration_s, limit_s)}
        return Variation(request.request_id, Audio(samples, self.sample_rate), details)

    def _n_samples(self, request: VariationRequest) -> int:
        return round(request.duration_s * self.sample_rate)
