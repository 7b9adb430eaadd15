"""audiocraft's language model as a peer, where audiocraft is installed.

Random weights, and a prefix as long as transformers' whose content is made up: melody and text
encoder, which audiocraft would have to download, cost next to nothing beside the prefill. On the CPU
it runs in float32 with torch's attention, as audiocraft's own loader sets up musicgen-melody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peer_transformers import GUIDANCE, TOP_K
from steps import (
    CODEBOOKS,
    DURATION_S,
    FRAME_RATE,
    HIDDEN,
    LAYERS,
    OWN_STEPS,
    TIMED_STEPS,
    Measured,
    Missing,
    PeerRun,
    StepTimer,
)

if TYPE_CHECKING:
    import torch

PREFIX = 235 + 4  # chroma and a short prompt


def run(variations: int, own_steps: Sequence[int] = OWN_STEPS, timed: int = TIMED_STEPS) -> PeerRun | Missing:
    """Time LMModel.generate() with guidance and top_k for a batch of variations, in this process."""
    name = "audiocraft, float32"
    try:
        from audiocraft.modules.conditioners import (  # type: ignore[import-not-found, unused-ignore]
            ConditioningAttributes,
        )

        began_s = time.perf_counter()
        lm = _language_model()
    except ImportError as error:
        return Missing(name, variations, f"audiocraft isn't installed here with all it needs ({error})")
    import torch

    load_s = time.perf_counter() - began_s
    torch.manual_seed(0)
    timer = StepTimer(_StreamingCache(lm), 2 * variations, own_steps, timed)
    with torch.inference_mode(), contextlib.suppress(Measured):
        timer.start()
        lm.generate(
            conditions=[ConditioningAttributes(text={"prefix": ""}) for _ in range(variations)],
            max_gen_len=round(FRAME_RATE * DURATION_S),
            top_k=TOP_K,
            cfg_coef=GUIDANCE,
            callback=lambda _done, _total: timer.step_done(),
        )
    return timer.result(name, load_s)


def _language_model() -> Any:
    """As config/model/lm/musicgen_lm.yaml of audiocraft says, at the scale "medium"."""
    import torch
    from audiocraft.models.lm import LMModel  # type: ignore[import-not-found, unused-ignore]
    from audiocraft.modules.codebooks_patterns import (  # type: ignore[import-not-found, unused-ignore]
        DelayedPatternProvider,
    )
    from audiocraft.modules.conditioners import (
        ConditionFuser,
        ConditioningProvider,
        TextConditioner,
    )

    class Prefix(TextConditioner):  # type: ignore[misc, unused-ignore]
        """Takes the place of chroma and text, with a fixed number of positions."""

        def __init__(self) -> None:
            super().__init__(1, 1)

        def tokenize(self, texts: list[str | None]) -> int:
            return len(texts)

        def forward(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.randn(rows, PREFIX, HIDDEN), torch.ones(rows, PREFIX)

    with torch.device("meta"):
        lm = LMModel(
            DelayedPatternProvider(CODEBOOKS),
            ConditioningProvider({}),
            ConditionFuser({"sum": [], "cross": [], "prepend": ["prefix"], "input_interpolate": []}),
            n_q=CODEBOOKS,
            card=2048,
            dim=HIDDEN,
            num_heads=HIDDEN // 64,
            num_layers=LAYERS,
            hidden_scale=4,
            norm_first=True,
            bias_proj=False,
            bias_ff=False,
            bias_attn=False,
            causal=True,
            memory_efficient=True,
            activation="gelu",
            dropout=0.0,
        )
    lm.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(1.0)
    lm.condition_provider.conditioners["prefix"] = Prefix()
    return lm.eval()


class _StreamingCache:
    """The KV cache, which each attention layer keeps between steps."""

    def __init__(self, lm: Any) -> None:
        self._states = [layer.self_attn._streaming_state for layer in lm.transformer.layers]

    def get(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._states[layer]["past_keys"], self._states[layer]["past_values"]

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._states[layer] |= {"past_keys": keys, "past_values": values}
