"""Scores of a variation: how close it is to its source, and what is wrong with it; see docs/scores.md."""

from pipeline.scores.analysis import Source, analyse_source
from pipeline.scores.copies import shared_share
from pipeline.scores.scores import Scores, score
from pipeline.scores.seams import Seam

__all__ = ["Scores", "Seam", "Source", "analyse_source", "score", "shared_share"]
