"""Parts of a decoder's step as Triton kernels, for a GPU. See `torch_ops`, whose functions these are.

Each number is summed in an order that does not depend on how many rows there are, so a row has the
same bits in any batch. For that, products take the weights as the left operand, in tiles of 64 outputs;
a tensor core sums the inputs of every output alike however many columns, the rows, it has.

Attention is split over the positions, in parts of a fixed size that are read by one block each, and
the parts are summed in a second kernel (flash decoding: Dao et al. 2023). Parts beyond a row's
length are not read.

On Hopper and later a kernel may be set up while the one before it ends (programmatic dependent launch,
PDL).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from pipeline.engines.musicgen.decoder import UNKNOWN
from pipeline.engines.musicgen.torch_ops import KEY_STEPS, MULTIPLIERS, NOT_FINITE, ROUNDS, signed

if TYPE_CHECKING:
    from pipeline.engines.musicgen.torch_cache import Step

PART = 64  # positions of one part of the attention
BLOCK = 32  # positions read at once
PARTS_AT_ONCE = 4  # in one program, where there are many rows
MANY_ROWS, FEW_ROWS = 64, 2
ROW_TILE = 16  # the least number of rows that tensor cores take
OUTPUT_TILE = 64
INPUT_TILE = {torch.float32: 32}  # 128 of other types
SPLIT = 4  # in how many parts the inputs of `product_in_parts` are summed

_M0, _M1 = (tl.constexpr(signed(word)) for word in MULTIPLIERS)
_K0, _K1 = (tl.constexpr(signed(word)) for word in KEY_STEPS)
_ROUNDS = tl.constexpr(ROUNDS)
_UNKNOWN = tl.constexpr(UNKNOWN)
_NOT_FINITE = tl.constexpr(NOT_FINITE)


def add_norm(
    x: torch.Tensor, added: torch.Tensor | None, norm: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """See `torch_ops.add_norm`."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    _add_norm[(rows,)](
        x,
        x if added is None else added,
        norm,
        out,
        width,
        PARTS=0 if added is None else len(added),
        WIDTH=triton.next_power_of_2(width),
        num_warps=8,
        **_launch(x.device, rows),
    )
    return out


@triton.jit
def _add_norm(x, added, norm, out, width, PARTS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    _begin(PDL)
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    at = row * width + column
    values = tl.load(x + at, mask=inside, other=0.0)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            more = tl.load(added + part * tl.num_programs(0) * width + at, mask=inside, other=0.0)
            values += more.to(tl.float32)
        tl.store(x + at, values, mask=inside)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + 1e-5)
    weight = tl.load(norm + column, mask=inside, other=0.0)
    bias = tl.load(norm + width + column, mask=inside, other=0.0)
    tl.store(out + at, centred * scale * weight + bias, mask=inside)


def product(x: torch.Tensor, weights: torch.Tensor, *, with_gelu: bool = False) -> torch.Tensor:
    """See `torch_ops.product`."""
    return _multiply(x, weights, x.dtype, 1, with_gelu)[0]


def product_in_parts(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See `torch_ops.product_in_parts`."""
    return _multiply(x, weights, torch.float32, SPLIT)


def product_float32(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See `torch_ops.product_float32`."""
    return _multiply(x, weights, torch.float32, 1)[0]


def _multiply(
    x: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype, parts: int, with_gelu: bool = False
) -> torch.Tensor:
    rows, (outputs, inputs) = len(x), weights.shape
    tile = INPUT_TILE.get(x.dtype, 128)
    while inputs % (tile * parts):  # small models
        tile, parts = (tile // 2, parts) if tile > 16 else (tile, parts // 2)
    output_tile = OUTPUT_TILE if outputs % OUTPUT_TILE == 0 else 16
    out = torch.empty((parts, rows, outputs), dtype=dtype, device=x.device)
    _product[(outputs // output_tile, parts)](
        x,
        weights,
        out,
        rows,
        outputs,
        INPUTS=inputs,
        ROWS=max(ROW_TILE, rows),
        TILE=tile,
        OUTPUT_TILE=output_tile,
        PARTS=parts,
        GELU=with_gelu,
        num_warps=4,
        num_stages=_stages(x.device),
        **_launch(x.device, rows),
    )
    return out


@triton.jit
def _product(
    x, weights, out, rows, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    OUTPUT_TILE: tl.constexpr, PARTS: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of outputs for all rows, over one part of the inputs."""
    _begin(PDL)
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUT_TILE + tl.arange(0, OUTPUT_TILE)
    at = part * (INPUTS // PARTS) + tl.arange(0, TILE)
    sums = tl.zeros([OUTPUT_TILE, ROWS], tl.float32)
    for first in range(0, INPUTS // PARTS, TILE):
        w = tl.load(weights + output[:, None] * INPUTS + at[None, :] + first)
        v = tl.load(x + row[:, None] * INPUTS + at[None, :] + first, mask=row[:, None] < rows, other=0.0)
        sums = tl.dot(w, v.T, sums, input_precision="ieee")
    if GELU:
        sums = sums * 0.5 * (1.0 + tl.erf(sums * 0.7071067811865476))
    target = out + (part * rows + row[None, :]) * outputs + output[:, None]
    tl.store(target, sums.to(out.dtype.element_ty), mask=row[None, :] < rows)


def attend(qkv: torch.Tensor, own: torch.Tensor, prefixes: torch.Tensor, step: Step) -> torch.Tensor:
    """See `torch_ops.attend`."""
    rows, (_, _, heads, steps, head_size), prefix_steps = len(qkv), own.shape, prefixes.shape[3]
    prefix_parts = triton.cdiv(prefix_steps, PART)
    parts = prefix_parts + triton.cdiv(steps, PART)
    out = torch.empty((rows, heads * head_size), dtype=qkv.dtype, device=qkv.device)
    sums = torch.empty((rows, heads, parts, head_size), dtype=torch.float32, device=qkv.device)
    weights = torch.empty((2, rows, heads, parts), dtype=torch.float32, device=qkv.device)
    sizes: dict[str, Any] = {"HEADS": heads, "SIZE": head_size, "PARTS": parts, "PREFIX_PARTS": prefix_parts}
    at_once = PARTS_AT_ONCE if rows >= MANY_ROWS else 1
    _attend_parts[(rows, heads, triton.cdiv(parts, at_once))](
        qkv,
        own,
        prefixes,
        step.slot,
        step.at,
        step.prefix,
        step.prefix_length,
        sums,
        weights,
        steps,
        prefix_steps,
        own.stride(0),
        prefixes.stride(0),
        head_size**-0.5,
        **sizes,
        PART=PART,
        BLOCK=BLOCK,
        AT_ONCE=at_once,
        num_warps=1,
        **_launch(qkv.device, rows),
    )
    _sum_parts[(rows, heads)](
        sums,
        weights,
        step.at,
        step.prefix_length,
        out,
        **sizes,
        PART=PART,
        ROUND=triton.next_power_of_2(parts),
        num_warps=1,
        **_launch(qkv.device, rows),
    )
    return out


@triton.jit
def _attend_parts(
    qkv, own, prefixes, slot, at, prefix, prefix_length, sums, weights, steps, prefix_steps,
    own_values, prefix_values, scale, HEADS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    PREFIX_PARTS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Parts of the positions of a row and head: their weighted values, largest scores and sums of weights.

    The part that this step belongs to has its key and value from `qkv`, and stores them.
    """
    _begin(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(at + row)
    if position < 0:
        return
    prefix_end = tl.load(prefix_length + row)
    prefix_keys = prefixes + (tl.load(prefix + row) * HEADS + head) * prefix_steps * SIZE
    own_keys = own + (tl.load(slot + row) * HEADS + head) * steps * SIZE
    d = tl.arange(0, SIZE)
    q = tl.load(qkv + (row * 3 * HEADS + head) * SIZE + d).to(tl.float32) * scale
    for number in range(AT_ONCE):
        part = tl.program_id(2) * AT_ONCE + number
        is_prefix = part < PREFIX_PARTS
        start = tl.where(is_prefix, part, part - PREFIX_PARTS) * PART
        end = tl.minimum(tl.where(is_prefix, prefix_end, position), start + PART)
        keys = prefix_keys if is_prefix else own_keys
        values = keys + tl.where(is_prefix, prefix_values, own_values)
        has_new = (not is_prefix) & (position >= start) & (position < start + PART)
        largest = tl.full([], -1e30, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        weighted = tl.zeros([SIZE], tl.float32)
        if has_new:
            k = tl.load(qkv + ((row * 3 + 1) * HEADS + head) * SIZE + d)
            v = tl.load(qkv + ((row * 3 + 2) * HEADS + head) * SIZE + d)
            tl.store(keys + position * SIZE + d, k)
            tl.store(values + position * SIZE + d, v)
            largest = tl.sum(q * k.to(tl.float32), 0)
            total += 1.0
            weighted += v.to(tl.float32)
        for first in range(start, end, BLOCK):
            n = first + tl.arange(0, BLOCK)
            offsets = n[:, None] * SIZE + d[None, :]
            k = tl.load(keys + offsets, mask=(n < end)[:, None], other=0.0)
            v = tl.load(values + offsets, mask=(n < end)[:, None], other=0.0)
            scores = tl.where(n < end, tl.sum(q[None, :] * k.to(tl.float32), 1), -1e30)
            new_largest = tl.maximum(largest, tl.max(scores, 0))
            shrink = tl.exp(largest - new_largest)
            weight = tl.exp(scores - new_largest)
            total = total * shrink + tl.sum(weight, 0)
            weighted = weighted * shrink + tl.sum(weight[:, None] * v.to(tl.float32), 0)
            largest = new_largest
        if has_new | (start < end):
            index = (row * HEADS + head) * PARTS + part
            tl.store(sums + index * SIZE + d, weighted)
            tl.store(weights + index, largest)
            tl.store(weights + tl.num_programs(0) * HEADS * PARTS + index, total)


@triton.jit
def _sum_parts(
    sums, weights, at, prefix_length, out, HEADS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    PREFIX_PARTS: tl.constexpr, PART: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The parts of a row and head, weighted by their scores."""
    _begin(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, SIZE)
    target = out + (row * HEADS + head) * SIZE + d
    position = tl.load(at + row)
    if position < 0:
        tl.store(target, tl.zeros([SIZE], tl.float32))
        return
    part = tl.arange(0, ROUND)
    first = tl.where(part < PREFIX_PARTS, part, part - PREFIX_PARTS) * PART
    end = tl.where(part < PREFIX_PARTS, tl.load(prefix_length + row), position + 1)
    used = (part < PARTS) & (first < end)
    index = (row * HEADS + head) * PARTS + part
    largest = tl.load(weights + index, mask=used, other=-1e30)
    total = tl.load(weights + tl.num_programs(0) * HEADS * PARTS + index, mask=used, other=0.0)
    weighted = tl.load(sums + index[:, None] * SIZE + d[None, :], mask=used[:, None], other=0.0)
    share = tl.where(used, tl.exp(largest - tl.max(largest, 0)), 0.0)
    tl.store(target, tl.sum(weighted * share[:, None], 0) / tl.sum(total * share, 0))


def pick(logits: torch.Tensor, step: Step) -> None:
    """See `torch_ops.pick`. One block per variation and codebook."""
    rows, codebooks, vocabulary = logits.shape
    _pick[(rows, codebooks)](
        logits,
        step.number,
        step.n_variations,
        step.conditional,
        step.unconditional,
        step.guidance,
        step.temperature,
        step.top_k,
        step.top_p,
        step.seed,
        step.first_noise,
        step.picked,
        step.inputs,
        step.inputs.shape[1],
        BOOKS=codebooks,
        SIZE=vocabulary,
        MOST=len(step.slot),
        num_warps=8,
        **_launch(logits.device, rows),
    )


@triton.jit
def _pick(
    logits, number, n_variations, conditional, unconditional, guidance, temperature, top_k, top_p,
    seed, first_noise, picked, inputs, n_inputs, BOOKS: tl.constexpr, SIZE: tl.constexpr,
    MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _begin(PDL)
    one, book = tl.program_id(0), tl.program_id(1)
    if one >= tl.load(n_variations):
        return
    step = tl.load(number)
    row, other = tl.load(conditional + one), tl.load(unconditional + one)
    token = tl.arange(0, SIZE)
    with_condition = tl.load(logits + (row * BOOKS + book) * SIZE + token).to(tl.float64)
    without = tl.load(logits + (other * BOOKS + book) * SIZE + token).to(tl.float64)
    mixed = without + (with_condition - without) * tl.load(guidance + one)
    divisor = tl.load(temperature + one)
    is_random = divisor > 0
    scaled = mixed / tl.where(is_random, divisor, 1.0)
    is_finite = tl.sum((tl.abs(scaled) < float("inf")).to(tl.int32), 0) == SIZE
    scaled = tl.where(is_finite, scaled, 0.0)  # with NaN the searches below might not end
    scaled = scaled - tl.max(scaled, 0)
    # Keys that are ordered as the numbers are.
    bits = scaled.to(tl.int64, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    least = tl.min(key, 0)
    k = tl.load(top_k + one)
    p = tl.load(top_p + one)
    keep = key >= least
    if p > 0:
        probability = tl.exp(scaled)
        probability = probability / tl.sum(probability, 0)
        low, high = least, tl.max(key, 0)
        while low < high:
            middle = low + (high - low) // 2
            is_enough = tl.sum(tl.where(key > middle, probability, 0.0), 0) < p
            high = tl.where(is_enough, middle, high)
            low = tl.where(is_enough, low, middle + 1)
        above = tl.sum(tl.where(key > low, probability, 0.0), 0)
        same = tl.where(key == low, probability, 0.0)
        keep = (key > low) | ((key == low) & (above + tl.cumsum(same, 0) - same < p))
    elif (k > 0) & (k < SIZE):
        low, high = least, tl.max(key, 0)
        while low < high:
            middle = low + (high - low + 1) // 2
            is_enough = tl.sum((key >= middle).to(tl.int32), 0) >= k
            low = tl.where(is_enough, middle, low)
            high = tl.where(is_enough, high, middle - 1)
        keep = key >= low
    score = tl.where(keep, scaled, float("-inf"))
    if is_random:
        score += _gumbel(tl.load(seed + one), tl.load(first_noise + one) + step, book, SIZE)
    choice = tl.where(is_finite, tl.argmax(score, 0), _NOT_FINITE)
    tl.store(picked + (step * MOST + one) * BOOKS + book, choice)
    for index in range(2):
        place = inputs + (tl.where(index == 0, row, other) * n_inputs + step + 1) * BOOKS + book
        if tl.load(place) == _UNKNOWN:
            tl.store(place, tl.maximum(choice, 0).to(tl.int64))


@triton.jit
def _gumbel(seed, step, book, SIZE: tl.constexpr):
    c0 = tl.arange(1, SIZE // 4 + 1).to(tl.int64)  # numpy counts before it draws
    c1 = tl.zeros_like(c0) + book
    c2 = tl.zeros_like(c0) + step
    c3 = tl.zeros_like(c0)
    k0 = seed
    k1 = tl.zeros_like(seed)
    for _ in range(_ROUNDS):
        m0 = tl.full([SIZE // 4], _M0, tl.int64)
        m1 = tl.full([SIZE // 4], _M1, tl.int64)
        high_0 = _high(c0, m0)
        high_2 = _high(c2, m1)
        low_0 = c0 * m0
        low_2 = c2 * m1
        c0 = high_2 ^ c1 ^ k0
        c1 = low_2
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 += _K0
        k1 += _K1
    words = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    uniform = (((words >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _high(a, b):
    """High word of the product of unsigned words of 64 bits."""
    return tl.umulhi(a.to(tl.uint64, bitcast=True), b.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True)


@triton.jit
def _begin(PDL: tl.constexpr):
    """Wait for the kernel before this one, and let the next one be set up."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def _launch(device: torch.device, rows: int) -> dict[str, bool]:
    """Whether kernels are launched with PDL: a gain where they are short, and a loss with more rows."""
    with_pdl = rows <= FEW_ROWS and _capability(device) >= (9, 0)
    return {"PDL": with_pdl, **({"launch_pdl": True} if with_pdl else {})}


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def _stages(device: torch.device) -> int:
    """How many tiles of a product are loaded ahead: as shared memory allows.

    A tile takes at most 32 KiB, and some memory is left to the rest of the kernel.
    """
    if device.type != "cuda":
        return 1
    properties: Any = torch.cuda.get_device_properties(device)
    memory: int = properties.shared_memory_per_block_optin
    return max(1, min(4, memory // (40 << 10)))
