"""The generator: one request after the other, each with its own `MusicGen` object.

audiocraft stores a request's parameters on the model and draws from torch's global random generator.
Here a `MusicGen`, which is a thin wrapper around the weights, is made for each request, gets all
parameters at once, and runs with a seeded generator whose state is restored afterwards. So a result
depends on its own request alone. audiocraft's two-step guidance ignores the coefficient and is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.engines.audiocraft import VERSION
from pipeline.engines.base import ProgressFn, StopFn, check_stop
from pipeline.engines.musicgen import SamplingParams
from pipeline.engines.musicgen.windows import STRIDE, windows
from pipeline.records import Audio, Failure, Variation, VariationRequest

if TYPE_CHECKING:
    import torch

MIN_FRAMES = 4  # one per codebook: the shortest run in which the delay pattern is whole
MARGIN_S = 1.0  # of melody after the last window: its last chroma frames reach 0.26 s past its end
GOLDEN_RATIO = 0x9E3779B1  # times 2**-32: Knuth's multiplier, which spreads bits


class AudiocraftGenerator:
    """A generator made of audiocraft's MusicGen-Melody.

    The same request gives the same samples bit for bit on the same machine, with the same torch
    and number of threads. It uses torch's global random generator, so no other thread of the process
    may draw from that while `generate` runs.
    """

    name = "audiocraft"
    version = VERSION

    def __init__(self, model: str, language_model: Any, encodec: Any) -> None:
        """Of a checkpoint's name, its audiocraft.models.LMModel and its CompressionModel."""
        self.model, self.language_model, self.encodec = model, language_model, encodec
        self.sample_rate = int(encodec.sample_rate)

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        """Yield a result per request, in order. A step makes one frame, of which a second has 50.

        A piece that is longer than the model's window (30 s) is made in windows that overlap by 12 s.
        Each window follows the melody of its own time, repeated from the start where the source ends.

        Raises:
            Stopped: within one step after `should_stop` returned true.
        """
        for request in requests:
            try:
                yield self._variation(request, progress, should_stop)
            except Exception as error:  # assertions, lack of memory, NaN in the distribution
                yield Failure(request.request_id, error)

    def _variation(self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn) -> Variation:
        import torch

        check_stop(should_stop)
        params = SamplingParams.model_validate(dict(request.params))
        model = self._musicgen()
        n_samples = round(request.duration_s * self.sample_rate)
        n_frames = max(MIN_FRAMES, math.ceil(n_samples * model.frame_rate / self.sample_rate))
        stride_s = STRIDE * model.max_duration
        longest, stride = int(model.max_duration * model.frame_rate), int(model.frame_rate * stride_s)
        plan = windows(n_frames, longest, stride)
        total = sum(self._steps(window.frames, longest - stride if window.start else 0) for window in plan)
        done = 0

        def on_step(*_: int) -> None:  # audiocraft's own count starts again in each window
            nonlocal done
            done += 1
            check_stop(should_stop)
            progress(request.request_id, done, total)

        model.set_custom_progress_callback(on_step)
        # audiocraft rounds frames down in floating point; half a frame more makes that certain.
        model.set_generation_params(
            use_sampling=params.temperature > 0,
            temperature=params.temperature,
            top_k=min(params.top_k, model.lm.card),
            top_p=params.top_p,
            cfg_coef=params.guidance,
            two_step_cfg=False,
            duration=model.max_duration if n_frames == longest else (n_frames + 0.5) / model.frame_rate,
            extend_stride=stride_s,
        )
        melody_s = plan[-1].start / model.frame_rate + model.max_duration + MARGIN_S
        melody = request.audio.mono_channels[:, : math.ceil(melody_s * request.audio.sample_rate)]
        with torch.inference_mode(), seeded(request.seed, model.device):
            sound = model.generate_with_chroma(
                [params.prompt.strip()],
                [torch.tensor(melody)],
                request.audio.sample_rate,
                progress=True,  # without it the callback is not called
            )
        samples = np.ascontiguousarray(sound[0, :, :n_samples].to("cpu", torch.float32).numpy())
        details = {"frames": n_frames, "windows": len(plan)}
        return Variation(request.request_id, Audio(samples, self.sample_rate), details)

    def _musicgen(self) -> Any:
        """A new `MusicGen` with the loaded weights."""
        from audiocraft.models import MusicGen

        # The constructor refuses windows below the default stride of 18 s, which some checkpoints have.
        model = MusicGen(self.model, self.encodec, self.language_model, max_duration=math.inf)
        model.max_duration = float(self.language_model.cfg.dataset.segment_duration)
        return model

    def _steps(self, frames: int, known: int) -> int:
        """Calls of the language model in a window of which the first `known` frames are there already.

        There is one per frame, and some that the delay pattern adds.
        """
        pattern = self.language_model.pattern_provider.get_pattern(frames)
        return len(pattern.layout) - int(pattern.get_first_step_with_timesteps(known))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of the device, and restore them afterwards."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(folded(seed))
        yield


def folded(seed: int) -> int:
    """A seed as 32 bits, as torch's generator on the CPU ignores all others; small seeds are unchanged."""
    return (seed ^ (seed >> 32) * GOLDEN_RATIO) & 0xFFFFFFFF
