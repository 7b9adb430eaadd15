"""Continuous batching: all requests of a call share each pass over the decoder's weights.

Reading the weights is what a step costs, so further rows are nearly free. A request takes one row,
or two with classifier-free guidance (conditional and unconditional). When a request is finished or
reaches the end of its window, its rows go to the next one that waits: eight tracks with one
variation each cost about as much as one track with eight. A prefix is run once and shared by all
rows that have the same. Each request gets the tokens that it would get alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pipeline.engines.musicgen.conditioning import Conditions
from pipeline.engines.musicgen.decoder import Decoder, StepInput, Tokens
from pipeline.engines.musicgen.sampling import Logits, Sampler
from pipeline.engines.musicgen.windows import UNKNOWN, DelayedWindow, Window
from pipeline.errors import PipelineError
from pipeline.records import Samples

# Errors that fail one request and not the others; torch raises RuntimeError when memory runs out.
REQUEST_ERRORS = (PipelineError, RuntimeError, ValueError, MemoryError)

KNOWN_STEPS_AT_ONCE = 64  # how many known steps are run between two checks for a stop


@dataclass(eq=False)
class RequestState:
    """One variation while its tokens are made."""

    request_id: str
    conditions: Conditions
    sampler: Sampler
    windows: tuple[Window, ...]
    codes: Tokens  # (codebooks, frames), UNKNOWN where no token was picked yet
    melody_source: str = "mix"  # what the melody was taken from: mix, harmonic or demucs
    identity: str = ""  # digest of everything that the tokens depend on
    delayed: DelayedWindow = field(init=False)  # the current window, once it was begun
    position: int = 0  # steps of the current window that the KV cache holds
    slots: list[int] = field(default_factory=list)  # of its rows: conditional, then unconditional
    prefixes: list[int] = field(default_factory=list)  # prefix slot of each row
    error: Exception | None = None  # what prevents its tokens

    @property
    def n_rows(self) -> int:
        return 1 if self.sampler.params.guidance == 1 else 2

    def prefix_keys(self, window: Window) -> list[Hashable]:
        """What tells the prefix of each row in a window from others."""
        chroma, text = self.conditions.chroma[window.start], self.conditions.text
        conditional, unconditional = (chroma.tobytes(), text.tobytes()), len(text)
        return [conditional, unconditional][: self.n_rows]

    def next_window(self) -> Window | None:
        """The first window with a token that is not picked yet."""
        unknown = (self.codes == UNKNOWN).any(axis=0)
        return next((w for w in self.windows if unknown[w.start : w.start + w.frames].any()), None)


def distinct_prefixes(requests: Sequence[RequestState]) -> int:
    """Number of different prefixes of all windows of these requests."""
    windows = [(request, window) for request in requests for window in request.windows]
    return len({key for request, window in windows for key in request.prefix_keys(window)})


@dataclass(eq=False)
class PrefixCache:
    """Which prefix is in which slot of the KV cache, and how many rows use it."""

    n_slots: int
    prefill: Callable[[int, Samples], None]  # stores a prefix in a slot
    slots: dict[Hashable, int] = field(default_factory=dict)  # by key, the longest stored first
    users: Counter[int] = field(default_factory=Counter)  # rows, by slot

    def acquire(self, key: Hashable, inputs: Callable[[], Samples]) -> int:
        """The slot of a prefix for one more row; `inputs` is called unless the prefix is stored."""
        if key not in self.slots:
            slot = self._free_slot()
            self.prefill(slot, inputs())
            self.slots[key] = slot
        self.users[self.slots[key]] += 1
        return self.slots[key]

    def release(self, slot: int) -> None:
        """One row fewer uses the prefix, which stays stored until its slot is needed."""
        self.users[slot] -= 1

    def _free_slot(self) -> int:
        """An empty slot, or that of the unused prefix which was stored first, which is dropped."""
        if len(self.slots) < self.n_slots:
            return next(slot for slot in range(self.n_slots) if slot not in self.slots.values())
        unused = next(key for key, slot in self.slots.items() if not self.users[slot])
        return self.slots.pop(unused)


@dataclass(eq=False)
class Scheduler:
    """Runs the requests of one call in the rows of one KV cache."""

    decoder: Decoder[Any]
    rows: int  # at once, at least two
    n_prefixes: int  # prefixes stored at once: one per row, or fewer if there are fewer different ones
    steps: int  # of the longest window, with its delays
    prefix_steps: int  # of the longest prefix
    delays: np.ndarray  # see `DelayedWindow`
    on_step: Callable[[RequestState, bool], None]  # after each step (True) or block of known steps (False)
    check_stop: Callable[[], None]  # raises Stopped

    def __post_init__(self) -> None:
        self.cache = self.decoder.new_cache(self.rows, self.steps, self.n_prefixes, self.prefix_steps)
        self.prefixes = PrefixCache(self.n_prefixes, partial(self.decoder.prefill, self.cache))
        self.free = list(range(self.rows))

    def run(self, requests: Sequence[RequestState]) -> Iterator[RequestState]:
        """Yield each request as soon as it has all its tokens, or an error.

        Raises:
            Stopped: as `check_stop`.
        """
        waiting, active = deque(requests), list[RequestState]()
        while waiting or active:
            yield from self._admit(waiting, active)
            if active:
                yield from self._advance(waiting, active)

    def _admit(self, waiting: deque[RequestState], active: list[RequestState]) -> Iterator[RequestState]:
        """Begin the next window of waiting requests, in order, while there are rows for the first of them."""
        while waiting and len(self.free) >= waiting[0].n_rows:
            request = waiting.popleft()
            window = request.next_window()
            if window is None:
                yield request
                continue
            try:
                self.begin(request, window)
            except REQUEST_ERRORS as error:
                request.error = error
                self._free_rows(request)
                yield request
            else:
                active.append(request)

    def _advance(self, waiting: deque[RequestState], active: list[RequestState]) -> Iterator[RequestState]:
        """One step of all active requests; the rows of those at the end of their window become free."""
        finished = []
        for request in self.step(active):
            active.remove(request)
            self._free_rows(request)
            if request.error is None and request.next_window() is not None:
                waiting.appendleft(request)
            else:
                finished.append(request)
        if not (waiting or active):
            del self.cache, self.prefixes  # the caller decodes what is finished, which takes memory too
        yield from finished

    def begin(self, request: RequestState, window: Window) -> None:
        """Take rows, run the window's prefixes, and run the steps whose tokens are known."""
        self.check_stop()
        request.delayed = DelayedWindow(request.codes, window, self.delays, self.decoder.shape.vocabulary)
        request.position = 0
        conditions = request.conditions
        prefixes = (lambda: conditions.conditional(window.start), conditions.unconditional)
        for key, inputs in zip(request.prefix_keys(window), prefixes, strict=False):
            request.slots.append(self.free.pop())
            request.prefixes.append(self.prefixes.acquire(key, inputs))
        known = request.delayed.known_steps
        while request.position < known:
            self.check_stop()
            end = min(request.position + KNOWN_STEPS_AT_ONCE, known)
            self.decoder.advance(self.cache, self._inputs(request, end))
            request.position = end
            self.on_step(request, False)

    def _inputs(self, request: RequestState, end: int) -> list[StepInput]:
        """The inputs of a request's rows from its position up to step `end`, excluded."""
        tokens = request.delayed.inputs(request.position, end)
        return [
            StepInput(slot, prefix, request.position, tokens)
            for slot, prefix in zip(request.slots, request.prefixes, strict=True)
        ]

    def step(self, active: Sequence[RequestState]) -> list[RequestState]:
        """Pick one step's tokens; returns the requests that failed or are at the end of their window."""
        self.check_stop()
        inputs = [one for request in active for one in self._inputs(request, request.position + 1)]
        inputs.sort(key=lambda one: one.prefix)  # neighbours share what the processor's caches hold
        logits = self.decoder.advance(self.cache, inputs)
        by_slot = dict(zip((one.slot for one in inputs), logits, strict=True))
        for request in active:
            try:
                _pick(request, [by_slot[slot].astype(np.float64) for slot in request.slots])
            except PipelineError as error:
                request.error = error
            else:
                self.on_step(request, True)
        return [one for one in active if one.error or one.position == one.delayed.steps]

    def _free_rows(self, request: RequestState) -> None:
        self.free += request.slots
        for slot in request.prefixes:
            self.prefixes.release(slot)
        request.slots, request.prefixes = [], []


def _pick(request: RequestState, logits: Sequence[Logits]) -> None:
    """Pick the tokens of the next step from the logits of a request's rows.

    The noise depends on the step counted from the beginning of the piece, not of the window.
    """
    step = request.delayed.window.start + request.position
    picked = request.sampler.pick(step, logits[0], logits[1] if len(logits) > 1 else None)
    request.delayed.store(request.position, picked)
    request.position += 1
