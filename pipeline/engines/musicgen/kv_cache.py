"""Keys and values of the CPU's decoder, and what they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen import kernels
from pipeline.engines.musicgen.decoder import KEY_BYTES, NAMELESS, Feed, Tokens
from pipeline.engines.musicgen.shm import Files, Pages, Sizes
from pipeline.records import Samples

if TYPE_CHECKING:
    from pipeline.engines.musicgen.cpu_decoder import CpuDecoder

STEPS_UNIT = 128  # the caches' lengths are multiples of this
ENTRIES_AT_ONCE = 8 * kernels.ROW_BLOCK  # of a prefill

Indices = NDArray[np.int64]
PagesFn = Callable[[str, int], Pages]  # memory of that name and so many bytes


def whole_units(steps: int) -> int:
    return -(-steps // STEPS_UNIT) * STEPS_UNIT


class Cache:
    """Keys and values of a number of slots, as the kernels want them."""

    def __init__(self, decoder: CpuDecoder, slots: int, steps: int, pages: PagesFn) -> None:
        """`steps`: whole units."""
        shape = decoder.shape
        quantized = decoder.precision == "int8"
        self.layers, self.heads = shape.layers, shape.heads
        places, dim = slots * shape.layers * shape.heads, shape.hidden // shape.heads
        kind = np.int8 if quantized else np.float32
        numbers_bytes = places * steps * dim * np.dtype(kind).itemsize
        scales_bytes = places * steps * 2 if quantized else 0
        self._numbers = [pages(name, numbers_bytes) for name in ("keys", "values")]
        self._scales = [pages(f"{name}-scales", scales_bytes) for name in ("keys", "values")]
        keys, values = (pages.array(kind).reshape(places, steps * dim) for pages in self._numbers)
        key_scales, value_scales = (
            pages.array(np.uint16).reshape(places, steps if quantized else 0) for pages in self._scales
        )
        self.arrays = (keys, key_scales, values, value_scales)
        self.slots = slots

    def places(self, slots: Indices) -> Indices:
        """Where the first head of these slots is, in each layer: (layers, slots).

        A slot's places stand together, so that one that isn't used takes no memory.
        """
        layers = np.arange(self.layers, dtype=np.int64)[:, None]
        return np.asarray((slots * self.layers + layers) * self.heads)

    def reserve(self, slot: int) -> None:
        """See `Pages.reserve`."""
        for pages, first, last in self._parts(slot):
            pages.reserve(first, last)

    def release(self, slot: int) -> None:
        """Give a slot's memory back; it can be used again."""
        for pages, first, last in self._parts(slot):
            pages.release(first, last)

    def _parts(self, slot: int) -> list[tuple[Pages, int, int]]:
        """A slot's memory: pages, and the bytes in them."""
        sized = [(pages, pages.n_bytes // self.slots) for pages in (*self._numbers, *self._scales)]
        return [(pages, slot * size, (slot + 1) * size) for pages, size in sized]


class Held:
    """What the slots hold: each prefix's key and length, each row's prefix and tokens.

    It stands beside the keys and values and outlives the process if they do. It is true at every
    moment at which the process can end: a step counts as held when its keys and values are there,
    and no longer when they are about to be others.
    """

    def __init__(self, sizes: Sizes, codebooks: int, pages: PagesFn) -> None:
        def array(name: str, shape: tuple[int, ...], kind: type) -> NDArray[Any]:
            its = pages(name, int(np.prod(shape)) * np.dtype(kind).itemsize)
            its.reserve(0, its.n_bytes)
            return its.array(kind).reshape(shape)

        self.lengths: Indices = array("prefix-lengths", (sizes.prefixes,), np.int64)
        self.prefix_keys = array("prefix-keys", (sizes.prefixes, KEY_BYTES), np.uint8)
        self.steps: Indices = array("row-steps", (sizes.rows,), np.int64)
        self.row_keys = array("row-keys", (sizes.rows, KEY_BYTES), np.uint8)
        self.tokens = array("row-tokens", (sizes.rows, sizes.steps, codebooks), np.int16)

    def prefixes(self) -> dict[bytes, int]:
        """The places of those with a key."""
        places = {keys.tobytes(): place for place, keys in enumerate(self.prefix_keys)}
        places.pop(NAMELESS, None)
        return places

    def put_prefix(self, place: int, key: bytes, length: int) -> None:
        """Once it is there."""
        self.lengths[place] = length
        self.prefix_keys[place] = np.frombuffer(key, np.uint8)

    def drop_prefix(self, place: int) -> None:
        self.prefix_keys[place] = 0
        self.lengths[place] = 0

    def common(self, slot: int, key: bytes, tokens: Tokens) -> int:
        """How many of these steps, from the first, a row holds after that prefix; 0 if it is another's.

        All rows are told the same at their first step, nothing.
        """
        if self.row_keys[slot].tobytes() != key:
            return 0
        n = min(len(tokens), int(self.steps[slot]))
        other = (self.tokens[slot, :n] != tokens[:n]).any(axis=1)
        same = int(other.argmax()) if other.any() else n
        return same if same > 1 else 0

    def give(self, slot: int, key: bytes, steps: int) -> None:
        """A row is to go on from a step, after that prefix."""
        self.steps[slot] = steps
        self.row_keys[slot] = np.frombuffer(key, np.uint8)

    def before(self, feeds: Sequence[Feed]) -> None:
        for feed in feeds:
            self.steps[feed.slot] = min(feed.position, self.steps[feed.slot])

    def after(self, feeds: Sequence[Feed]) -> None:
        for feed in feeds:
            if self.steps[feed.slot] == feed.position:
                last = feed.position + len(feed.tokens)
                self.tokens[feed.slot, feed.position : last] = feed.tokens
                self.steps[feed.slot] = last


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Which prefix each entry has."""

    cache: Cache
    slots: Indices  # (entries,)
    lengths: Indices  # (entries,): 0 for none


class CpuMemory:
    """See `Memory`."""

    def __init__(self, decoder: CpuDecoder, wanted: Sizes, files: Files | None = None) -> None:
        """`files`: where keys and values are, with those that are there already; None: nowhere else."""

        def pages(kind: str, name: str, n_bytes: int) -> Pages:
            return Pages(n_bytes) if files is None else files.pages(f"{kind}{name}", n_bytes)

        wanted = replace(
            wanted, steps=whole_units(wanted.steps), prefix_steps=whole_units(wanted.prefix_steps)
        )
        sizes = wanted if files is None else files.fit(wanted)
        self.decoder, self.n_rows = decoder, wanted.rows
        self.rows = Cache(decoder, sizes.rows, sizes.steps, partial(pages, "row-"))
        self.prefixes = Cache(decoder, sizes.prefixes, sizes.prefix_steps, partial(pages, "prefix-"))
        self.held = Held(sizes, decoder.shape.codebooks, partial(pages, "held-"))
        if files is not None:
            files.describe(sizes)
        named = (self.held.prefix_keys != 0).any(axis=1)
        self.places: Sequence[int] = np.argsort(~named, kind="stable").tolist()[: wanted.prefixes]
        for place in set(range(sizes.prefixes)) - set(self.places):  # left by a larger batch
            self.held.drop_prefix(place)
            self.prefixes.release(place)

    def choose_rows(self, known: Sequence[tuple[bytes, Tokens]]) -> list[int]:
        slots = list(range(self.rows.slots))
        for n, (key, tokens) in enumerate(known[: self.n_rows]):
            steps = [self.held.common(slot, key, tokens) for slot in slots[n:]]
            best = n + int(np.argmax(steps))
            slots[n], slots[best] = slots[best], slots[n]
        for slot in slots[self.n_rows :]:  # left by a larger batch
            self.release(slot)
        return slots[: self.n_rows]

    def held_prefixes(self) -> dict[bytes, int]:
        return self.held.prefixes()

    def take_row(self, key: bytes, tokens: Tokens, free: Sequence[int]) -> tuple[int, int]:
        steps = {slot: self.held.common(slot, key, tokens) for slot in free}
        slot = max(free, key=lambda slot: (steps[slot], -self.held.steps[slot]))
        self.rows.reserve(slot)
        self.held.give(slot, key, steps[slot])
        return slot, steps[slot]

    def leave_row(self, slot: int) -> None:
        self.held.give(slot, NAMELESS, 0)

    def prefill(self, prefix: int, inputs: Samples, key: bytes = NAMELESS) -> None:
        positions = np.arange(len(inputs), dtype=np.int64)
        x = inputs + self.decoder.ends.positions[positions]
        nothing = np.zeros_like(positions)
        self.prefixes.reserve(prefix)
        self.held.drop_prefix(prefix)
        self._run(x, self.prefixes, np.full_like(positions, prefix), positions, self._without_prefix(nothing))
        self.held.put_prefix(prefix, key, len(inputs))

    def advance(self, feeds: Sequence[Feed]) -> Samples:
        ends, counts = self.decoder.ends, [len(feed.tokens) for feed in feeds]
        slots = np.repeat(np.array([feed.slot for feed in feeds], np.int64), counts)
        prefixes = np.repeat(np.array([feed.prefix for feed in feeds], np.int64), counts)
        positions = np.concatenate([feed.position + np.arange(len(feed.tokens)) for feed in feeds])
        lengths = self.held.lengths[prefixes]
        x = (
            ends.embedded(np.concatenate([feed.tokens for feed in feeds]))
            + ends.positions[lengths + positions]
        )
        self.held.before(feeds)
        self._run(x, self.rows, slots, positions, Prefixes(self.prefixes, prefixes, lengths))
        self.held.after(feeds)
        return self.decoder.logits(x[np.cumsum(counts) - 1])

    def release(self, slot: int) -> None:
        self.leave_row(slot)
        self.rows.release(slot)

    def run(self, x: Samples) -> None:
        """All positions of one sequence without a prefix, (steps, hidden), through the layers, in place."""
        positions = np.arange(len(x), dtype=np.int64)
        nothing = np.zeros_like(positions)
        self._run(x, self.rows, nothing, positions, self._without_prefix(nothing))

    def _without_prefix(self, nothing: Indices) -> Prefixes:
        return Prefixes(self.prefixes, nothing, nothing)

    def _run(self, x: Samples, cache: Cache, slots: Indices, positions: Indices, before: Prefixes) -> None:
        """Through the layers, in parts that keep the working arrays small."""
        for start in range(0, len(x), ENTRIES_AT_ONCE):
            part = slice(start, start + ENTRIES_AT_ONCE)
            its = Prefixes(before.cache, before.slots[part], before.lengths[part])
            self.decoder.run(x[part], cache, slots[part], positions[part], its)
