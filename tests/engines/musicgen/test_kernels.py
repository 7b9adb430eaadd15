"""The compiled kernels, one operation at a time, against numpy and torch in float64."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import need_models

from pipeline.engines.musicgen.decoder import EmbeddingAndHead, Shape, StepInput

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 25, 32, 33, 53)  # around the kernels' 6, 8, 24 and 32
FLOAT32 = 1e-6  # relative, of float32 sums
INT8 = 0.02  # relative, of activations rounded to 8 bits by groups of 128


@pytest.fixture(scope="module", autouse=True)
def _models() -> None:
    need_models()


@dataclass(frozen=True, eq=False)
class Product:
    """Weights in the kernels' layout, and the same weights in float64."""

    packed: np.ndarray
    scales: np.ndarray
    plain: np.ndarray  # float64, (outputs, inputs), quantized if they are
    group: int

    def times(self, x: np.ndarray) -> np.ndarray:
        """x (rows, inputs) times the weights in float64, x rounded as the kernels do for int8."""
        wide = x.astype(np.float64)
        if self.scales.size:
            groups = x.reshape(len(x), -1, self.group)
            largest = np.abs(groups).max(axis=-1, keepdims=True)
            inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
            rounded = np.floor(groups.astype(np.float64) * inverse + 0.5)
            wide = (rounded * (largest * np.float32(1 / 127))).reshape(x.shape)
        return wide @ self.plain.T


def prepared(weights: np.ndarray, precision: str) -> Product:
    from pipeline.engines.musicgen.kernels import pack_columns, quantize_rows
    from pipeline.engines.musicgen.layers import Stack

    inputs = weights.shape[1]
    group = Stack(Shape(0, inputs, 1, inputs, 1, 1), "int8", {}).group(inputs)
    if precision == "float32":
        no_scales = np.empty(0, np.float32)
        return Product(pack_columns(weights), no_scales, weights.astype(np.float64), group)
    quantized, scales = quantize_rows(weights)
    plain = quantized.astype(np.float64) * scales[:, None]
    return Product(pack_columns(quantized), scales, plain, group)


def multiplied(
    product: Product,
    x: np.ndarray,
    *,
    norm: np.ndarray | None = None,
    mode: str = "STORE",
    onto: np.ndarray | None = None,
    threads: int = 1,
    by_amx: bool = True,
) -> np.ndarray:
    """x (rows, inputs) times the weights, by the kernels."""
    from pipeline.engines.musicgen import kernels
    from pipeline.engines.musicgen.cpu_decoder import amx

    rows, inputs = x.shape
    out = np.full((rows, len(product.plain)), 7.0, np.float32) if onto is None else onto.copy()
    norm = np.empty((0, 0), np.float32) if norm is None else norm
    arguments = (
        kernels.product_counters(),
        kernels.Product(product.packed, product.scales, product.group, norm, x, out, getattr(kernels, mode)),
        kernels.PackedRows.empty(rows, inputs, product.group),
        amx() if by_amx else np.empty(0, np.uint8),
    )
    scratch = [kernels.ProductScratch.empty(rows) for _ in range(threads)]
    sources = b"".join(path.read_bytes() for path in sorted(Path(kernels.__path__[0]).glob("*.py")))
    with ThreadPoolExecutor(threads) as pool:
        compiled_from = set(pool.map(lambda own: kernels.run_product(*arguments, own), scratch))
    assert compiled_from == {hashlib.sha256(sources).hexdigest()}  # not from an outdated cache
    return out


def normal(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 32), (16, 592), (176, 1536)])
def test_products_equal_those_of_numpy(precision: str, rows: int, outputs: int, inputs: int) -> None:
    """Reference: float64 over the same weights. 592 is 16 * 37: its divisors make small groups of inputs."""
    product, x = prepared(normal(outputs, inputs), precision), normal(rows, inputs, seed=1)
    assert error(multiplied(product, x), product.times(x)) <= FLOAT32


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_row_of_a_product_depends_neither_on_other_rows_nor_on_threads(precision: str) -> None:
    product, x = prepared(normal(176, 592), precision), normal(53, 592, seed=1)
    together = multiplied(product, x, threads=3)
    for row in (0, 5, 23, 24, 47, 48, 52):
        assert together[row].tobytes() == multiplied(product, x[row : row + 1]).tobytes()
    assert together[::-1].tobytes() == multiplied(product, np.ascontiguousarray(x[::-1])).tobytes()


@pytest.mark.parametrize("rows", [5, 15, 16, 17, 31, 32, 33, 53])
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 64), (288, 1536), (48, 64)])
def test_amx_finds_the_same_bits(rows: int, outputs: int, inputs: int) -> None:
    """Reference: the products without it. 48 outputs are an odd number of blocks, which AMX does not take."""
    from pipeline.engines.musicgen.cpu_decoder import amx

    if not amx().size:
        pytest.skip("this processor has no AMX, or the system does not allow it")
    product, x = prepared(normal(outputs, inputs), "int8"), normal(rows, inputs, seed=1)
    norm, onto = normal(2, inputs, seed=2), normal(rows, outputs, seed=3)
    for mode in ("STORE", "ADD", "GELU"):
        found = [
            multiplied(product, x, norm=norm, mode=mode, onto=onto, by_amx=by_amx) for by_amx in (True, False)
        ]
        assert found[0].tobytes() == found[1].tobytes()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_product_can_be_added_to_the_output(precision: str) -> None:
    product, x, onto = prepared(normal(48, 32), precision), normal(7, 32, seed=1), normal(7, 48, seed=2)
    added = multiplied(product, x, mode="ADD", onto=onto)
    assert error(added, onto + product.times(x)) <= FLOAT32


def test_int8_products_are_within_half_a_quantization_step() -> None:
    """Bound: half a scale per weight times the inputs, and half a scale per input times the weights."""
    weights, x = normal(48, 1536), normal(5, 1536, seed=1)
    product = prepared(weights, "int8")
    steps = np.repeat(np.abs(x).reshape(5, -1, 128).max(axis=-1) / 127, 128, axis=1)
    bound = np.abs(x).sum(axis=1, dtype=np.float64)[:, None] * product.scales / 2
    bound += steps @ np.abs(product.plain).T / 2
    wanted = x.astype(np.float64) @ weights.T.astype(np.float64)
    assert (np.abs(multiplied(product, x) - wanted) <= bound * 1.01).all()
    assert error(multiplied(product, x), wanted) <= INT8


@pytest.mark.parametrize("value", [127, -127])
def test_the_largest_numbers_do_not_overflow(value: int) -> None:
    """All weights and inputs at the end of their range."""
    product = prepared(np.full((16, 1536), value, np.float32), "int8")
    for sign in (1, -1):
        x = np.full((3, 1536), sign * 127, np.float32)
        np.testing.assert_allclose(multiplied(product, x), np.full((3, 16), sign * value * 127 * 1536), 1e-6)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_rows_and_weights_of_zeros_give_zeros(precision: str) -> None:
    weights, x = normal(48, 32), normal(7, 32, seed=1)
    weights[[0, 20]], x[3] = 0, 0
    out = multiplied(prepared(weights, precision), x)
    assert not out[3].any()
    assert not out[:, [0, 20]].any()
    assert np.delete(np.delete(out, 3, axis=0), [0, 20], axis=1).all()
    assert not multiplied(prepared(0 * weights, precision), x).any()


def test_activations_of_very_different_sizes_keep_their_own_precision() -> None:
    """A row of 1e-6 beside one of 1e6; within a row, a group of 128 inputs has its own scale."""
    product = prepared(normal(48, 256), "int8")
    x = normal(3, 256, seed=1) * np.array([[1e-6], [1.0], [1e6]], np.float32)
    out = multiplied(product, x)
    for row in range(3):
        assert error(out[row], x[row].astype(np.float64) @ product.plain.T) <= INT8
    x[1, :128] = 0
    quiet = x[1:2].copy()
    x[1, :128], weights = 1e4, product.plain.copy()
    weights[:, :128] = 0
    product = prepared(weights.astype(np.float32), "int8")
    assert error(multiplied(product, x[1:2]), quiet.astype(np.float64) @ product.plain.T) <= INT8


def test_gelu_equals_that_of_torch() -> None:
    """Reference: torch's exact GELU in float64; absolute 2e-6, and relative to x 1e-6 where it is large."""
    import torch

    product = prepared(np.eye(16, dtype=np.float32), "float32")
    special = np.array([0, -0.0, 1e-30, -1e-30, 1e-3, -1e-3, 30, -30, 1e4, -1e4, 88, -88, 13, -13, 5, -5])
    x = np.concatenate([special, np.linspace(-12, 12, 16 * 500)]).reshape(-1, 16).astype(np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(multiplied(product, x, mode="GELU"), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("offset", "size"), [(0.0, 1.0), (3.0, 0.1), (-100.0, 10.0), (0.0, 1e-4), (0.0, 1e5)]
)
def test_layer_normalization_equals_that_of_torch(offset: float, size: float) -> None:
    """Reference: torch's in float64; the mean is rounded in float32: 1e-5 of the largest."""
    import torch

    product, norm = prepared(np.eye(160, dtype=np.float32), "float32"), normal(2, 160, seed=2)
    x = offset + size * normal(25, 160, seed=1)
    weight, bias = torch.from_numpy(norm).double()
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (160,), weight, bias).numpy()
    assert error(multiplied(product, x, norm=norm), expected) <= 1e-5


def test_layer_normalization_of_a_constant_is_the_bias() -> None:
    product, norm = prepared(np.eye(32, dtype=np.float32), "float32"), normal(2, 32, seed=2)
    out = multiplied(product, np.zeros((2, 32), np.float32), norm=norm)
    np.testing.assert_array_equal(out, np.stack([norm[1], norm[1]]))


def test_not_a_number_stays_in_its_row() -> None:
    product, x = prepared(normal(48, 32), "float32"), normal(7, 32, seed=1)
    clean = multiplied(product, x)
    x[4, 5] = np.nan
    out = multiplied(product, x)
    assert np.isnan(out[4]).all()
    np.testing.assert_array_equal(np.delete(out, 4, axis=0), np.delete(clean, 4, axis=0))


# -- other processors --------------------------------------------------------------------------------

PROCESSORS = {
    "avx2": ("haswell", "+sse4.2,+avx,+avx2,+fma,+bmi2"),
    "avxvnni": ("alderlake", "+sse4.2,+avx,+avx2,+fma,+bmi2,+avxvnni"),
    "avx512bw": ("skylake-avx512", "+avx,+avx2,+fma,+bmi2,+avx512f,+avx512bw,+avx512dq,+avx512vl"),
}
RESULTS_SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
import numpy as np
from test_kernels import attended, multiplied, normal, prepared
found = {}
for precision in ("int8", "float32"):
    product, norm = prepared(normal(48, 592), precision), normal(2, 592, seed=99)
    for rows in (1, 2, 7, 16, 25):
        x = normal(rows, 592, seed=rows)
        found[f"{precision} {rows}"] = multiplied(product, x, norm=norm, mode="GELU")
    found[f"{precision} attention"] = attended(precision, 64, 40, 150)[0]
np.savez(sys.argv[1], **found)
"""


Results = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def results_by_processor(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Results]]:
    """Results of code for this and other processors, as far as this one has their instructions.

    The first results are of code that was just compiled, the second of the same code from numba's cache.
    """
    from llvmlite.binding import get_host_cpu_features

    wanted = {"own": dict[str, str]()}
    for feature, (name, features) in PROCESSORS.items():
        if get_host_cpu_features().get(feature):
            wanted[feature] = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    found: dict[str, list[Results]] = {which: [] for which in wanted}
    folders = {which: tmp_path_factory.mktemp(which) for which in wanted}
    here = Path(__file__).parent
    imports = [str(here), str(here.parent), str(here.parents[2])]
    for turn in ("compiled", "cached"):
        paths = {which: folder / f"{turn}.npz" for which, folder in folders.items()}
        running = {}
        for which, settings in wanted.items():
            environment = os.environ | settings | {"NUMBA_CACHE_DIR": str(folders[which])}
            command = [sys.executable, "-c", RESULTS_SCRIPT, str(paths[which]), *imports]
            running[which] = subprocess.Popen(command, env=environment)
        for which, process in running.items():
            assert process.wait(timeout=600) == 0, which
            with np.load(paths[which]) as arrays:
                found[which].append(dict(arrays))
    return found


@pytest.mark.long
@pytest.mark.parametrize("which", ["own", *PROCESSORS])
def test_bits_are_the_same_just_compiled_and_from_the_cache_and_on_any_processor(
    which: str, results_by_processor: dict[str, list[Results]]
) -> None:
    """Reference: code for this processor, just compiled. A compiler with fast math would reorder sums."""
    if which not in results_by_processor:
        pytest.skip(f"this processor has no {which}")
    for found in results_by_processor[which]:
        for name, ours in results_by_processor["own"][0].items():
            assert found[name].tobytes() == ours.tobytes(), name


# -- layouts -----------------------------------------------------------------------------------------


def test_packed_columns_hold_sixteen_outputs_side_by_side() -> None:
    from pipeline.engines.musicgen.kernels import pack_columns

    floats = normal(48, 40)
    packed = pack_columns(floats).reshape(3, 40, 16)
    np.testing.assert_array_equal(packed.transpose(0, 2, 1).reshape(48, 40), floats)
    quads = np.arange(48 * 40).reshape(48, 40).astype(np.int8)
    packed = pack_columns(quads).reshape(3, 10, 16, 4).transpose(0, 2, 1, 3).reshape(48, 40)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed.astype(int) - 128, quads)


def test_quantized_rows_are_within_half_a_quantization_step() -> None:
    from pipeline.engines.musicgen.kernels import quantize_rows

    weights = normal(48, 40) * np.logspace(-20, 20, 48, dtype=np.float32)[:, None]
    weights[7] = 0
    quantized, scales = quantize_rows(weights)
    assert quantized.dtype == np.int8
    assert scales.dtype == np.float32
    assert np.abs(quantized.astype(int)).max(axis=1).tolist() == [127 * (row != 7) for row in range(48)]
    assert scales[7] == 0
    wide = quantized.astype(np.float64) * scales[:, None]
    assert (np.abs(wide - weights) <= scales[:, None] * 0.5001).all()


# -- attention ---------------------------------------------------------------------------------------

LENGTHS = 260  # every number of own steps up to 260, beyond multiples of 16, 128 and 256


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("int8", 0.05)])
@pytest.mark.parametrize("prefix_steps", [0, 1, 16, 17, 127, 128, 129, 239])
@pytest.mark.parametrize("dim", [16, 64, 272])
def test_attention_is_softmax_attention_at_every_length(
    precision: str, tolerance: float, prefix_steps: int, dim: int
) -> None:
    """Reference: one layer in torch, float64; int8 rounds keys and values as well as weights."""
    found, expected = attended(precision, dim, prefix_steps, LENGTHS)
    errors = np.abs(found - expected).max(axis=(1, 2)) / np.abs(expected).max()
    assert errors.max() <= tolerance, f"at {errors.argmax() + 1} steps"


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("dim", [16, 64, 272])
def test_steps_taken_together_are_those_taken_alone(precision: str, dim: int) -> None:
    """Reference: the same steps one by one, to the bit; blocks end around multiples of 16 and 128."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder
    from pipeline.engines.musicgen.layers import Stack

    decoder = CpuDecoder(Stack.packed(one_layer(dim), precision), ends_of(2 * dim), 1)
    tokens = np.random.default_rng(4).integers(0, 33, (LENGTHS, 3, 2))
    slots = ((0, 1), (1, 1), (2, 0))  # two rows of one prefix, one of another

    def after(ends: list[int]) -> np.ndarray:
        cache = decoder.new_cache(3, LENGTHS, 2, 240)
        decoder.prefill(cache, {0: normal(5, 2 * dim, seed=3)})
        decoder.prefill(cache, {1: normal(150, 2 * dim, seed=8)})
        begins = [0, *ends[:-1]]
        found = [
            decoder.advance(
                cache, [StepInput(slot, prefix, begin, tokens[begin:end, slot]) for slot, prefix in slots]
            )
            for begin, end in zip(begins, ends, strict=True)
        ]
        return found[-1]

    alone = after(list(range(1, LENGTHS + 1)))
    for ends in ([LENGTHS], [1, 17, 20, 127, 130, 259, LENGTHS], [100, 101, 245, LENGTHS - 1, LENGTHS]):
        assert after(ends).tobytes() == alone.tobytes()


@pytest.mark.parametrize("threads", [1, 4])
def test_whole_layers_by_amx_are_those_without(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same layers without AMX, to the bit. AMX takes all four matrices."""
    from pipeline.engines.musicgen import cpu_decoder
    from pipeline.engines.musicgen.layers import Stack

    if not cpu_decoder.amx().size:
        pytest.skip("this processor has no AMX, or the system does not allow it")
    decoder = cpu_decoder.CpuDecoder(Stack.packed(one_layer(64, 256), "int8"), ends_of(128))
    decoder.threads = threads
    tokens = np.random.default_rng(4).integers(0, 33, (LENGTHS, 2))

    def found() -> bytes:
        cache = decoder.new_cache(2, LENGTHS, 2, 240)
        decoder.prefill(cache, {0: normal(150, 128, seed=3)})
        blocks = [(0, 7), (7, 130), (130, LENGTHS)]
        return b"".join(
            decoder.advance(
                cache, [StepInput(0, 0, a, tokens[a:b]), StepInput(1, 1, a, tokens[a:b])]
            ).tobytes()
            for a, b in blocks
        )

    by_amx = found()
    monkeypatch.setattr(cpu_decoder, "amx", lambda: np.empty(0, np.uint8))
    assert by_amx == found()


def attended(precision: str, dim: int, prefix_steps: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits after each step of a layer of attention: the kernels', and the reference."""
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder
    from pipeline.engines.musicgen.layers import Stack

    layers, ends = one_layer(dim), ends_of(2 * dim)
    prefix = normal(prefix_steps, 2 * dim, seed=3)
    tokens = np.random.default_rng(4).integers(0, 33, (steps, 2))
    decoder = CpuDecoder(Stack.packed(layers, precision), ends, 1)
    cache = decoder.new_cache(2, steps, 2, 240)
    if prefix_steps:
        decoder.prefill(cache, {1: prefix})
    found = [
        decoder.advance(cache, [StepInput(1, 1, step, tokens[step : step + 1])])[0] for step in range(steps)
    ]
    return np.stack(found), reference(next(layers.layers()), ends, prefix, tokens)


@dataclass(frozen=True, eq=False)
class Layers:
    """One layer, as if from a file."""

    shape: Shape
    values: dict[str, np.ndarray]

    def layers(self) -> Iterator[dict[str, np.ndarray]]:
        yield self.values


def one_layer(dim: int, wide: int = 16) -> Any:
    """One layer of attention, and a feed-forward part that is zero unless it is wider than 16."""
    hidden, of_wide = 2 * dim, np.float32(wide > 16)
    values = {
        "qkv": normal(3 * hidden, hidden, seed=1) / np.float32(hidden**0.5) * 2,
        "out": normal(hidden, hidden, seed=2) / np.float32(hidden**0.5),
        "up": normal(wide, hidden, seed=9) / np.float32(hidden**0.5) * of_wide,
        "down": normal(hidden, wide, seed=10) / np.float32(wide**0.5) * of_wide,
        "attention_norm": np.stack([np.ones(hidden, np.float32), np.zeros(hidden, np.float32)]),
        "feed_forward_norm": np.ones((2, hidden), np.float32),
    }
    return Layers(Shape(1, hidden, 2, wide, 2, 32), values)


def ends_of(hidden: int) -> EmbeddingAndHead:
    norm = np.stack([np.ones(hidden, np.float32), np.zeros(hidden, np.float32)])
    return EmbeddingAndHead(
        normal(2, 33, hidden, seed=5), normal(64, hidden, seed=6), norm, normal(512, hidden, seed=7) * 0
    )


def reference(
    layer: dict[str, np.ndarray], ends: EmbeddingAndHead, prefix: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Logits after each token, float64, (steps, codebooks, vocabulary)."""
    import torch
    from torch.nn.functional import layer_norm, scaled_dot_product_attention

    qkv, out, heads = (torch.from_numpy(a).double() for a in (layer["qkv"], layer["out"], ends.heads))
    x = torch.from_numpy(np.concatenate([prefix, ends.embed(tokens)])).double()
    n, hidden = x.shape
    parts = (layer_norm(x, (hidden,)) @ qkv.T).reshape(n, 3, 2, hidden // 2).permute(1, 2, 0, 3)
    attended = scaled_dot_product_attention(*parts, is_causal=True).transpose(0, 1).reshape(n, hidden)
    logits = layer_norm(x + attended @ out.T, (hidden,)) @ heads.T
    return logits[len(prefix) :].reshape(-1, 2, 32).numpy()
