"""The decoder for a GPU: its parts as Triton kernels, and its steps on the device.

Where there is a GPU everything runs on it. Elsewhere the same kernels run in Triton's interpreter, and
the decoder with torch's own operations.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import need_models
from musicgen_setup import codes_of, generator_with, never, no_progress, torch_device
from tones import RequestFn

from pipeline.engines.musicgen import SamplingParams
from pipeline.engines.musicgen.decoder import UNKNOWN, Continuation, Shape
from pipeline.engines.musicgen.sampling import Sampler
from pipeline.engines.musicgen.scheduler import Scheduler
from pipeline.errors import EngineFailure, Stopped

BOOKS, VOCABULARY = 4, 64


@pytest.fixture(scope="module")
def torch_ops() -> Any:
    need_models()
    from pipeline.engines.musicgen import torch_ops

    return torch_ops


@pytest.fixture(scope="module")
def triton_ops(torch_ops: Any) -> Any:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA on Linux")
    from pipeline.engines.musicgen import triton_ops

    return triton_ops


@pytest.fixture(params=["torch_ops", pytest.param("triton_ops", marks=pytest.mark.long)])
def ops(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    import torch

    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).to(torch_device(), getattr(torch, dtype))


def idle(rows: int) -> Any:
    import torch

    from pipeline.engines.musicgen.torch_cache import Step

    return Step.idle(rows, BOOKS, torch.device(torch_device()))


# -- picking tokens -------------------------------------------------------------------------------------

CHOICES: list[dict[str, float]] = [
    {"top_k": 20},
    {"top_p": 0.9},
    {"top_k": 0},
    {"temperature": 0.0},
    {"guidance": 1.0, "top_k": 20},
    {"top_k": 1},
    {"temperature": 1.7, "top_p": 0.5},
    {"top_p": 1e-9},
]


def continuations() -> list[Continuation]:
    """One variation of each choice; of the second step's inputs, one codebook is known."""
    made, slot = [], 0
    for number, choice in enumerate(CHOICES):
        params = SamplingParams.model_validate(choice)
        slots = [slot] if params.guidance == 1 else [slot, slot + 1]
        slot += len(slots)
        inputs = np.full((3, BOOKS), UNKNOWN)
        inputs[0], inputs[1, 2] = 1, 33
        sampler = Sampler(params, seed=number * 10**17 + 1)
        made.append(Continuation(slots, [0] * len(slots), 5, inputs, sampler, 100 * number))
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tokens_on_a_device_are_those_of_the_sampler(ops: Any, dtype: str) -> None:
    """bfloat16 has equal logits, which are cut by their order."""
    step, variations = idle(16), continuations()
    step.load_rows([row for one in variations for row in one.of_rows(3)], np.zeros(1, np.int64))
    step.load_variations(variations)
    logits = 2 * normal(16, BOOKS, VOCABULARY, dtype=dtype).float()
    for _ in range(2):
        ops.pick(logits, step)
        step.number += 1
    wide, row = logits.double().cpu().numpy(), 0
    for index, one in enumerate(variations):
        rows = range(row, row + len(one.slots))
        row = rows.stop
        for number in range(2):
            expected = one.sampler.pick(one.first_step + number, *(wide[at] for at in rows))
            np.testing.assert_array_equal(step.picked[number, index].cpu(), expected, err_msg=str(one))
            following = step.inputs[rows.start : rows.stop, number + 1].cpu().numpy()
            expected[2] = 33 if number == 0 else expected[2]
            np.testing.assert_array_equal(following, [expected] * len(rows))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_no_token(ops: Any, torch_ops: Any, bad: float) -> None:
    step, variations = idle(16), continuations()
    step.load_rows([row for one in variations for row in one.of_rows(3)], np.zeros(1, np.int64))
    step.load_variations(variations)
    logits = normal(16, BOOKS, VOCABULARY)
    logits[3, 1, 7] = bad  # the unconditional row of the second variation
    ops.pick(logits, step)
    picked = step.picked[0, : len(variations)].cpu().numpy()
    assert (picked == torch_ops.NOT_FINITE).any(axis=1).tolist() == [n == 1 for n in range(len(variations))]


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")  # by the interpreter
def test_a_temperature_by_which_logits_overflow_gives_no_token(ops: Any, torch_ops: Any) -> None:
    params = SamplingParams(temperature=1e-310)
    inputs, step = np.full((2, BOOKS), UNKNOWN), idle(2)
    inputs[0] = 1
    one = Continuation([0, 1], [0, 0], 0, inputs, Sampler(params, seed=1), 0)
    step.load_rows(one.of_rows(2), np.zeros(1, np.int64))
    step.load_variations([one])
    logits = normal(2, BOOKS, VOCABULARY)
    ops.pick(logits, step)
    assert (step.picked[0, 0] == torch_ops.NOT_FINITE).all()
    with pytest.raises(EngineFailure, match="NaN or infinity"):
        one.sampler.pick(0, *logits.double().cpu().numpy())


# -- the other parts ------------------------------------------------------------------------------------


def close(found: Any, expected: Any) -> None:
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error.item() <= 2e-6


@pytest.mark.parametrize("rows", [2, 16])
def test_kernels_compute_what_torch_does(torch_ops: Any, triton_ops: Any, rows: int) -> None:
    x, weights = normal(rows, 96), normal(48, 96, seed=1)
    for name, options in (
        ("product", {}),
        ("product", {"with_gelu": True}),
        ("product_float32", {}),
    ):
        ours, theirs = (getattr(module, name)(x, weights, **options) for module in (triton_ops, torch_ops))
        close(ours, theirs)
    close(triton_ops.product_in_parts(x, weights).sum(0), torch_ops.product(x, weights))
    added, norm = normal(2, rows, 96, seed=2), normal(2, 96, seed=3)
    mine, other = x.clone(), x.clone()
    close(triton_ops.add_norm(mine, added, norm, x.dtype), torch_ops.add_norm(other, added, norm, x.dtype))
    close(mine, other)


HEADS, SIZE, STEPS, PREFIX = 2, 16, 150, 70


def attention_step(rows: int) -> Any:
    """Rows at the beginning, the ends of parts and the last step, and an idle one."""
    import torch

    step = idle(rows)
    at = ([0, 63, 64, STEPS - 1, -1] * rows)[:rows]
    values = {
        "at": at,
        "slot": [(3 * row) % 5 if place >= 0 else 0 for row, place in enumerate(at)],
        "prefix": [row % 3 for row in range(rows)],
        "prefix_length": [(PREFIX, 64, 1)[row % 3] for row in range(rows)],
    }
    for name, numbers in values.items():
        getattr(step, name).copy_(torch.tensor(numbers))
    return step


def test_attention_is_over_the_prefix_and_the_steps_so_far(torch_ops: Any, triton_ops: Any) -> None:
    step, qkv = attention_step(5), normal(5, 3 * HEADS * SIZE)
    prefixes, kept = normal(2, 3, HEADS, PREFIX, SIZE, seed=1), normal(2, 5, HEADS, STEPS + 1, SIZE, seed=2)
    mine, other = kept.clone(), kept.clone()
    ours, theirs = triton_ops.attend(qkv, mine, prefixes, step), torch_ops.attend(qkv, other, prefixes, step)
    close(ours, theirs)
    assert not ours[4].any()  # idle
    assert (mine[:, :, :, :STEPS] == other[:, :, :, :STEPS]).all()
    assert ((mine != kept).any(dim=-1).sum(dim=(0, 2, 3)) == 2 * HEADS).sum() == 4  # one step of four slots


def test_attention_ignores_what_an_earlier_row_has_left(ops: Any) -> None:
    """NaN of a request that failed, behind the steps so far and behind a shorter prefix."""
    step, qkv = attention_step(3), normal(3, 3 * HEADS * SIZE)
    prefixes, own = normal(2, 3, HEADS, PREFIX, SIZE, seed=1), normal(2, 5, HEADS, STEPS + 1, SIZE, seed=2)
    expected = ops.attend(qkv, own.clone(), prefixes, step)
    prefixes[:, 1, :, 64:] = prefixes[:, 2, :, 1:] = np.nan
    for slot, at in zip(step.slot.tolist(), step.at.tolist(), strict=True):
        own[:, slot, :, at + 1 :] = np.nan
    assert (ops.attend(qkv, own, prefixes, step) == expected).all()


def test_a_row_has_the_same_bits_whatever_the_number_of_rows(triton_ops: Any) -> None:
    """In a program of its own, and in one that attends to several parts."""
    weights, x = normal(64, 128, dtype="bfloat16"), normal(64, 128, seed=1, dtype="bfloat16")
    whole = triton_ops.product(x, weights)
    in_parts = triton_ops.product_in_parts(x, weights)
    for rows in (2, 16):
        assert (triton_ops.product(x[:rows].contiguous(), weights) == whole[:rows]).all()
        assert (triton_ops.product_in_parts(x[:rows].contiguous(), weights) == in_parts[:, :rows]).all()
    prefixes = normal(2, 3, HEADS, PREFIX, SIZE, seed=2, dtype="bfloat16")
    own = normal(2, 5, HEADS, STEPS + 1, SIZE, seed=3, dtype="bfloat16")
    step, qkv = attention_step(64), normal(64, 3 * HEADS * SIZE, seed=4, dtype="bfloat16")
    step.at[5:] = -1
    many = triton_ops.attend(qkv, own.clone(), prefixes, step)
    few = triton_ops.attend(qkv[:2].contiguous(), own.clone(), prefixes, step)
    assert (many[:2] == few).all()


def test_the_kernels_are_for_sizes_that_are_powers_of_two_on_nvidias_gpus(
    torch_ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from pipeline.engines.musicgen.torch_decoder import kernels_fit

    shape = Shape(layers=2, hidden=192, heads=3, feed_forward=96, codebooks=4, vocabulary=2048)
    gpu = torch.device("cuda")
    assert kernels_fit(gpu, shape)
    assert not kernels_fit(gpu, replace(shape, heads=4))
    assert not kernels_fit(gpu, replace(shape, vocabulary=2000))
    assert not kernels_fit(torch.device("cpu"), shape)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not kernels_fit(gpu, shape)


# -- the decoder ----------------------------------------------------------------------------------------


@pytest.fixture
def requests(request_for: RequestFn) -> list[Any]:
    return [
        request_for("a", duration_s=0.3),
        request_for("b", duration_s=0.2, guidance=1.0, prompt="warm piano"),
        request_for("c", duration_s=0.4, top_p=0.9, seed=3),
    ]


def test_the_tokens_are_those_of_the_cpus_kernels(musicgen: Any, requests: list[Any]) -> None:
    """The same noise, and float32 in both."""
    expected = codes_of(generator_with(musicgen.checkpoint, "float32"), *requests)
    for name, codes in codes_of(generator_with(musicgen.checkpoint, "torch"), *requests).items():
        np.testing.assert_array_equal(codes, expected[name])


@pytest.mark.parametrize("kind", ["torch", "bfloat16"])
def test_a_request_gets_the_same_tokens_in_any_company(musicgen: Any, requests: list[Any], kind: str) -> None:
    if kind == "bfloat16" and torch_device() == "cpu":
        pytest.skip("on a CPU torch rounds by a row's place in the batch")
    engine = generator_with(musicgen.checkpoint, kind)
    together, reversed_ = codes_of(engine, *requests), codes_of(engine, *requests[::-1])
    for one in requests:
        (alone,) = codes_of(engine, one).values()
        np.testing.assert_array_equal(together[one.request_id], alone)
        np.testing.assert_array_equal(reversed_[one.request_id], alone)


def test_several_steps_at_once_give_the_tokens_of_single_steps(musicgen: Any, requests: list[Any]) -> None:
    from pipeline.engines.musicgen.torch_decoder import TorchDecoder

    checkpoint = musicgen.checkpoint
    decoder = TorchDecoder(checkpoint.layers, checkpoint.embedding_and_head(), torch_device(), "float32", 16)
    expected = codes_of(generator_with(checkpoint, "torch"), *requests)
    for name, codes in codes_of(generator_with(checkpoint, decoder), *requests).items():
        np.testing.assert_array_equal(codes, expected[name])


def test_a_stop_is_seen_after_a_fraction_of_a_second(musicgen: Any, requests: list[Any]) -> None:
    """Each return to the host looks for it; how many steps are between follows the time of a step."""
    from pipeline.engines.musicgen.torch_decoder import TorchDecoder

    checkpoint = musicgen.checkpoint
    decoder = TorchDecoder(checkpoint.layers, checkpoint.embedding_and_head(), torch_device(), "float32", 16)
    decoder._step_s = 0.04
    assert decoder.steps_at_once == 3
    decoder._step_s = 1.0
    assert decoder.steps_at_once == 1
    decoder._step_s = 1e-6
    assert decoder.steps_at_once == 64
    calls: list[int] = []
    generate = decoder.generate

    def counted(cache: Any, several: Sequence[Continuation]) -> Any:
        calls.append(len(several))
        return generate(cache, several)

    decoder.generate = counted
    with pytest.raises(Stopped):
        list(generator_with(musicgen.checkpoint, decoder).run(requests, no_progress, lambda: bool(calls)))
    assert calls == [3]


def test_when_memory_runs_out_it_goes_on_with_half_of_the_rows(
    musicgen: Any, requests: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    expected = codes_of(musicgen, *requests)
    generate: Callable[..., Any] = musicgen.decoder.generate
    new_cache, caches = musicgen.decoder.new_cache, []

    def counted(*sizes: int) -> Any:
        assert not any(cache() for cache in caches)  # the one before is freed
        cache = new_cache(*sizes)
        caches.append(weakref.ref(cache))
        return cache

    def small(cache: Any, several: Sequence[Continuation]) -> Any:
        if sum(len(one.slots) for one in several) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return generate(cache, several)

    monkeypatch.setattr(musicgen.decoder, "generate", small)
    monkeypatch.setattr(musicgen.decoder, "new_cache", counted)
    found = codes_of(musicgen, *requests)
    for name, codes in expected.items():
        np.testing.assert_array_equal(found[name], codes)
    assert "no memory for 5 rows; it goes on with 2" in caplog.text
    assert len(caches) == 2


def test_it_goes_on_with_half_of_the_rows_too_if_memory_runs_out_for_a_prefix(
    musicgen: Any, requests: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    expected = codes_of(musicgen, *requests)
    begin = Scheduler.begin

    def small(self: Scheduler, *args: Any) -> None:
        if self.rows > 2:
            raise torch.OutOfMemoryError("out of memory")
        begin(self, *args)

    monkeypatch.setattr(Scheduler, "begin", small)
    found = codes_of(musicgen, *requests)
    for name, codes in expected.items():
        np.testing.assert_array_equal(found[name], codes)
    assert "no memory for 5 rows; it goes on with 2" in caplog.text


def test_a_memory_error_with_one_variation_ends_the_call(
    musicgen: Any, requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr(musicgen.decoder, "generate", fail)
    with pytest.raises(MemoryError, match="none left"):
        list(musicgen.generate(requests, progress=no_progress, should_stop=never))


def test_on_a_gpu_the_whole_engine_gives_the_same_sound_alone_and_in_company(
    musicgen_folder: Path, requests: list[Any]
) -> None:
    """The generator as `DEVICE=cuda` loads it, with EnCodec in threads."""
    if torch_device() == "cpu":
        pytest.skip("there is no GPU")
    from pipeline.engines.base import EngineSettings
    from pipeline.engines.musicgen import ENGINE

    engine = ENGINE.load(EngineSettings(model=str(musicgen_folder), device="cuda"))
    assert engine.decoder.precision == "bfloat16"

    def sounds(*asked: Any) -> dict[str, bytes]:
        made = engine.generate(asked, progress=no_progress, should_stop=never)
        return {one.request_id: one.audio.samples.tobytes() for one in made}

    together = sounds(*requests)
    for one in requests:
        assert sounds(one) == {one.request_id: together[one.request_id]}
    assert sounds(*requests[::-1]) == together


def test_where_triton_does_not_work_torchs_own_operations_are_used(
    musicgen: Any, torch_ops: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from pipeline.engines.musicgen import torch_decoder

    def fail(*shape: Any, **options: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(torch, "ones", fail)
    assert torch_decoder.ops_for(torch.device("cuda"), musicgen.decoder.shape) is torch_ops
    assert "Triton can't be used (Failed to find C compiler)" in caplog.text

    def full(*shape: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(torch.OutOfMemoryError):
        torch_decoder.ops_for(torch.device("cuda"), musicgen.decoder.shape)


def test_after_a_stop_no_thread_decodes_any_more(musicgen: Any) -> None:
    engine = generator_with(musicgen.checkpoint, musicgen.decoder)
    engine._threads = ThreadPoolExecutor(1)  # whose threads need no GPU
    begun, may_end, decoded = threading.Event(), threading.Event(), list[int]()

    def tokens() -> Iterator[Any]:
        yield from range(3)
        assert begun.wait(30.0)
        threading.Timer(0.1, may_end.set).start()
        raise Stopped("asked to stop")

    def decode(state: Any) -> Any:
        begun.set()
        assert may_end.wait(30.0)
        decoded.append(state)

    with pytest.raises(Stopped):
        list(engine._beside(tokens(), decode))
    assert decoded == [0]
    assert engine._threads.submit(int).result(30.0) == 0  # none of the others was left
    assert decoded == [0]
