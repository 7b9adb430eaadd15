"""Continuous batching: all requests of a call share each pass over the decoder's weights.

Reading the weights is what a step costs, so further rows are nearly free. A request takes one row,
or two with classifier-free guidance (conditional and unconditional). When a request is finished or
reaches the end of its window, its rows go to the next one that waits: eight tracks with one
variation each cost about as much as one track with eight. A prefix is run once and shared by all
rows that have the same. Each request gets the tokens that it would get alone. Steps whose tokens are
known, at the beginning of a further window or after an interruption, are run in company as well.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from pipeline.engines.musicgen import memory_budget
from pipeline.engines.musicgen.conditioning import Conditions
from pipeline.engines.musicgen.decoder import UNKNOWN, Continuation, Decoder, Tokens
from pipeline.engines.musicgen.sampling import Sampler
from pipeline.engines.musicgen.windows import DelayedWindow, Window
from pipeline.errors import PipelineError
from pipeline.records import Samples

# Errors that fail one request and not the others. On a CPU torch raises RuntimeError when memory runs out.
REQUEST_ERRORS = (PipelineError, RuntimeError, ValueError, MemoryError)


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
    saved: int = 0  # how many of them need no saving: their tokens were known, or are saved
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
    slots: dict[Hashable, int] = field(default_factory=dict)  # by key, the longest stored first
    users: Counter[int] = field(default_factory=Counter)  # rows, by slot
    wanted: dict[int, Samples] = field(default_factory=dict)  # prefixes to be run, by slot

    def acquire(self, key: Hashable, inputs: Callable[[], Samples]) -> int:
        """The slot of a prefix for one more row; one that is not stored is `wanted` with its `inputs`."""
        if key not in self.slots:
            prefix = inputs()
            self.slots[key] = self._free_slot()
            self.wanted[self.slots[key]] = prefix
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
    on_step: Callable[[RequestState], None]  # after some steps of a request
    check_stop: Callable[[], None]  # raises Stopped

    def __post_init__(self) -> None:
        self.cache = self.decoder.new_cache(self.rows, self.steps, self.n_prefixes, self.prefix_steps)
        self.prefixes = PrefixCache(self.n_prefixes)
        self.free = list(range(self.rows))

    def run(self, requests: Sequence[RequestState]) -> Iterator[RequestState]:
        """Yield each request as soon as it has all its tokens, or an error.

        Raises:
            Stopped: as `check_stop`.
            MemoryError, torch.OutOfMemoryError: there is no memory for so many rows.
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
                if memory_budget.is_exhausted(error):
                    raise
                request.error = error
                self._free_rows(request)
                yield request
            else:
                active.append(request)
        self.prefill()

    def _advance(self, waiting: deque[RequestState], active: list[RequestState]) -> Iterator[RequestState]:
        """Some steps of all active requests; the rows of those at the end of their window become free."""
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
        """Take rows for a window; `prefill` runs its prefixes."""
        self.check_stop()
        request.delayed = DelayedWindow(request.codes, window, self.delays, self.decoder.shape.vocabulary)
        request.position, request.saved = 0, request.delayed.known_steps
        conditions = request.conditions
        prefixes = (lambda: conditions.conditional(window.start), conditions.unconditional)
        for key, inputs in zip(request.prefix_keys(window), prefixes, strict=False):
            request.slots.append(self.free.pop())
            request.prefixes.append(self.prefixes.acquire(key, inputs))

    def prefill(self) -> None:
        """Run the prefixes that are wanted."""
        while wanted := list(islice(self.prefixes.wanted, self.decoder.prefixes_at_once)):
            self.check_stop()
            self.decoder.prefill(self.cache, {slot: self.prefixes.wanted.pop(slot) for slot in wanted})

    def step(self, active: Sequence[RequestState]) -> list[RequestState]:
        """Run some steps; returns the requests that failed or are at the end of their window."""
        self.check_stop()
        most = self.decoder.steps_at_once
        results = self.decoder.generate(self.cache, [_continuation(request, most) for request in active])
        for request, picked in zip(active, results, strict=True):
            if isinstance(picked, Exception):
                request.error = picked
                continue
            request.delayed.store(request.position, picked)
            request.position += len(picked)
            self.on_step(request)
        return [one for one in active if one.error or one.position == one.delayed.steps]

    def _free_rows(self, request: RequestState) -> None:
        self.free += request.slots
        for slot in request.prefixes:
            self.prefixes.release(slot)
        request.slots, request.prefixes = [], []


def _continuation(request: RequestState, most: int) -> Continuation:
    """At most so many of a request's next steps.

    The noise depends on the step counted from the beginning of the piece, not of the window.
    """
    position, window = request.position, request.delayed
    return Continuation(
        slots=request.slots,
        prefixes=request.prefixes,
        position=position,
        inputs=window.inputs(position, min(position + most, window.steps)),
        sampler=request.sampler,
        first_step=window.window.start + position,
    )
