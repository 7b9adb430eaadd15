"""Decoders against transformers' own model, and the independence of rows.

The reference is the whole model as the library loads it from the same folder: its text encoder,
projections, prefix and layers. Errors are relative: the largest difference over the largest logit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BuildFn, need_models
from musicgen_setup import codes, decoder_of, generator_with
from tones import RequestFn, tones

STEPS = 140  # past 128, where the kernels' caches begin a new group
PROMPT = "warm piano"
MIDDLE = {"hidden_size": 128, "ffn_dim": 512, "num_hidden_layers": 4, "num_attention_heads": 2}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {},
    "tiny-stereo": {"channels": 2},
    "middle": MIDDLE,
    "middle-stereo": {**MIDDLE, "channels": 2},
}
EXACT = 1e-4


@dataclass(frozen=True, eq=False)
class Case:
    """A checkpoint, tokens to run (teacher forcing), and the library's logits after each of them."""

    folder: Path
    checkpoint: Any
    full: Any  # transformers' model
    conditions: Any
    tokens: np.ndarray  # (steps, codebooks)
    conditional: np.ndarray  # (steps, codebooks, vocabulary)
    unconditional: np.ndarray  # the same shape


@pytest.fixture(scope="module", params=SIZES)
def case(request: pytest.FixtureRequest, musicgen_checkpoint: BuildFn) -> Case:
    need_models()
    import torch
    from transformers import MusicgenMelodyForConditionalGeneration as Model

    from pipeline.engines.musicgen import conditioning
    from pipeline.engines.musicgen.checkpoint import load_checkpoint
    from pipeline.weights import hub

    folder = musicgen_checkpoint(f"reference-{request.param}", **SIZES[request.param])
    full = Model.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = load_checkpoint(hub.locate(str(folder)), threads=1)
    n_books = checkpoint.layers.shape.codebooks
    tokens = np.random.default_rng(0).integers(0, 2048, (STEPS, n_books))
    tokens[0] = 2048  # pads, as the delay pattern begins
    for step in range(1, 4):
        tokens[step, step * checkpoint.channels :] = 2048
    chroma = conditioning.track_chroma(checkpoint, tones(440.0, 554.37), [0])
    conditions = conditioning.Conditions(
        chroma, conditioning.encode_prompt(checkpoint, PROMPT, checkpoint.text_encoder), checkpoint
    )
    melodies = np.stack([conditions.chroma[0], np.eye(1, 12, dtype=np.float32).repeat(235, 0)])
    text = checkpoint.tokenizer([PROMPT, PROMPT], return_tensors="pt")
    text["attention_mask"][1] = 0  # the null condition: no text, a steady C
    with torch.inference_mode():
        logits = full(
            **text,
            input_features=torch.from_numpy(melodies),
            decoder_input_ids=torch.from_numpy(np.tile(tokens.T, (2, 1))),
        ).logits.numpy()
    conditional, unconditional = logits.reshape(2, n_books, -1, 2048)[:, :, -STEPS:].swapaxes(1, 2)
    return Case(folder, checkpoint, full, conditions, tokens, conditional, unconditional)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def guided(conditional: np.ndarray, unconditional: np.ndarray) -> np.ndarray:
    """Classifier-free guidance with a scale of 3."""
    return unconditional + 3 * (conditional - unconditional)


def stepwise(decoder: Any, case: Case, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Logits after each step of a conditional and an unconditional row in one batch."""
    from pipeline.engines.musicgen.decoder import StepInput

    cache = decoder.new_cache(2, STEPS, 2, 256)
    decoder.prefill(cache, {0: case.conditions.conditional(0)})
    decoder.prefill(cache, {1: case.conditions.unconditional()})
    found = [
        decoder.advance(cache, [StepInput(row, row, step, case.tokens[step : step + 1]) for row in (0, 1)])
        for step in range(steps)
    ]
    conditional, unconditional = np.stack(found, axis=1)
    return conditional, unconditional


@pytest.mark.parametrize("kind", ["float32", "torch"])
def test_logits_are_the_librarys_at_every_step_with_and_without_condition(case: Case, kind: str) -> None:
    conditional, unconditional = stepwise(decoder_of(case.checkpoint, kind), case)
    assert error(conditional, case.conditional) <= EXACT
    assert error(unconditional, case.unconditional) <= EXACT
    assert error(guided(conditional, unconditional), guided(case.conditional, case.unconditional)) <= EXACT


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 2e-2), ("bfloat16", 1e-1)])
def test_half_precision_is_near_the_librarys_float32(case: Case, kind: str, tolerance: float) -> None:
    """Relative error of 11 and 8 bits, grown through the layers."""
    conditional, unconditional = stepwise(decoder_of(case.checkpoint, kind), case, steps=8)
    assert error(conditional, case.conditional[:8]) <= tolerance
    assert error(unconditional, case.unconditional[:8]) <= tolerance


def test_int8_has_the_distributions_of_float32(case: Case) -> None:
    """Reference: the library's float32; mean KL per codebook below the self-check's limit, 0.05 nats."""
    from pipeline.engines.musicgen.precision_check import MAX_KL

    for found, theirs in zip(
        stepwise(decoder_of(case.checkpoint, "int8"), case),
        (case.conditional, case.unconditional),
        strict=True,
    ):
        p, q = (_log_softmax(logits) for logits in (theirs, found))
        assert (np.exp(p) * (p - q)).sum(axis=-1).mean(axis=0).max() <= MAX_KL


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["float32", "torch"])
def test_greedy_tokens_are_those_of_generate(
    case: Case, request_for: RequestFn, kind: str, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: transformers' generate() with its own guidance, delay pattern and greedy search."""
    import torch

    request = request_for(temperature=0.0, guidance=guidance, prompt=PROMPT)
    decoded: list[np.ndarray] = []
    decode = case.full.audio_encoder.decode

    def record(audio_codes: Any, **options: Any) -> Any:
        decoded.append(audio_codes[0, 0].numpy())
        return decode(audio_codes=audio_codes, **options)

    monkeypatch.setattr(case.full.audio_encoder, "decode", record)
    with torch.inference_mode():
        case.full.generate(
            **case.checkpoint.tokenizer([PROMPT], return_tensors="pt"),
            input_features=torch.from_numpy(case.conditions.chroma[0][None]),
            do_sample=False,
            guidance_scale=guidance,
            max_length=25 + 4,
        )
    theirs = np.stack(decoded, axis=1).reshape(
        case.checkpoint.layers.shape.codebooks, -1
    )  # channels alternate
    np.testing.assert_array_equal(codes(generator_with(case.checkpoint, kind), request), theirs)


# -- rows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["int8", "float32", "torch"])
def decoder(request: pytest.FixtureRequest, musicgen: Any) -> Any:
    return decoder_of(musicgen.checkpoint, request.param)


def inputs(seed: int, steps: int) -> np.ndarray:
    """A prefix."""
    return np.random.default_rng(seed).standard_normal((steps, 32)).astype(np.float32)


def random_tokens(seed: int, steps: int) -> np.ndarray:
    """Inputs of a row's steps."""
    return np.random.default_rng(seed).integers(0, 2049, (steps, 4))


def run(decoder: Any, cache: Any, slot: int, tokens: np.ndarray) -> list[bytes]:
    """The bits of the logits after each step of a row whose prefix is in the slot of the same number."""
    from pipeline.engines.musicgen.decoder import StepInput

    steps = [StepInput(slot, slot, step, tokens[step : step + 1]) for step in range(len(tokens))]
    return [decoder.advance(cache, [step]).tobytes() for step in steps]


def alone(decoder: Any, prefix: np.ndarray, tokens: np.ndarray) -> list[bytes]:
    """The same of a row that has a KV cache for itself."""
    cache = decoder.new_cache(1, len(tokens), 1, len(prefix))
    decoder.prefill(cache, {0: prefix})
    return run(decoder, cache, 0, tokens)


def assert_same(decoder: Any, found: list[bytes], expected: list[bytes]) -> None:
    """Bit for bit by our kernels. Torch's products may round by a row's place in the batch."""
    if not hasattr(decoder, "stack"):
        tolerance = {"float32": 1e-5, "float16": 2e-2}[decoder.precision]
        for mine, theirs in zip(found, expected, strict=True):
            reference = np.frombuffer(theirs, np.float32)
            error = np.abs(np.frombuffer(mine, np.float32) - reference).max()
            assert error <= tolerance * np.abs(reference).max()
        return
    assert found == expected


def test_a_row_has_the_same_bits_among_seven_others(decoder: Any) -> None:
    """Others in other slots, with other prefixes, of other lengths, at other positions, in any order."""
    from pipeline.engines.musicgen.decoder import StepInput

    prefix, tokens = inputs(0, 239), random_tokens(0, 20)
    cache = decoder.new_cache(9, 160, 9, 256)
    lead = {slot: 1 + 19 * slot for slot in range(8) if slot != 5}  # how far the others are
    for slot, steps in lead.items():
        decoder.prefill(cache, {slot: inputs(slot + 1, 240 - 7 * slot)})
        run(decoder, cache, slot, random_tokens(slot + 1, steps))
    decoder.prefill(cache, {8: prefix})
    found = []
    for step in range(len(tokens)):
        step_inputs = [
            StepInput(slot, slot, at + step, random_tokens(slot * 100 + step, 1)) for slot, at in lead.items()
        ]
        step_inputs.insert(step % 8, StepInput(5, 8, step, tokens[step : step + 1]))
        found.append(decoder.advance(cache, step_inputs)[step % 8].tobytes())
    assert_same(decoder, found, alone(decoder, prefix, tokens))


def test_rows_that_share_a_prefix_have_the_bits_they_have_alone(decoder: Any) -> None:
    from pipeline.engines.musicgen.decoder import StepInput

    prefix, rows = inputs(0, 100), [random_tokens(seed, 5) for seed in range(6)]
    cache = decoder.new_cache(6, 8, 1, 100)
    decoder.prefill(cache, {0: prefix})
    found: list[list[bytes]] = [[] for _ in rows]
    for step in range(5):
        step_inputs = [StepInput(slot, 0, step, tokens[step : step + 1]) for slot, tokens in enumerate(rows)]
        for slot, logits in enumerate(decoder.advance(cache, step_inputs)):
            found[slot].append(logits.tobytes())
    for bits, tokens in zip(found, rows, strict=True):
        assert_same(decoder, bits, alone(decoder, prefix, tokens))


@pytest.mark.parametrize("decoder", ["int8", "float32"], indirect=True)
@pytest.mark.parametrize("cuts", [(1,), (64, 128), (7, 16, 17, 129)], ids=str)
def test_steps_in_a_block_have_the_bits_of_single_steps(decoder: Any, cuts: tuple[int, ...]) -> None:
    """As the known steps of an interrupted run are computed again, while another row takes single steps."""
    from pipeline.engines.musicgen.decoder import StepInput

    prefix, tokens, others = inputs(0, 50), random_tokens(0, STEPS), random_tokens(1, STEPS)
    one_by_one = alone(decoder, prefix, tokens)
    cache = decoder.new_cache(2, STEPS, 1, 50)
    decoder.prefill(cache, {0: prefix})
    for number, (first, last) in enumerate(zip((0, *cuts), (*cuts, STEPS), strict=True)):
        step_inputs = [
            StepInput(0, 0, first, tokens[first:last]),
            StepInput(1, 0, number, others[number : number + 1]),
        ]
        assert decoder.advance(cache, step_inputs)[0].tobytes() == one_by_one[last - 1]


def test_a_slot_keeps_nothing_of_the_row_before(decoder: Any) -> None:
    cache = decoder.new_cache(1, STEPS, 1, 239)
    decoder.prefill(cache, {0: 30 * inputs(1, 239)})
    run(decoder, cache, 0, random_tokens(1, STEPS))
    prefix, tokens = inputs(0, 21), random_tokens(0, 18)
    decoder.prefill(cache, {0: prefix})
    assert_same(decoder, run(decoder, cache, 0, tokens), alone(decoder, prefix, tokens))


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_the_number_of_threads_changes_no_bit(case: Case, kind: str) -> None:
    """More threads than a decoder of this size uses by default."""
    from pipeline.engines.musicgen.decoder import StepInput

    decoder, found = decoder_of(case.checkpoint, kind), []
    for threads in (1, 2, 3):
        decoder.threads = threads
        cache = decoder.new_cache(3, 40, 1, 256)
        decoder.prefill(cache, {0: case.conditions.conditional(0)})
        last = decoder.advance(cache, [StepInput(row, 0, 0, case.tokens[: 40 - row]) for row in range(3)])
        found.append(last.tobytes())
    assert found[0] == found[1] == found[2]


@dataclass(eq=False)
class RecordingKernel:
    """A kernel that records its threads; they all have to run at the same time."""

    threads: int
    begun: list[tuple[int, int]] = field(default_factory=list)  # number, thread
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.all_running = threading.Barrier(self.threads)

    def __call__(self, together: bool, number: int) -> None:
        self.begun.append((number, threading.get_ident()))
        if together:
            self.all_running.wait(60)
        if number and self.error:
            raise self.error


@pytest.fixture
def three_threads(musicgen: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A decoder with three threads, on any machine."""
    from pipeline.engines.musicgen import cpu_decoder

    decoder = decoder_of(musicgen.checkpoint, "float32")
    decoder.threads = 3
    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(cpu_decoder, "_helpers", lambda: pool)
        yield decoder


def test_a_kernel_runs_in_all_threads_except_the_first_time(three_threads: Any) -> None:
    kernel = RecordingKernel(3)
    three_threads._share(kernel, (False,), range(3))
    assert kernel.begun == [(0, threading.get_ident())]
    kernel.begun.clear()
    three_threads._share(kernel, (True,), range(3))
    assert {number for number, _ in kernel.begun} == {0, 1, 2}
    assert len({thread for _, thread in kernel.begun}) == 3
    assert (0, threading.get_ident()) in kernel.begun


def test_an_error_in_another_thread_is_raised(three_threads: Any) -> None:
    kernel = RecordingKernel(3, error=ValueError("of a helper"))
    three_threads._share(kernel, (False,), range(3))
    with pytest.raises(ValueError, match="of a helper"):
        three_threads._share(kernel, (True,), range(3))


def test_threads_that_are_busy_are_not_waited_for(three_threads: Any) -> None:
    """All helpers are busy; the calling thread does all the work."""
    from pipeline.engines.musicgen import cpu_decoder

    kernel, resume = RecordingKernel(3), threading.Event()
    three_threads._share(kernel, (False,), range(3))
    busy = [cpu_decoder._helpers().submit(resume.wait, 60) for _ in range(2)]
    three_threads._share(kernel, (False,), range(3))
    resume.set()
    assert [number for number, _ in kernel.begun] == [0, 0]
    assert all(other.result() for other in busy)
