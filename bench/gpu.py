"""MusicGen on a GPU against transformers' own generate(), in one run.

    python bench/gpu.py [--folder FOLDER] [--variations 1,8,32] [--json FILE]

Without the end it takes about four minutes on an H200. The checkpoint has random weights of the true size
(`true_size`), drawn on the GPU. Both run in bfloat16, with guidance and top_k 250. Ours is timed from
the request to the sound, 30 s of it, with everything that a call of the engine does; a first call
compiles the kernels and is not timed. transformers is timed over the first `PEER_STEPS` steps with its
prefill and without EnCodec, and its time for 30 s is that many times longer. That favours it, as a step
takes longer the more there were before.

The floor is the time in which the GPU could read the weights, and the keys and values that each step
attends to, once, at the speed at which it reads a large tensor.

At the end `beside.py` takes 20 tracks through the whole program, with CLAP on the GPU, and prints how much of
the time the generator works. That part was not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

DURATION_S = 30.0
FRAMES = 1500
PEER_STEPS = 150
PROMPT = "warm analog synths"
GIB = 1 << 30


def main() -> None:
    import torch
    import true_size

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of the checkpoint; it is made where there is none")
    parser.add_argument("--variations", default="1,8,32")
    parser.add_argument("--json", type=Path, help="where the figures are written, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU that torch can use.")
    counts = [int(count) for count in options.variations.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "musicgen"
        if not (folder / "config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            true_size.build(folder, true_size.published_config(), device="cuda")
        figures: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "read_tb_per_s": read_speed() / 1e12,
        }
        print(f"{figures['gpu']}, torch {figures['torch']}, reads {figures['read_tb_per_s']:.2f} TB/s")
        engine = load(folder)
        figures["kl"] = precision(engine)
        figures["ours"] = [ours(engine, count, figures["read_tb_per_s"] * 1e12) for count in counts]
        figures["tracks"] = queue(engine)
        figures["same"] = same_in_company(engine)
        del engine
        figures["transformers"] = peers(folder, [count for count in counts if count <= 8])
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2) + "\n")
        torch.cuda.empty_cache()
        print("the whole program:", flush=True)
        beside = [str(Path(__file__).with_name("beside.py")), "--musicgen", str(folder)]
        subprocess.run([sys.executable, *beside], check=True)


def read_speed() -> float:
    """Bytes per second at which the GPU reads."""
    import torch

    values = torch.ones(1 << 30, device="cuda")
    values.sum()
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(10):
        values.sum()
    torch.cuda.synchronize()
    return 10 * values.numel() * 4 / (time.perf_counter() - began_s)


def load(folder: Path) -> Any:
    from pipeline.engines.base import EngineSettings
    from pipeline.engines.musicgen import ENGINE

    began_s = time.perf_counter()
    engine = ENGINE.load(EngineSettings(model=str(folder), device="cuda"))
    print(f"loaded in {time.perf_counter() - began_s:.1f} s")
    return engine


def requests(count: int, tracks: int = 1, duration_s: float = DURATION_S) -> list[Any]:
    """`count` variations of so many tracks of noise."""
    from pipeline.records import Audio, VariationRequest

    rng = np.random.default_rng(0)
    audio = [Audio(0.1 * rng.standard_normal((1, 960_000), dtype=np.float32), 32_000) for _ in range(tracks)]
    params = {"prompt": PROMPT, "melody": "mix"}
    return [
        VariationRequest(str(n), str(n % tracks), audio[n % tracks], duration_s, n, params)
        for n in range(count)
    ]


def sounds(engine: Any, asked: Sequence[Any]) -> dict[str, bytes]:
    """The samples of each request."""
    results = engine.generate(asked, progress=lambda *step: None, should_stop=lambda: False)
    return {one.request_id: one.audio.samples.tobytes() for one in results}


def timed(run: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    began_s = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began_s


def ours(engine: Any, count: int, bytes_per_s: float) -> dict[str, float]:
    """Time and memory of `count` variations of one track."""
    import torch

    sounds(engine, requests(count, duration_s=1.0))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    asked = requests(count)
    seconds = timed(lambda: sounds(engine, asked))
    floor_s = (FRAMES + 3) * step_bytes(engine, 2 * count) / bytes_per_s
    found = {
        "variations": count,
        "seconds": seconds,
        "audio_per_s": count * DURATION_S / seconds,
        "floors": seconds / floor_s,
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }
    print(
        f"{count} × 30 s: {seconds:.2f} s, {found['audio_per_s']:.1f} s of audio per second, "
        f"{found['floors']:.2f} times the floor, {found['allocated_gib']:.1f} GiB "
        f"({found['reserved_gib']:.1f} with what torch keeps)",
        flush=True,
    )
    return found


def step_bytes(engine: Any, rows: int) -> float:
    """What a step reads at least, on average: the weights, each row's steps, and the two prefixes once."""
    decoder = engine.decoder
    weights = sum(tensor.nbytes for layer in decoder.layers for tensor in layer.values())
    prefixes = 2 * (engine.checkpoint.chroma_length + 4)
    return weights + decoder.heads.nbytes + decoder.cache_bytes(1) * (rows * FRAMES / 2 + prefixes)


def queue(engine: Any) -> dict[str, float]:
    """Twenty tracks with four variations of 10 to 30 s each, as they come in a batch."""
    asked = [one for n in range(4) for one in requests(20, 20, 10.0 + 20.0 * n / 3)]
    asked = [replace(one, request_id=str(n)) for n, one in enumerate(asked)]
    seconds = timed(lambda: sounds(engine, asked))
    audio_s = sum(one.duration_s for one in asked)
    print(
        f"20 tracks, 80 variations of 10 to 30 s: {audio_s / seconds:.1f} s of audio per second", flush=True
    )
    return {"seconds": seconds, "audio_per_s": audio_s / seconds}


def same_in_company(engine: Any) -> bool:
    """Whether requests have the same sound alone, among 15 others and in another order."""
    asked = requests(16, 4, 5.0)
    together, reversed_ = sounds(engine, asked), sounds(engine, asked[::-1])
    alone = {one.request_id: sounds(engine, [one])[one.request_id] for one in asked[:4]}
    same = together == reversed_ and all(together[name] == sound for name, sound in alone.items())
    print(f"the same sound alone, in company and in any order: {'yes' if same else 'NO'}", flush=True)
    return same


def precision(engine: Any) -> dict[str, Any]:
    """How far the decoder's half precision is from float32."""
    from pipeline.engines.musicgen.precision_check import check_precision

    check = check_precision(engine.checkpoint, engine.decoder, engine.checkpoint.embedding_and_head(), None)
    print(f"bfloat16 against float32: KL {max(check.kl):.5f} nats, top 1 {min(check.top1):.1%}", flush=True)
    return {"kl_nats": check.kl, "top1": check.top1, "steps": check.steps}


def peers(folder: Path, counts: Sequence[int]) -> list[dict[str, float]]:
    """transformers' generate() with so many variations in a batch."""
    import peer_transformers
    import torch
    import transformers

    torch.cuda.empty_cache()
    transformers.utils.logging.set_verbosity_error()
    model_class = transformers.MusicgenMelodyForConditionalGeneration
    model = model_class.from_pretrained(folder, dtype=torch.bfloat16).to("cuda").eval()
    found = []
    for count in counts:
        inputs = {
            name: value.to("cuda", torch.bfloat16 if value.is_floating_point() else value.dtype)
            for name, value in peer_transformers._inputs(folder, count).items()
        }

        def generate(steps: int, inputs: dict[str, Any] = inputs) -> None:
            with torch.inference_mode():
                model.generate(
                    **inputs, do_sample=True, top_k=250, guidance_scale=3.0, max_new_tokens=steps + 3
                )

        generate(10)
        seconds = timed(lambda generate=generate: generate(PEER_STEPS)) * FRAMES / PEER_STEPS  # type: ignore[misc]
        found.append({"variations": count, "audio_per_s": count * DURATION_S / seconds})
        print(
            f"transformers {transformers.__version__}, {count} × 30 s: "
            f"{found[-1]['audio_per_s']:.2f} s of audio per second",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
