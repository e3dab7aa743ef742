"""Several processes that train one model: who reads what, what is summed, what is shared."""

from lapilli.train.parallel.join import Seat, join_team, joined, seat_of
from lapilli.train.parallel.presence import ProcessLostError
from lapilli.train.parallel.team import ALONE, Team

__all__ = ["ALONE", "ProcessLostError", "Seat", "Team", "join_team", "joined", "seat_of"]
