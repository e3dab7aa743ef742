"""Ranking: scores of many items after one query, `rank(query, items, model)`."""

from lapilli.pipeline.scorer import SuffixScorer
from lapilli.rank.prompt import RankTemplate
from lapilli.rank.ranker import Ranker, SetwiseRanker, rank
from lapilli.rank.score import Head, Labels, YesNo

__all__ = [
    "Head",
    "Labels",
    "RankTemplate",
    "Ranker",
    "SetwiseRanker",
    "SuffixScorer",
    "YesNo",
    "rank",
]
