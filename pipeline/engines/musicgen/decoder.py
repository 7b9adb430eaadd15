"""What the engine needs of a decoder, and the values that every decoder takes.

A decoder runs the model for any number of rows at once and picks the next tokens. A row is one
sequence with its own keys and values. A variation takes one row, or two with classifier-free
guidance (one conditional, one unconditional). The prefix that conditions a row is run through the
model once and may be shared by any number of rows. A sequence is (prefix | own steps), with
positions counted through both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.engines.musicgen.sampling import Sampler
from pipeline.errors import EngineFailure
from pipeline.records import Samples

Tokens = NDArray[np.int64]

UNKNOWN = -1  # stands for a token that was not picked yet


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


@dataclass(frozen=True, eq=False)
class Continuation:
    """The next steps of one variation."""

    slots: Sequence[int]  # of its rows in the KV cache: conditional, then unconditional
    prefixes: Sequence[int]  # prefix slot of each row
    position: int  # number of steps before these
    inputs: Tokens  # of the next steps, (steps, codebooks); UNKNOWN what is to be picked, not in the first
    sampler: Sampler
    first_step: int  # number of the first step in the noise

    def of_rows(self, steps: int) -> list[StepInput]:
        """The inputs of the first `steps` for each row."""
        tokens = self.inputs[:steps]
        return [
            StepInput(slot, prefix, self.position, tokens)
            for slot, prefix in zip(self.slots, self.prefixes, strict=True)
        ]


Cache = TypeVar("Cache")  # keys and values of rows and of prefixes, each in a numbered slot


class Decoder(Protocol[Cache]):
    """The model from tokens to the next tokens."""

    shape: Shape
    precision: str  # "float32", "int8", "float16", "bfloat16"
    most_rows: int  # at once: beyond that, time grows with the rows
    prefixes_at_once: int  # in a call of `prefill`, so that it returns within a second

    @property
    def steps_at_once(self) -> int:
        """How many steps of each variation `generate` is given at most, which take a fraction of a second."""
        ...

    def new_cache(self, rows: int, steps: int, prefixes: int, prefix_steps: int) -> Cache:
        """A KV cache for `rows` rows of `steps` own steps, and `prefixes` prefixes of `prefix_steps`."""
        ...

    def cache_bytes(self, steps: int) -> int:
        """Size of one row or prefix of so many steps in a KV cache."""
        ...

    def prefill(self, cache: Cache, prefixes: Mapping[int, Samples]) -> None:
        """Run prefixes, float32 (steps, hidden) each without positions, and store them by prefix slot."""
        ...

    def advance(self, cache: Cache, step_inputs: Sequence[StepInput]) -> Samples:
        """Run one step of some rows; returns the logits after it.

        Returns float32, (rows, codebooks, vocabulary). The logits of a row do not depend on the others.
        """
        ...

    def generate(self, cache: Cache, continuations: Sequence[Continuation]) -> list[Tokens | EngineFailure]:
        """Run at least one step of each variation, and pick the tokens after it.

        Returns for each variation the picked tokens of the steps that were run, (steps, codebooks), with
        anything where the next input is known; or why they can't be picked. The tokens of a variation do
        not depend on the others.
        """
        ...
