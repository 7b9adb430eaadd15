"""Many variations at once, each as if it were alone.

Every step runs one pass over the decoder's weights for all rows that are under way; reading the
weights is what a step costs, so rows are nearly free. A variation takes two rows with guidance,
told its condition and told nothing, and one without. When one is finished, or has come to the end
of its window, its rows are given to the next in line: eight tracks with one variation each cost
what one track with eight does. Prefixes are run once and shared by all rows that are told the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np

from pipeline.engines.musicgen.conditioning import Conditions
from pipeline.engines.musicgen.decoder import Decoder, Feed, Memory, Tokens
from pipeline.engines.musicgen.sampling import Sampler
from pipeline.engines.musicgen.shm import Files
from pipeline.engines.musicgen.windows import UNKNOWN, Delayed, Window
from pipeline.errors import PipelineError, Stopped
from pipeline.records import Samples

log = logging.getLogger("pipeline")

# Of one request; torch says RuntimeError for no memory left.
BREAKING = (PipelineError, RuntimeError, ValueError, MemoryError)

STEPS_AT_ONCE = 64  # of what is known already: asked to stop in between


@dataclass(eq=False)
class Voice:
    """One variation under way."""

    request_id: str
    conditions: Conditions
    sampler: Sampler
    windows: tuple[Window, ...]
    codes: Tokens  # (codebooks, frames), UNKNOWN where nothing was picked yet
    heard: str = "mix"  # what the melody was taken from: mix, harmonic or demucs
    identity: str = ""  # of all that its tokens depend on
    delayed: Delayed | None = None  # the window it is in
    position: int = 0  # steps of the window that the memory holds
    slots: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        return 1 if self.sampler.params.guidance == 1 else 2

    @property
    def known_frames(self) -> int:
        """Frames whose tokens are all known."""
        return int((self.codes != UNKNOWN).all(axis=0).sum())

    def prefix_keys(self, window: Window, frames_per_s: float) -> list[bytes]:
        """What each row is told in a window, to be known by: digests."""
        conditions = self.conditions
        chroma = conditions.window(window.start / frames_per_s)
        told = _digest(_digest(chroma.tobytes()) + _digest(conditions.text.tobytes()))
        nothing = _digest(b"nothing %d" % len(conditions.text))
        return [told, nothing][: self.n_rows]

    def next_window(self) -> Window | None:
        """The first one that has something left to pick."""
        unknown = (self.codes == UNKNOWN).any(axis=0)
        return next((w for w in self.windows if unknown[w.start : w.start + w.frames].any()), None)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def distinct_prefixes(voices: Sequence[Voice], frames_per_s: float) -> int:
    """How many prefixes there are in all: no more are ever needed at once."""
    keys = (
        key for voice in voices for window in voice.windows for key in voice.prefix_keys(window, frames_per_s)
    )
    return len(set(keys))


@dataclass(frozen=True)
class Ended:
    """A voice that has all its tokens, or why it never will."""

    voice: Voice
    error: Exception | None = None


@dataclass(eq=False)
class Prefixes:
    """Which prefixes the memory holds, under what they are of, and how many rows use each."""

    memory: Memory
    users: dict[int, int] = field(default_factory=dict)
    places: dict[bytes, int] = field(init=False)

    def __post_init__(self) -> None:
        self.places = self.memory.held_prefixes()

    def take(self, key: bytes, inputs: Callable[[], Samples]) -> int:
        """The place of a prefix, run now unless it is there; one more row uses it."""
        if key not in self.places:
            place = self._free()
            self.memory.prefill(place, inputs(), key)
            self.places[key] = place
        place = self.places[key]
        self.users[place] = self.users.get(place, 0) + 1
        return place

    def give_back(self, place: int) -> None:
        self.users[place] -= 1

    def _free(self) -> int:
        """A place nobody uses; the one that was filled longest ago makes room."""
        for key, place in self.places.items():
            if not self.users.get(place):
                if len(self.places) == len(self.memory.places):
                    del self.places[key]
                    return place
                break
        return next(place for place in self.memory.places if place not in self.places.values())


@dataclass(eq=False)
class Batch:
    """The voices of one call, over one memory."""

    decoder: Decoder
    rows: int  # at once, at least two
    n_prefixes: int  # at once: as many as rows, or as there are
    steps: int  # of the longest window, with its lags
    prefix_steps: int  # of the longest prefix
    lags: np.ndarray
    frames_per_s: float
    on_step: Callable[[Voice, bool], None]  # after each step, and each block of known ones: False
    check_stop: Callable[[], None]  # raises to end it all
    files: Callable[[], AbstractContextManager[Files | None]] = nullcontext  # where its memory is

    def run(self, voices: Sequence[Voice]) -> Iterator[Ended]:
        """All voices to their ends, in the order in which they get there; those begun already go first."""
        with self.files() as files:
            yield from self._run(voices, self.memory(files))

    def memory(self, files: Files | None = None) -> Memory:
        """Room for all rows, in files if they can be used."""
        sizes = self.rows, self.steps, self.n_prefixes, self.prefix_steps
        if files is not None:
            try:
                return self.decoder.memory(*sizes, files)
            except (OSError, MemoryError) as error:
                files.give_up(error)
        return self.decoder.memory(*sizes)

    def _run(self, voices: Sequence[Voice], memory: Memory) -> Iterator[Ended]:
        prefixes = Prefixes(memory)
        waiting, active = deque(sorted(voices, key=lambda voice: not voice.known_frames)), list[Voice]()
        free = memory.choose_rows([row for voice in waiting for row in self._known(voice)])
        while waiting or active:
            while waiting and len(free) >= waiting[0].n_rows:
                voice = waiting.popleft()
                window = voice.next_window()
                if window is None:
                    yield Ended(voice)
                    continue
                try:
                    self.begin(voice, window, memory, prefixes, free)
                except Stopped:
                    raise
                except BREAKING as broken:
                    self._leave(voice, free, prefixes)
                    yield Ended(voice, broken)
                    continue
                active.append(voice)
            if not active:
                continue
            ended: list[Ended] = []
            for voice, error in self.step(active, memory):
                active.remove(voice)
                self._leave(voice, free, prefixes)
                if error is None and voice.next_window() is not None:
                    waiting.appendleft(voice)
                else:
                    ended.append(Ended(voice, error))
            if ended and not waiting:
                for slot in free:  # before others make sound of what has ended, which takes memory too
                    memory.release(slot)
            yield from ended

    @staticmethod
    def _leave(voice: Voice, free: list[int], prefixes: Prefixes) -> None:
        for slot in voice.slots:
            prefixes.memory.leave_row(slot)
        free += voice.slots
        for place in voice.prefixes:
            prefixes.give_back(place)
        voice.slots, voice.prefixes = [], []

    def _known(self, voice: Voice) -> list[tuple[bytes, Tokens]]:
        """Of each row that is to go on: its prefix, and what is told the steps that are known."""
        window = voice.next_window() if voice.known_frames else None
        if window is None:
            return []
        told = self._delayed(voice, window).known
        return [(key, told) for key in voice.prefix_keys(window, self.frames_per_s)]

    def _delayed(self, voice: Voice, window: Window) -> Delayed:
        return Delayed(voice.codes, window, self.lags, self.decoder.shape.vocabulary)

    def begin(
        self, voice: Voice, window: Window, memory: Memory, prefixes: Prefixes, free: list[int]
    ) -> None:
        """Take rows, run a window's prefixes, and all steps but one of what is known and not held already."""
        self.check_stop()
        conditions = voice.conditions
        voice.delayed = self._delayed(voice, window)
        known = voice.delayed.known
        voice.position = last = len(known)
        start_s = window.start / self.frames_per_s
        inputs = (lambda: conditions.told(conditions.window(start_s)), conditions.nothing)
        for key, its_inputs in zip(voice.prefix_keys(window, self.frames_per_s), inputs, strict=False):
            slot, held = memory.take_row(key, known, free)
            free.remove(slot)
            voice.slots.append(slot)
            voice.position = min(voice.position, held)
            voice.prefixes.append(prefixes.take(key, its_inputs))
        if voice.position:
            log.info("musicgen: keys and values of a killed run: goes on at step %d", voice.position)
        while voice.position < last:
            self.check_stop()
            upto = min(voice.position + STEPS_AT_ONCE, last)
            memory.advance(self._feeds(voice, upto))
            voice.position = upto
            self.on_step(voice, False)

    def _feeds(self, voice: Voice, upto: int) -> list[Feed]:
        assert voice.delayed is not None
        tokens = voice.delayed.told(voice.position, upto)
        return [
            Feed(slot, prefix, voice.position, tokens)
            for slot, prefix in zip(voice.slots, voice.prefixes, strict=True)
        ]

    def step(self, active: Sequence[Voice], memory: Memory) -> list[tuple[Voice, PipelineError | None]]:
        """One step of all; those whose window is done or that failed."""
        self.check_stop()
        feeds = [feed for voice in active for feed in self._feeds(voice, voice.position + 1)]
        feeds.sort(key=lambda feed: feed.prefix)  # neighbours share what the processor's caches hold
        logits = dict(zip((feed.slot for feed in feeds), memory.advance(feeds), strict=True))
        ended: list[tuple[Voice, PipelineError | None]] = []
        for voice in active:
            told, *nothing = (logits[slot] for slot in voice.slots)
            try:
                self._pick(voice, told, nothing[0] if nothing else None)
            except PipelineError as error:
                ended.append((voice, error))
                continue
            self.on_step(voice, True)
            assert voice.delayed is not None
            if voice.position == voice.delayed.steps:
                ended.append((voice, None))
        return ended

    def _pick(self, voice: Voice, told: Samples, nothing: Samples | None) -> None:
        """Noise belongs to the step counted from the beginning of the piece: each token's is its own."""
        delayed = voice.delayed
        assert delayed is not None
        picked = voice.sampler.pick(
            delayed.window.start + voice.position,
            told.astype(np.float64),
            None if nothing is None else nothing.astype(np.float64),
        )
        delayed.put(voice.position, picked)
        voice.position += 1
