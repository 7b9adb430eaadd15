"""The figures of the int8 check; the check itself is tested with the engine's start in test_precision."""

from __future__ import annotations

from pipeline.engines.musicgen.precision_check import PrecisionCheck


def test_figures_that_are_not_numbers_are_none() -> None:
    """JSON has no NaN."""
    check = PrecisionCheck("m", [float("nan"), 0.5], [0.0, 1.0], 48, passed=False)
    assert check.facts == {"kl_nats": [None, 0.5], "top1": [0.0, 1.0], "steps": 48}
