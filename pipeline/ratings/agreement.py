"""How well the scores of results agree with the ratings of people.

Spearman's rank correlation (Spearman 1904) of the stars with a score is 1 where both put the results in the
same order, -1 in the opposite order, and 0 where they have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.store.schema import Rating
from pipeline.store.store import Store

LEAST = 10  # ratings of an engine's results; a correlation of fewer is mostly chance
MEASURES = ("rank", "similarity")  # of the scores, as the manifest has them

Rated = tuple[Rating, Mapping[str, Any]]  # with the scores of the file


def agreements(store: Store) -> Iterator[tuple[str, str]]:
    """For each engine whose results are rated, its name and a sentence."""
    by_engine: dict[str, list[Rated]] = {}
    for rating in store.ratings():
        if (record := store.results_of(rating.track).get(rating.sha256)) and record.get("scores"):
            by_engine.setdefault(record["engine"], []).append((rating, record["scores"]))
    for engine, rated in sorted(by_engine.items()):
        yield engine, "; ".join([_of_stars(rated), *_of_kept(rated)])


def _of_stars(rated: Sequence[Rated]) -> str:
    from scipy.stats import spearmanr

    starred = [(rating.stars, scores) for rating, scores in rated if rating.stars is not None]
    if len(starred) < LEAST:
        return f"{len(starred)} with stars: {LEAST} are needed to compare them with the scores"
    if len({stars for stars, _ in starred}) == 1:
        return f"{len(starred)} with stars: all have the same, so nothing can be compared"
    parts = []
    for measure in MEASURES:
        pairs = [(stars, scores[measure]) for stars, scores in starred if scores.get(measure) is not None]
        if len(pairs) >= LEAST and min(map(len, map(set, zip(*pairs, strict=True)))) > 1:
            parts.append(f"{measure} {spearmanr(*zip(*pairs, strict=True)).statistic:.2f}")
    text = ", ".join(parts) or "the scores are all the same"
    return f"{len(starred)} with stars; their rank correlation with the scores: {text}"


def _of_kept(rated: Sequence[Rated]) -> list[str]:
    """How many are kept of the half that ranks higher, and of the others."""
    decided = [
        (scores["rank"], rating.kept)
        for rating, scores in rated
        if rating.kept is not None and "rank" in scores
    ]
    if len(decided) < LEAST:
        return []
    decided.sort(key=lambda one: -one[0])
    half = len(decided) // 2
    better, others = ([kept for _, kept in part] for part in (decided[:half], decided[half:]))
    return [
        f"kept are {sum(better) / len(better):.0%} of the half that ranks higher,"
        f" {sum(others) / len(others):.0%} of the others"
    ]
