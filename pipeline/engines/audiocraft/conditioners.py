"""audiocraft's two conditioners without the downloads in their constructors.

The arithmetic and the names of the weights are audiocraft's. This module imports audiocraft, so it is
imported only where a checkpoint is loaded.
"""

from __future__ import annotations

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

# Settings that only training uses: evaluation sets, caches, how lengths are matched.
TRAINING_ONLY = ("match_len_on_eval", "eval_wavs", "n_eval_wavs", "cache_path")


class MixChromaConditioner(ChromaStemConditioner):  # type: ignore[misc]  # the library is untyped here
    """Chroma of the whole mix.

    audiocraft's own conditioner separates vocals and other instruments with demucs and takes their chroma.
    That is better for a mix with strong drums and bass, but not for melodic input
    (facebookresearch/audiocraft #478), and demucs' weights are a pickle that would have to be downloaded.
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
        # As in `MusicGen.get_pretrained`: always a whole window of chroma, repeated if the melody is short.
        self.match_len_on_eval, self._use_masking = True, False

    def _get_stemmed_wav(self, wav: torch.Tensor, sample_rate: int) -> torch.Tensor:
        """The audio whose chroma is taken, (items, 1, samples), at the model's rate: the whole mix."""
        assert sample_rate == self.sample_rate
        return wav


class PromptConditioner(T5Conditioner):  # type: ignore[misc]  # the library is untyped here
    """A T5 that is loaded already."""

    def __init__(self, dim: int, output_dim: int, device: str, tokenizer: Any, encoder: Any) -> None:
        TextConditioner.__init__(self, dim, output_dim)
        self.device, self.finetune, self.word_dropout = device, False, 0.0
        self.normalize_text, self.t5_tokenizer = False, tokenizer
        self.__dict__["t5"] = encoder  # no submodule, as a checkpoint doesn't have its weights
        self.autocast = in_float32(device)


def in_float32(device: str) -> Any:
    """A context without the half precision in which audiocraft runs the other parts on a GPU."""
    kind = torch.device(device).type
    return TorchAutocast(enabled=kind != "cpu", device_type=kind, dtype=torch.float32)
