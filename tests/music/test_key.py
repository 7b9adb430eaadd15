"""Keys as text, and the agreement of two keys; those of pieces are in test_truth.py."""

from __future__ import annotations

from itertools import permutations, product

import mir_eval
import pytest

from pipeline.music.key import NAMES, Key, key_agreement

KEYS = [Key(tonic, mode) for tonic in range(12) for mode in ("major", "minor")]


def test_a_key_is_written_as_musicians_write_it() -> None:
    assert [str(Key(9, "minor")), str(Key(10, "major"))] == ["A minor", "Bb major"]


def test_agreement_is_the_mirex_score_with_fifths_up_and_down() -> None:
    for a, b in product(KEYS, KEYS):  # mir_eval counts a fifth up only
        expected = max(mir_eval.key.weighted_score(*pair) for pair in permutations((_name(a), _name(b))))
        assert key_agreement(a, b) == pytest.approx(expected), (str(a), str(b))


def _name(key: Key) -> str:
    return f"{NAMES[key.tonic]} {key.mode}"
