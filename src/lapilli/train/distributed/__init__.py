"""Several processes that train one model: who reads what, what is summed, what is shared."""

from lapilli.train.distributed.context import ALONE, Team
from lapilli.train.distributed.heartbeat import ProcessLostError
from lapilli.train.distributed.join import Seat, join_team, joined, seat_of

__all__ = ["ALONE", "ProcessLostError", "Seat", "Team", "join_team", "joined", "seat_of"]
