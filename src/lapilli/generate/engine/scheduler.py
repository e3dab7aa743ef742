"""The requests of an engine and how far each has come.

    enter -> inbox --take_in--> waiting --Admission--> rows --remove-->

`enter` and the counts may be asked by any thread, everything else by the one that holds the model.
"""

import threading
from bisect import insort
from collections import deque
from collections.abc import Iterator

from lapilli.generate.engine.sequence import Sequence


class Roster:
    """Where every unfinished sequence is.

    Attributes:
        waiting: those that no block is reserved for, in their order.
        rows: those that have blocks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inbox: deque[Sequence] = deque()
        self.waiting: list[Sequence] = []
        self.rows: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether anybody is here."""
        return bool(self._inbox or self.waiting or self.rows)

    @property
    def num_waiting(self) -> int:
        """Sequences that no block is reserved for yet."""
        return len(self._inbox) + len(self.waiting)

    def enter(self, sequence: Sequence, *, most: int) -> bool:
        """Add a sequence; False where as many as `most` wait already.

        Raises:
            RequestError: its ticket was submitted before.
        """
        with self._lock:
            if self.num_waiting >= most:
                return False
            sequence.ticket.claim()
            self._inbox.append(sequence)
            return True

    def take_in(self) -> None:
        """Let those wait in their order that came since the last call."""
        while self._inbox:
            # In this order: an interrupt may leave it in both places, never in none.
            insort(self.waiting, self._inbox[0], key=lambda sequence: sequence.rank)
            self._inbox.popleft()

    def remove(self, sequence: Sequence) -> None:
        """It is over."""
        for places in (self.waiting, self.rows):
            if sequence in places:
                places.remove(sequence)

    def settle(self) -> None:
        """Give everybody one place again, after a change that was broken off."""
        self.take_in()
        self.rows = [row for row in _once(self.rows) if row.table is not None or row.is_open]
        self.waiting = [one for one in _once(self.waiting) if one not in self.rows]
        for one in self.waiting:
            one.table, one.length = None, 0

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, a copy: they may be removed meanwhile."""
        return iter([*self.rows, *self.waiting])


def _once(sequences: list[Sequence]) -> list[Sequence]:
    return list(dict.fromkeys(sequences))
