"""What a decoder is: tokens in, the next tokens' logits out, in any number of rows at once.

A row is one sequence with its own keys and values: a variation takes one, or two with guidance
(told its condition, and told nothing). What conditions a row, its prefix, is run through the model
once and may be shared by any number of rows. Sequences are (prefix | own steps), positions counted
through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen.shm import Files
from pipeline.records import Samples

Tokens = NDArray[np.int64]

KEY_BYTES = 32  # what a prefix is known by, a digest
NAMELESS = bytes(KEY_BYTES)


@dataclass(frozen=True)
class Shape:
    """The sizes of a checkpoint's decoder."""

    layers: int
    hidden: int
    heads: int
    wide: int  # inputs of the feed-forward's second matrix
    codebooks: int  # of all channels together
    vocabulary: int  # tokens that can be picked; the one after them starts and pads


@dataclass(frozen=True, eq=False)
class Ends:
    """The two ends of a decoder, in float32 whatever is between them."""

    embeddings: Samples  # (codebooks, vocabulary + 1, hidden)
    heads: Samples  # (codebooks * vocabulary, hidden)
    norm: Samples  # (2, hidden): weight and bias of the last layer normalization

    positions: Samples  # (n, hidden): what is added at each position

    def embedded(self, tokens: Tokens) -> Samples:
        """Tokens (n, codebooks) as inputs, float32, (n, hidden), positions not added."""
        found: Samples = self.embeddings[np.arange(tokens.shape[1]), tokens].sum(axis=1)
        return found


@dataclass(frozen=True, eq=False)
class Feed:
    """What one row is told next."""

    slot: int  # of the memory
    prefix: int  # of the memory
    position: int  # how many of its own steps came before
    tokens: Tokens  # (n, codebooks), n >= 1


class Memory(Protocol):
    """Keys and values of a decoder's rows and prefixes, and the way to add to them."""

    places: Sequence[int]  # of prefixes

    def held_prefixes(self) -> dict[bytes, int]:
        """The places of prefixes that are there from the beginning, by key."""
        ...

    def choose_rows(self, known: Sequence[tuple[bytes, Tokens]]) -> list[int]:
        """The slots to use, as many as were asked for, those first that hold what is known already.

        `known`: of each row that is to go on, its prefix's key and what its steps are told.
        """
        ...

    def take_row(self, key: bytes, tokens: Tokens, free: Sequence[int]) -> tuple[int, int]:
        """The free slot for a row that goes on after these tokens, and how many of their steps it holds.

        `tokens` (steps, codebooks) are what its steps are told, `key` is its prefix's.

        Raises:
            MemoryError: there is no room for it.
        """
        ...

    def leave_row(self, slot: int) -> None:
        """Nobody will go on with what a row holds."""
        ...

    def prefill(self, prefix: int, inputs: Samples, key: bytes = NAMELESS) -> None:
        """Run a prefix, float32 (steps, hidden) without positions, and keep it in that place."""
        ...

    def advance(self, feeds: Sequence[Feed]) -> Samples:
        """Run the feeds, one per row; the logits after each one's last tokens.

        Returns float32, (feeds, codebooks, vocabulary). A row's logits don't depend on the others.
        """
        ...

    def release(self, slot: int) -> None:
        """Give back the memory of a row that isn't needed any more, if that can be done."""
        ...


class Decoder(Protocol):
    """The model between tokens and logits."""

    shape: Shape
    precision: str  # "float32", "int8", "float16", "bfloat16"

    def memory(
        self, rows: int, steps: int, prefixes: int, prefix_steps: int, files: Files | None = None
    ) -> Memory:
        """Room for so many rows of so many own steps, and prefixes of so many steps.

        `files`: where to keep it, with what is there already, if this decoder can.
        """
        ...

    def bytes_of(self, steps: int) -> int:
        """Of one row or prefix of so many steps in a memory."""
        ...


def shape_of(config: Any) -> Shape:
    """The shape in a checkpoint's decoder configuration (transformers.MusicgenMelodyDecoderConfig)."""
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        wide=config.ffn_dim,
        codebooks=config.num_codebooks,
        vocabulary=config.vocab_size,
    )
