"""Memory of the CPU decoder's KV cache that is given back."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import numpy as np
import pytest
from musicgen_setup import decoder_of

from pipeline.engines.musicgen.decoder import StepInput
from pipeline.engines.musicgen.kv_cache import Slots, SlotShape


def test_a_released_slot_is_zero_and_its_neighbours_are_not() -> None:
    """A slot of keys is 12.5 pages: the first whole page in slot 1 begins half a page after the slot."""
    if sys.platform != "linux":
        pytest.skip("only Linux fills memory that was given back with zeros")
    slots = Slots(SlotShape(layers=1, heads=1, head_size=25 * mmap.PAGESIZE // 256, is_int8=True), 3, 128)
    for array in slots.arrays:
        array[:] = 1
    slots.release(1)
    keys = slots.arrays[0].reshape(-1, mmap.PAGESIZE // 2)  # in half pages, 25 per slot
    assert keys.sum(axis=1).nonzero()[0].tolist() == [*range(26), *range(50, 75)]
    assert slots.arrays[1].all()  # the scales of a slot are less than a page


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_a_released_slot_can_be_used_again(musicgen: Any, kind: str) -> None:
    decoder = decoder_of(musicgen.checkpoint, kind)
    cache = decoder.new_cache(3, 40, 1, 8)
    decoder.prefill(cache, 0, np.ones((8, 32), np.float32))
    tokens = np.random.default_rng(0).integers(0, 2048, (40, 4))

    def logits(slot: int) -> np.ndarray:
        return decoder.advance(cache, [StepInput(slot, 0, 0, tokens)])

    first, neighbour = logits(1), logits(2)
    cache.release(1)
    np.testing.assert_array_equal(logits(1), first)
    again = decoder.advance(cache, [StepInput(2, 0, 40, tokens[:1])])
    cache.release(2)
    logits(2)
    np.testing.assert_array_equal(decoder.advance(cache, [StepInput(2, 0, 40, tokens[:1])]), again)
    np.testing.assert_array_equal(neighbour, first)
