"""The generator: requests in, variations out, one after the other, each by a `MusicGen` of its own.

audiocraft keeps a request's parameters on the model and draws from torch's global generator. Here
a `MusicGen`, which is a thin shell around the weights, is made for each request, gets all
parameters at once, and runs under a seeded generator that is put back afterwards. So a result
depends on its own request alone. Its two-step guidance, which ignores the asked coefficient, is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.audiocraft import VERSION
from pipeline.engines.audiocraft.loader import Checkpoint
from pipeline.engines.base import ProgressFn, StopFn, check_stop
from pipeline.engines.musicgen import SamplingParams
from pipeline.engines.pretrained import first_line
from pipeline.errors import EngineFailure, PipelineError, Stopped
from pipeline.records import Audio, Failure, Samples, Variation, VariationRequest

if TYPE_CHECKING:
    import torch

STRIDE = 0.6  # of the window: what audiocraft moves on by beyond it, 18 of 30 s
MIN_FRAMES = 4  # one per codebook: the shortest run in which the delay pattern is whole
MARGIN_S = 1.0  # of melody beyond the last window: its last chroma frames look 0.26 s past its end
GOLDEN_RATIO = 0x9E3779B1  # times 2**-32: Knuth's multiplier, which spreads bits


@dataclass(frozen=True, eq=False)
class Generated:
    """What the model made."""

    samples: Samples  # float32, (channels, frames * hop)
    codes: NDArray[np.int64]  # (codebooks, frames); stereo checkpoints interleave left and right
    windows: int  # how many it took


@dataclass(frozen=True)
class Window:
    """One call of the language model: it continues `start` frames up to `stop`, counted in the window."""

    offset: int  # where the window begins, in frames of the whole
    start: int
    stop: int


class AudiocraftGenerator:
    """audiocraft's MusicGen-Melody behind the generator protocol.

    The same request gives the same samples bit for bit on the same machine, with the same torch
    and number of threads. While it works it uses torch's global random generator: nothing else in
    the process should draw from that meanwhile.
    """

    name = "audiocraft"
    version = VERSION

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.sample_rate = int(checkpoint.encodec.sample_rate)

    def generate(
        self, requests: Sequence[VariationRequest], *, progress: ProgressFn, should_stop: StopFn
    ) -> Iterator[Variation | Failure]:
        """Yield a result per request, in order. A step makes one frame: 50 are one second.

        Beyond the model's window (30 s) audiocraft goes on by windows that overlap by 12 s, each
        with the melody of its own time, repeated from the start where the source ends.

        Raises:
            Stopped: within one step of `should_stop` turning true.
        """
        for request in requests:
            yield self._result(request, progress, should_stop)

    def run(self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn) -> Generated:
        """Whole frames of tokens and sound, at least as long as asked for."""
        import torch

        check_stop(should_stop, "audiocraft")
        params = SamplingParams.model_validate(dict(request.params))
        model = self._musicgen()
        n_frames = max(MIN_FRAMES, math.ceil(self._n_samples(request) * model.frame_rate / self.sample_rate))
        stride_s = STRIDE * model.max_duration
        longest = int(model.max_duration * model.frame_rate)
        plan = windows(n_frames, longest, int(model.frame_rate * stride_s))
        total, done = sum(self._steps(window) for window in plan), 0

        def on_step(*_: int) -> None:  # audiocraft counts from the start again in each window
            nonlocal done
            done += 1
            check_stop(should_stop, "audiocraft")
            progress(request.request_id, done, total)

        model.set_custom_progress_callback(on_step)
        # audiocraft rounds frames down, in floating point: half a frame more is the same number for certain.
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
        heard_s = plan[-1].offset / model.frame_rate + model.max_duration + MARGIN_S
        heard = request.audio.mono_channels[:, : math.ceil(heard_s * request.audio.sample_rate)]
        with torch.inference_mode(), seeded(request.seed, model.device):
            sound, codes = model.generate_with_chroma(
                [params.prompt.strip()],
                [torch.tensor(heard)],
                request.audio.sample_rate,
                progress=True,  # without it the callback isn't asked
                return_tokens=True,
            )
        return Generated(sound[0].to("cpu", torch.float32).numpy(), codes[0].cpu().numpy(), len(plan))

    def _musicgen(self) -> Any:
        """audiocraft's model, new, around the weights."""
        from audiocraft.models import MusicGen

        checkpoint = self.checkpoint
        lm = checkpoint.language_model
        # The constructor insists on a window above the default stride, 18 s, which not all checkpoints have.
        model = MusicGen(checkpoint.weights.model, checkpoint.encodec, lm, max_duration=math.inf)
        model.max_duration = float(lm.cfg.dataset.segment_duration)
        return model

    def _steps(self, window: Window) -> int:
        """How often the language model is asked in a window: once a frame, and for the codebooks' lag."""
        pattern = self.checkpoint.language_model.pattern_provider.get_pattern(window.stop)
        return len(pattern.layout) - int(pattern.get_first_step_with_timesteps(window.start))

    def _result(
        self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn
    ) -> Variation | Failure:
        try:
            return self._variation(request, progress, should_stop)
        except Stopped:
            raise
        except PipelineError as error:
            return Failure(request.request_id, error)
        except Exception as error:  # audiocraft asserts, torch runs out of memory or gets NaN to draw from
            failure = EngineFailure(f"audiocraft broke off: {type(error).__name__}: {first_line(error)}.")
            failure.__cause__ = error
            return Failure(request.request_id, failure)

    def _variation(self, request: VariationRequest, progress: ProgressFn, should_stop: StopFn) -> Variation:
        made = self.run(request, progress, should_stop)
        samples = np.ascontiguousarray(made.samples[:, : self._n_samples(request)])
        if not np.isfinite(samples).all() or not samples.any():
            raise EngineFailure("audiocraft made silence or NaN.")
        details = {"frames": int(made.codes.shape[1]), "windows": made.windows}
        return Variation(request.request_id, Audio(samples, self.sample_rate), details)

    def _n_samples(self, request: VariationRequest) -> int:
        return round(request.duration_s * self.sample_rate)


def windows(n_frames: int, longest: int, stride: int) -> list[Window]:
    """The windows in which audiocraft makes `n_frames`: of `longest` frames at most, `stride` apart."""
    plan = [Window(0, 0, min(n_frames, longest))]
    while plan[-1].offset + plan[-1].stop < n_frames:
        offset = plan[-1].offset + stride
        plan.append(Window(offset, plan[-1].stop - stride, min(n_frames - offset, longest)))
    return plan


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded, of the CPU and of the device, and as before afterwards."""
    import torch

    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(folded(seed))  # torch.manual_seed would reach every GPU
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(folded(seed))
        yield


def folded(seed: int) -> int:
    """A seed in 32 bits, all that torch's generator on the CPU looks at; small ones are as they were."""
    return (seed ^ (seed >> 32) * GOLDEN_RATIO) & 0xFFFFFFFF
