"""audiocraft's two conditioners without what they download when they are made.

Both keep audiocraft's arithmetic and the names of its weights; only their constructors are ours.
Imports audiocraft: import this module only where it is about to be used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from audiocraft.modules.chroma import ChromaExtractor
from audiocraft.modules.conditioners import (
    ChromaStemConditioner,
    T5Conditioner,
    TextConditioner,
    WaveformConditioner,
)
from audiocraft.utils.autocast import TorchAutocast

from pipeline.errors import BadCheckpoint

TextEncoder = tuple[Any, Any]  # a T5 tokenizer and its encoder
# Settings of audiocraft's that are about training: evaluation sets, caches, how lengths are matched.
TRAINING_ONLY = ("match_len_on_eval", "eval_wavs", "n_eval_wavs", "cache_path")


class MixChromaConditioner(ChromaStemConditioner):  # type: ignore[misc]  # the library is untyped here
    """Chroma of the whole mix.

    audiocraft's own loads demucs and takes the chroma of vocals and other instruments alone. For a
    mix with strong drums and bass that is better, for what is melodic already it isn't
    (facebookresearch/audiocraft #478), and demucs' weights are a pickle from a server of their own.
    """

    def __init__(self, output_dim: int, duration_s: float, device: str, **settings: Any) -> None:
        """`settings`: those of the checkpoint's configuration under `chroma_stem`."""
        chroma = {key: value for key, value in settings.items() if key not in TRAINING_ONLY}
        WaveformConditioner.__init__(self, chroma["n_chroma"], output_dim, device)
        self.autocast = in_float32(device)
        self.sample_rate, self.duration = chroma["sample_rate"], duration_s
        self.chroma = ChromaExtractor(**chroma).to(device)
        self.chroma_len = self._get_chroma_len()
        self.eval_wavs = self.cache = None
        # As `MusicGen.get_pretrained` has it: always a whole window of chroma, repeated if need be.
        self.match_len_on_eval, self._use_masking = True, False

    def _get_stemmed_wav(self, wav: torch.Tensor, sample_rate: int) -> torch.Tensor:
        """The melody to look at, (items, 1, samples): all of it. It is at the model's rate already."""
        assert sample_rate == self.sample_rate
        return wav


class PromptConditioner(T5Conditioner):  # type: ignore[misc]  # the library is untyped here
    """T5, opened when there is first something to read."""

    def __init__(
        self,
        dim: int,
        output_dim: int,
        device: str,
        *,
        normalize_text: bool,
        open_t5: Callable[[], TextEncoder],
    ) -> None:
        """`open_t5` may raise: then the request fails that has a prompt."""
        TextConditioner.__init__(self, dim, output_dim)
        self.device, self.finetune, self.word_dropout = device, False, 0.0
        self.normalize_text, self._open_t5 = False, open_t5
        self._is_normalizing = normalize_text
        self.autocast = in_float32(device)

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        if self._is_normalizing:
            raise BadCheckpoint(
                "This checkpoint normalizes prompts with spaCy's en_core_web_sm, which is not loaded: "
                "leave the prompt empty, or take another checkpoint."
            )
        return self._open_t5()

    @property
    def t5_tokenizer(self) -> Any:
        return self._text_encoder[0]

    @property
    def t5(self) -> Any:
        return self._text_encoder[1]

    def tokenize(self, x: list[str | None]) -> Any:
        """As audiocraft's; without any text only a mask, which says so."""
        if not any(x):
            return {"attention_mask": torch.zeros(len(x), 1, dtype=torch.long, device=self.device)}
        return super().tokenize(x)

    def forward(self, inputs: Any) -> Any:
        """As audiocraft's, (items, tokens, dim) and their mask: no text is one masked token."""
        if "input_ids" in inputs:
            return super().forward(inputs)
        mask = inputs["attention_mask"]
        return self.output_proj.weight.new_zeros(*mask.shape, self.output_dim), mask


def in_float32(device: str) -> Any:
    """A context that keeps out the half precision in which audiocraft runs the rest on a GPU."""
    kind = torch.device(device).type
    return TorchAutocast(enabled=kind != "cpu", device_type=kind, dtype=torch.float32)
