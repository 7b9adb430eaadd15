"""What the engine needs of a decoder, and the values that every decoder takes.

A decoder turns tokens into the logits of the next tokens, for any number of rows at once. A row is
one sequence with its own keys and values. A variation takes one row, or two with classifier-free
guidance (one conditional, one unconditional). The prefix that conditions a row is run through the
model once and may be shared by any number of rows. A sequence is (prefix | own steps), with
positions counted through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.records import Samples

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """The sizes of a checkpoint's decoder."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int  # inputs of the feed-forward block's second matrix
    codebooks: int  # of all channels together
    vocabulary: int  # tokens that can be picked; the one after them is the start and padding token

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True, eq=False)
class EmbeddingAndHead:
    """What stands before and after a decoder's layers, always in float32."""

    embeddings: Samples  # (codebooks, vocabulary + 1, hidden)
    heads: Samples  # the LM heads, (codebooks * vocabulary, hidden)
    norm: Samples  # (2, hidden): weight and bias of the last layer normalization
    positions: Samples  # (n, hidden): what is added at each position

    def embed(self, tokens: Tokens) -> Samples:
        """Tokens (n, codebooks) as inputs, float32, (n, hidden), without positions."""
        found: Samples = self.embeddings[np.arange(tokens.shape[1]), tokens].sum(axis=1)
        return found


@dataclass(frozen=True, eq=False)
class StepInput:
    """The next tokens of one row: of one step, or of several steps that are known already."""

    slot: int  # of the row in the KV cache
    prefix: int  # slot of the row's prefix in the KV cache
    position: int  # number of the row's own steps before these
    tokens: Tokens  # (n, codebooks), n >= 1


Cache = TypeVar("Cache")  # keys and values of rows and of prefixes, each in a numbered slot


class Decoder(Protocol[Cache]):
    """The model between tokens and logits."""

    shape: Shape
    precision: str  # "float32", "int8", "float16", "bfloat16"

    def new_cache(self, rows: int, steps: int, prefixes: int, prefix_steps: int) -> Cache:
        """A KV cache for `rows` rows of `steps` own steps, and `prefixes` prefixes of `prefix_steps`."""
        ...

    def cache_bytes(self, steps: int) -> int:
        """Size of one row or prefix of so many steps in a KV cache."""
        ...

    def prefill(self, cache: Cache, prefix: int, inputs: Samples) -> None:
        """Run a prefix, float32 (steps, hidden) without positions, and store it in a prefix slot."""
        ...

    def advance(self, cache: Cache, step_inputs: Sequence[StepInput]) -> Samples:
        """Run the next tokens of some rows; returns the logits after the last tokens of each.

        Returns float32, (rows, codebooks, vocabulary). The logits of a row do not depend on the others.
        """
        ...
