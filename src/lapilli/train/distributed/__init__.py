"""Several processes that train one model: who reads what, what is summed, what is shared."""

from lapilli.train.distributed.context import SINGLE_PROCESS, ParallelContext
from lapilli.train.distributed.process_group import (
    ProcessLostError,
    RankInfo,
    joined,
    rank_info_of,
)

__all__ = [
    "SINGLE_PROCESS",
    "ParallelContext",
    "ProcessLostError",
    "RankInfo",
    "joined",
    "rank_info_of",
]
