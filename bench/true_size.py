"""A random MusicGen-Melody checkpoint of the true size, in the real file format.

    python bench/true_size.py [--folder bench/.cache/musicgen-true-size]

Speed and memory depend on the shapes of the weights, not on what was learned, so a benchmark needs
no download. The configuration is that of facebook/musicgen-melody as the library's conversion
scripts write it (`convert_musicgen_melody_transformers.py`, `convert_encodec_checkpoint_to_pytorch.py`:
encodec_32khz; text encoder t5-base): 1.38 B parameters in the decoder, 1.55 B in all, 6.2 GB in
float32. Only the tokenizer is smaller, as its size costs nothing at run time.

The decoder's weights are normal, scaled by their number of inputs so that activations neither vanish
nor explode, with two choices that make the model behave like a trained one: queries and keys are large
enough that attention selects a few positions (otherwise it averages over 300 values and the prefix has
no effect), and the logits have a standard deviation of 2, so that sampling and quantization have effects.

The weights are drawn and written one shard at a time, into a folder of another name that is renamed
when all of it is on the disk. A build that was killed leaves nothing that looks complete.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "engines")]

if TYPE_CHECKING:
    import torch

FOLDER = ROOT / "bench" / ".cache" / "musicgen-true-size"
SHARD_BYTES = 2_000_000_000
SEED = 0
SCORE_STD = 2.0  # of attention's scores: of n keys about n / exp(SCORE_STD**2) matter
LOGIT_STD = 2.0


@dataclass(frozen=True)
class Built:
    """A checkpoint on this disk."""

    folder: Path
    size_bytes: int  # of all its files
    seconds: float  # that building took; 0: it was there


def ensure(folder: Path = FOLDER) -> Built:
    """Build the checkpoint unless it is there already. Takes about 7 GB of disk and 5 of memory."""
    if (folder / "config.json").is_file():
        return Built(folder, size_bytes(folder), 0.0)
    began_s = time.perf_counter()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a build that was killed
    part.mkdir(parents=True)
    build(part, published_config())
    _flush(part)
    part.rename(folder)
    _flush_folder(folder.parent)
    return Built(folder, size_bytes(folder), time.perf_counter() - began_s)


def size_bytes(folder: Path) -> int:
    """Of all files in the folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def published_config() -> Any:
    """transformers.MusicgenMelodyConfig of facebook/musicgen-melody."""
    from transformers import MusicgenMelodyConfig

    t5_base = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    encodec_32khz = {
        "sampling_rate": 32_000,
        "audio_channels": 1,
        "upsampling_ratios": [8, 5, 4, 4],
        "num_filters": 64,
        "codebook_size": 2048,
        "target_bandwidths": [2.2],
        "use_causal_conv": False,
        "use_conv_shortcut": False,
        "normalize": False,
    }
    decoder = {
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
        "num_hidden_layers": 48,
        "hidden_size": 1536,
        "num_attention_heads": 24,
        "ffn_dim": 6144,
        "activation_function": "gelu",
        "scale_embedding": False,
        "num_codebooks": 4,
        "audio_channels": 1,
    }
    return MusicgenMelodyConfig(
        text_encoder={"model_type": "t5", "vocab_size": 32128, "feed_forward_proj": "relu", **t5_base},
        audio_encoder={"model_type": "encodec", **encodec_32khz},
        decoder=decoder,
        num_chroma=12,
        chroma_length=235,
        architectures=["MusicgenMelodyForConditionalGeneration"],
        dtype="float32",
    )


def build(folder: Path, config: Any, *, seed: int = SEED, device: str = "cpu") -> None:
    """Write a whole checkpoint of a configuration into an empty folder.

    A seed gives the same bytes on a CPU. On a GPU most of the weights are drawn in seconds.
    """
    import torch
    from checkpoints import musicgen_processor  # type: ignore[import-not-found, unused-ignore]
    from transformers import GenerationConfig

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        _write_shards(folder, _weights(config, device))
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=2048,
        decoder_start_token_id=2048,
        pad_token_id=2048,
        do_sample=True,
        guidance_scale=3.0,
        max_length=1500,
    ).save_pretrained(folder)
    musicgen_processor(folder)


def _weights(config: Any, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of every weight of the file, in the published file's names."""
    import torch
    from torch.nn import init
    from transformers import EncodecModel, MusicgenMelodyForConditionalGeneration, T5EncoderModel
    from transformers.models.musicgen_melody.modeling_musicgen_melody import (
        MusicgenMelodySinusoidalPositionalEmbedding,
    )

    with torch.device("meta"):
        shapes = MusicgenMelodyForConditionalGeneration(config).state_dict()
    for name, weight in shapes.items():
        if not name.startswith(("text_encoder.", "audio_encoder.")):
            mean, std = _spread(name, weight.shape, config)
            yield name, torch.empty(weight.shape, device=device).normal_(mean, std).cpu()
    # The library makes this table itself; its older versions, which wrote the published files, kept it.
    positions = MusicgenMelodySinusoidalPositionalEmbedding.get_embedding
    table = positions(config.decoder.max_position_embeddings, config.decoder.hidden_size)
    yield "decoder.model.decoder.embed_positions.weights", table

    for name, weight in T5EncoderModel(config.text_encoder).state_dict().items():
        if name != "encoder.embed_tokens.weight":  # is shared.weight
            yield f"text_encoder.{name}", weight

    codec = EncodecModel(config.audio_encoder)
    for layer in codec.quantizer.layers:
        init.normal_(layer.codebook.embed)  # zeros otherwise: silence
    for name, weight in codec.state_dict().items():
        yield f"audio_encoder.{_old_name(name)}", weight


def _spread(name: str, shape: torch.Size, config: Any) -> tuple[float, float]:
    """Mean and standard deviation of one of the decoder's or a projection's weights."""
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if "embed_tokens" in name:  # summed over the codebooks
        return 0.0, config.decoder.num_codebooks**-0.5
    if name.startswith("audio_enc_to_dec_proj"):  # one input of its twelve is on
        return 0.0, 1.0
    gain = 1.0
    if "lm_heads" in name:
        gain = LOGIT_STD
    elif "q_proj" in name or "k_proj" in name:
        gain = math.sqrt(SCORE_STD)
    return 0.0, gain * shape[1] ** -0.5


def _old_name(name: str) -> str:
    """EnCodec's names of weights before torch renamed those of weight norm."""
    prefix, _, tail = name.rpartition(".parametrizations.weight.")
    old = {"original0": "weight_g", "original1": "weight_v"}.get(tail)
    return f"{prefix}.{old}" if old else name


def _write_shards(folder: Path, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """model-00001-of-0000n.safetensors and their index, as `save_pretrained` lays them out."""
    from safetensors.torch import save_file

    names: list[list[str]] = []
    total = waiting_bytes = 0
    waiting: dict[str, torch.Tensor] = {}

    def flush() -> None:
        nonlocal waiting_bytes
        save_file(waiting, folder / f"{len(names)}.part", metadata={"format": "pt"})
        names.append(list(waiting))
        waiting.clear()
        waiting_bytes = 0

    for name, weight in weights:
        weight_bytes = weight.numel() * weight.element_size()
        if waiting and waiting_bytes + weight_bytes > SHARD_BYTES:
            flush()
        waiting[name] = weight.contiguous()
        waiting_bytes += weight_bytes
        total += weight_bytes
    flush()
    of = len(names)
    if of == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{of:05d}.safetensors" for i in range(of)]
    for i, file in enumerate(files):
        (folder / f"{i}.part").rename(folder / file)
    index = {name: file for file, held in zip(files, names, strict=True) for name in held}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True)
    (folder / "model.safetensors.index.json").write_text(text + "\n")


def _flush(folder: Path) -> None:
    """Everything in the folder, and the folder, onto the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where it is, or is made")
    built = ensure(parser.parse_args().folder)
    how = f"built in {built.seconds:.0f} s" if built.seconds else "was there already"
    print(f"{built.folder}: {built.size_bytes / 1e9:.2f} GB, {how}")


if __name__ == "__main__":
    main()
