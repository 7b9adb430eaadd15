"""Builders of tiny random checkpoints in audiocraft's format, by audiocraft's own classes.

The configuration is that of the published facebook/musicgen-melody with small widths, and windows
as short as asked for. Import this only where audiocraft is installed.
"""

from __future__ import annotations

import contextlib
import string
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoints import PROMPT_WORDS

T5, T5_WIDTH = "t5-small", 512  # audiocraft finds the width of a T5 by its name
N_CODEBOOKS, CARD = 4, 200  # fewer tokens than the default top_k of 250

CONFIG = """
sample_rate: 32000
channels: 1
solver: musicgen
lm_model: transformer_lm
compression_model_checkpoint: //pretrained/facebook/encodec_32khz
compression_model_n_q: null
interleave_stereo_codebooks: {{use: {stereo}, per_timestep: false}}
dataset: {{segment_duration: {window_s}}}
autocast: true
codebooks_pattern:
  modeling: delay
  delay: {{delays: {delays}, flatten_first: 0, empty_initial: 0}}
transformer_lm:
  {{dim: 32, num_heads: 2, num_layers: 2, hidden_scale: 2, n_q: {n_q}, card: {card}, dropout: 0.0,
  emb_lr: null, activation: gelu, norm_first: true, bias_ff: false, bias_attn: false,
  bias_proj: false, past_context: null, causal: true, custom: false, memory_efficient: true,
  attention_as_float32: false, layer_scale: null,
  positional_embedding: sin, xpos: false, checkpointing: none, weight_init: gaussian,
  depthwise_init: current, zero_bias_init: true, norm: layer_norm, cross_attention: false,
  qk_layer_norm: false, qk_layer_norm_cross: false, attention_dropout: null, kv_repeat: 1,
  two_step_cfg: true}}
classifier_free_guidance: {{training_dropout: 0.2, inference_coef: 9.0}}
attribute_dropout: {{args: {{active_on_eval: false}}, text: {{}}, wav: {{self_wav: 0.5}}}}
fuser:
  {{cross_attention_pos_emb: false, cross_attention_pos_emb_scale: 1, sum: [],
  prepend: [self_wav, description], cross: [], input_interpolate: []}}
conditioners:
  self_wav:
    model: chroma_stem
    chroma_stem:
      {{sample_rate: '${{sample_rate}}', n_chroma: 12, radix2_exp: 14, argmax: true, match_len_on_eval: false,
      eval_wavs: null, n_eval_wavs: 100, cache_path: null}}
  description:
    model: t5
    t5: {{name: {t5}, finetune: false, word_dropout: 0.2, normalize_text: false}}
"""

ENCODEC_CONFIG = """
sample_rate: 32000
channels: 1
compression_model: encodec
encodec:
  {{autoencoder: seanet, quantizer: rvq, sample_rate: '${{sample_rate}}', channels: '${{channels}}',
  causal: false, renormalize: false}}
seanet:
  {{dimension: 16, channels: '${{channels}}', causal: '${{encodec.causal}}', n_filters: 2,
  n_residual_layers: 1, ratios: [8, 5, 4, 4], activation: ELU, activation_params: {{alpha: 1.0}},
  norm: weight_norm, norm_params: {{}}, kernel_size: 7, residual_kernel_size: 3, last_kernel_size: 7,
  dilation_base: 2, pad_mode: constant,
  true_skip: true, compress: 2, lstm: 1, disable_norm_outer_blocks: 0,
  decoder: {{trim_right_ratio: 1.0, final_activation: null, final_activation_params: null}}, encoder: {{}}}}
rvq:
  {{n_q: {n_q}, q_dropout: false, bins: {card}, decay: 0.99, kmeans_init: true, kmeans_iters: 50,
  threshold_ema_dead_code: 2, orthogonal_reg_weight: 0.0, orthogonal_reg_active_codes_only: false}}
no_quant: {{}}
"""


def build(folder: Path, *, window_s: float = 2.0, stereo: bool = False, seed: int = 0) -> Path:
    """A MusicGen-Melody checkpoint, with its T5 in a folder of its own inside, `t5-small`."""
    from audiocraft.models import builders
    from omegaconf import OmegaConf

    build_t5(folder / T5)
    lags = [lag for lag in range(N_CODEBOOKS) for _ in range(2 if stereo else 1)]
    text = CONFIG.format(
        stereo=str(stereo).lower(),
        window_s=window_s,
        delays=lags,
        n_q=len(lags),
        card=CARD,
        t5=T5,
    )
    config = OmegaConf.create(text)
    config.merge_with({"device": "cpu", "dtype": "float32"})
    with as_audiocraft(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = builders.get_lm_model(config)
        _randomize(model, 0.3)
        for conditioner in model.condition_provider.conditioners.values():
            torch.nn.init.normal_(conditioner.output_proj.weight, std=1.0)
    _save(folder / "state_dict.bin", model, OmegaConf.to_yaml(config))
    build_encodec(folder / "compression_state_dict.bin", seed)
    return folder


def build_encodec(path: Path, seed: int) -> None:
    """EnCodec as at 32 kHz: mono, a hop of 640, so 50 frames/s."""
    from audiocraft.models import builders
    from omegaconf import OmegaConf

    config = OmegaConf.create(ENCODEC_CONFIG.format(n_q=N_CODEBOOKS, card=CARD))
    config.device = "cpu"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = builders.get_compression_model(config)
        for layer in model.quantizer.vq.layers:
            torch.nn.init.normal_(layer._codebook.embed)
            layer._codebook.inited.fill_(1.0)
    _save(path, model, OmegaConf.to_yaml(config))


def build_t5(folder: Path) -> None:
    """A whole T5, of which only the encoder is used, as published: safetensors and a tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    config = T5Config(vocab_size=128, d_model=T5_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
        _randomize(model, 0.3)
    model.save_pretrained(folder)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in PROMPT_WORDS]
    pieces += [(letter, -9.0) for letter in string.ascii_letters]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)


@contextlib.contextmanager
def as_audiocraft(folder: Path) -> Iterator[None]:
    """Let audiocraft's own constructors find the T5 in `folder`, and separate sources by doing nothing."""
    from audiocraft.modules.conditioners import ChromaStemConditioner

    demucs = types.ModuleType("demucs")
    separator = types.SimpleNamespace(
        sources=["drums", "bass", "other", "vocals"], to=lambda device: separator
    )
    demucs.pretrained = types.SimpleNamespace(get_model=lambda name: separator)  # type: ignore[attr-defined]
    before, theirs = sys.modules.get("demucs"), ChromaStemConditioner._get_stemmed_wav
    sys.modules["demucs"] = demucs
    ChromaStemConditioner._get_stemmed_wav = lambda self, wav, sample_rate: wav
    try:
        with contextlib.chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ChromaStemConditioner._get_stemmed_wav = theirs
        del sys.modules["demucs"]
        if before is not None:
            sys.modules["demucs"] = before


def _save(path: Path, model: Any, config: str) -> None:
    """As `audiocraft.utils.export` writes it."""
    state = {"best_state": model.state_dict(), "xp.cfg": config, "version": "1.3.0", "exported": True}
    torch.save(state, path)


def _randomize(module: Any, std: float) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
