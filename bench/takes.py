"""What the dial `similarity` and the choice among takes are worth, with an engine that needs no weights.

    python bench/takes.py FILE FILE …

Two tables, means over the files:

- the measured similarity of results of 30 s for settings of the dial from 0 to 1;
- each measure of the take that ranks highest of SIX, and of a take chosen at random (the mean of the six).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline import audio, stages  # noqa: E402
from pipeline.config import Gates, Normalize, Output  # noqa: E402
from pipeline.config.sweeps import complete_params  # noqa: E402
from pipeline.engines import cards  # noqa: E402
from pipeline.engines.base import Embedder, EngineSettings, Generator  # noqa: E402
from pipeline.executors.judge import ScoringJudge, Verdict  # noqa: E402
from pipeline.records import Audio, Variation, VariationRequest  # noqa: E402

ENGINE = "remix"
LENGTH_S = 30.0
DIAL = (0.0, 0.25, 0.5, 0.75, 1.0)
SIX = 6
MEASURES = (
    "similarity",
    "chroma",
    "chroma_warped",
    "embedding",
    "key_agreement",
    "tempo_agrees",
    "worst_seam",
)
MEASURES += ("joins", "silent_share", "clipped_share")


class NoModels:
    """Engines for a judge that needs none."""

    def embedder(self) -> Embedder:
        raise NotImplementedError

    def generator(self) -> Generator:
        raise NotImplementedError

    def rater(self) -> None:
        return None


def main(paths: Sequence[str]) -> None:
    sources = [_source(path) for path in paths]
    dial = [[_similarities(source, setting) for setting in DIAL] for source in sources]
    print(f"| `similarity` | {' | '.join(f'{setting:g}' for setting in DIAL)} |")
    print("|---|" + "---|" * len(DIAL))
    print(f"| measured | {' | '.join(f'{mean:.3f}' for mean in np.mean(dial, axis=(0, 2)))} |\n")
    print(f"| measure | best of {SIX} | one at random |\n|---|---|---|")
    chosen = [_best_and_mean(list(_verdicts(source, 0.5, SIX))) for source in sources]
    for measure in (*MEASURES, "rank"):
        both = [[one[measure] for one in pair if measure in one] for pair in chosen]
        best, mean = np.mean([pair for pair in both if len(pair) == 2], axis=0)
        print(f"| {measure} | {best:.3f} | {mean:.3f} |")


def _source(path: str) -> Audio:
    decoded, _ = audio.decode(path, sample_rate=Normalize().sample_rate, limits=audio.DecodeLimits())
    return stages.normalize(decoded, Normalize()).audio


def _similarities(source: Audio, setting: float) -> list[float]:
    return [verdict.scores["similarity"] for verdict in _verdicts(source, setting, 3)]


def _verdicts(source: Audio, similarity: float, n: int) -> Iterator[Verdict]:
    """What the judge finds about results with the seeds 1 to n."""
    card, judge = cards()[ENGINE], ScoringJudge(NoModels(), lambda: False)
    reference, params = judge.analyse(source), complete_params(card, {}, similarity)
    requests = [VariationRequest(str(seed), "", source, LENGTH_S, seed, params) for seed in range(1, n + 1)]
    generator = card.load(EngineSettings(sample_rate=source.sample_rate))
    for made in generator.generate(requests, progress=lambda *_: None, should_stop=lambda: False):
        assert isinstance(made, Variation), made
        finished = stages.finish(made, requests[0], Output(), length_s=LENGTH_S, source_lufs=-14.0)
        yield judge.judge(reference, finished, Gates(), "")


def _best_and_mean(verdicts: Sequence[Verdict]) -> tuple[dict[str, float], dict[str, float]]:
    every = [_measures(verdict) for verdict in verdicts]
    best = max(range(len(verdicts)), key=lambda n: verdicts[n].rank)
    names = [name for name in every[0] if all(name in one for one in every)]
    return every[best], {name: float(np.mean([one[name] for one in every])) for name in names}


def _measures(verdict: Verdict) -> dict[str, float]:
    """The measures that are there, as numbers; joins by their mean, the worst seam by its quality."""
    scores = verdict.scores
    joins = [join["quality"] for join in scores["joins"]]
    flat = {**scores, "worst_seam": scores["worst_seam"]["quality"], "rank": verdict.rank}
    flat["joins"] = float(np.mean(joins)) if joins else None
    return {name: float(flat[name]) for name in (*MEASURES, "rank") if flat[name] is not None}


if __name__ == "__main__":
    main(sys.argv[1:])
