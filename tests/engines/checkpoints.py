"""Builders of tiny random checkpoints in the real file format.

The configurations are those of the published checkpoints (facebook/musicgen-melody,
facebook/musicgen-stereo-melody, laion/clap-htsat-unfused) with small widths: same kinds of layers,
codebooks, vocabulary of the codes, rates, chroma, files. The weights are drawn wider than the
library would, so that the tokens of a random model depend on its conditions.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BuildFn = Callable[..., Path]  # takes a name and the options of `build_musicgen`
PROMPT_WORDS = ("warm", "analog", "synths", "slow", "piano", "fast", "drums")


def need_models() -> None:
    """Skip the test where the models' packages are not installed."""
    for package in ("torch", "torchaudio", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not in the core install")


def build_musicgen(
    folder: Path, *, channels: int = 1, seed: int = 0, window_s: int = 30, **widths: int
) -> Path:
    """A MusicGen-Melody checkpoint: 4 codebooks (8 in stereo) of 2048, 50 frames/s at 32 kHz.

    `window_s`: what it was trained on, 30 s in all that are published. `widths` replace the
    decoder's own: hidden_size, ffn_dim, num_hidden_layers, num_attention_heads.
    """
    import torch
    from transformers import MusicgenMelodyConfig, MusicgenMelodyForConditionalGeneration

    config = MusicgenMelodyConfig(
        text_encoder=_text_encoder(),
        audio_encoder=_audio_encoder(),
        decoder=_decoder(channels) | widths,
        num_chroma=12,
        chroma_length=window_s * 32000 // 4096 + 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MusicgenMelodyForConditionalGeneration(config)
        _randomize(model.decoder, 0.3 * (32 / config.decoder.hidden_size) ** 0.5)
        _randomize(model.text_encoder, 0.3)
        for projection in (model.enc_to_dec_proj, model.audio_enc_to_dec_proj):
            torch.nn.init.normal_(projection.weight, std=1.0)
        for layer in model.audio_encoder.quantizer.layers:
            torch.nn.init.normal_(layer.codebook.embed)
    model.generation_config.update(
        do_sample=True,
        guidance_scale=3.0,
        max_length=1500,
        pad_token_id=2048,
        bos_token_id=2048,
        decoder_start_token_id=2048,
    )
    model.save_pretrained(folder)
    _as_published(folder / "model.safetensors", config.decoder.hidden_size)
    musicgen_processor(folder, window_s)
    return folder


def build_clap(folder: Path, *, fusion: bool = False, seed: int = 0, config: Any = None) -> Path:
    """A CLAP checkpoint: 48 kHz, 10 s, 64 mel bands; HTSAT of two stages, 32 dimensions, or by `config`."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, RobertaTokenizer

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    audio: dict[str, Any] = {
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "enable_fusion": fusion,
        "fusion_type": "aff_2d" if fusion else None,
    }
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = config or ClapConfig(
        text_config={**text, "vocab_size": len(pieces)}, audio_config=audio, projection_dim=32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ClapModel(config)
        _randomize(model, 0.3)
    model.save_pretrained(folder)
    ClapFeatureExtractor(truncation="fusion" if fusion else "rand_trunc").save_pretrained(folder)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def _text_encoder() -> dict[str, Any]:
    widths = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return {"model_type": "t5", "vocab_size": 128, **widths}


def _audio_encoder() -> dict[str, Any]:
    """As EnCodec 32 kHz: not causal, weight norm, an LSTM, 4 codebooks of 2048, a hop of 640."""
    return {
        "model_type": "encodec",
        "sampling_rate": 32000,
        "audio_channels": 1,
        "upsampling_ratios": [8, 5, 4, 4],
        "num_filters": 2,
        "hidden_size": 16,
        "codebook_dim": 16,
        "codebook_size": 2048,
        "target_bandwidths": [2.2],
        "num_lstm_layers": 1,
        "use_causal_conv": False,
        "use_conv_shortcut": False,
        "normalize": False,
    }


def _decoder(channels: int) -> dict[str, Any]:
    widths = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"vocab_size": 2048, "num_codebooks": 4 * channels, "audio_channels": channels, **widths}


def _randomize(module: Any, std: float) -> None:
    import torch

    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)


def _as_published(path: Path, hidden: int) -> None:
    """As older libraries wrote the published files: EnCodec's old names, and an unused table of positions."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {}
    for name, weight in load_file(path).items():
        prefix, _, tail = name.rpartition(".parametrizations.weight.")
        old = {"original0": "weight_g", "original1": "weight_v"}.get(tail)
        weights[f"{prefix}.{old}" if old else name] = weight.clone()
    weights["decoder.model.decoder.embed_positions.weights"] = torch.full((2048, hidden), 9.0)
    save_file(weights, path, metadata={"format": "pt"})


def musicgen_processor(folder: Path, window_s: int = 30) -> None:
    """Chroma settings and a T5 tokenizer of a few words and all letters, as separate files."""
    from transformers import MusicgenMelodyFeatureExtractor, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in PROMPT_WORDS]
    pieces += [(letter, -9.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    MusicgenMelodyFeatureExtractor(chunk_length=window_s).save_pretrained(folder)
