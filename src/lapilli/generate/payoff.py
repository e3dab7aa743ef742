"""Which guesses are worth their place in a pass: tokens expected over seconds expected.

    cost     median of the last such passes by the clock, or from the sizes next to it
    offer    takes a guess while (tokens + chance) / cost of one more > tokens / cost

Knows numbers of positions and seconds; must not know where guesses come from.
"""

from collections import deque
from collections.abc import Callable
from time import perf_counter

FIXED = 10
"""A pass that was never timed is taken to cost as much as so many positions, and its positions."""
REMEMBERED = 9
"""Passes of one size whose middle counts: one that was held up does not."""
MEMORY = 500
"""Passes after which a size that did not come again is forgotten, so that it may be tried."""


class Payoff:
    """What passes of growing rows take, with guesses and without.

    Args:
        clock: seconds.
        is_timed: whether the clock is asked; else what is assumed holds for good.
    """

    def __init__(self, *, clock: Callable[[], float] = perf_counter, is_timed: bool = True) -> None:
        self.clock = clock
        self._is_timed = is_timed
        self._passes = 0
        self._timed: dict[int, dict[int, _Timed]] = {}

    def offer(self, rows: int) -> "Offer":
        """The next pass of so many growing rows, without guesses yet.

        One without guesses comes first, to compare with.
        """
        return Offer(rows, lambda guesses: self.cost(rows, guesses))

    def cost(self, rows: int, guesses: int) -> float | None:
        """Seconds of a pass; where it is not timed, in positions. None: nothing to go by.

        Between two sizes that came it rises evenly; a pass does not take longer than larger ones.
        """
        if not self._is_timed:
            return float(FIXED + rows + guesses)
        timed = self._timed.get(rows, {})
        if 0 not in timed:
            return None
        less = max(size for size in timed if size <= guesses)
        cost = timed[less].middle
        larger = [size for size in timed if size > guesses]
        if not larger:
            return cost * (FIXED + rows + guesses) / (FIXED + rows + less)
        more = min(larger)
        cost += (timed[more].middle - cost) * (guesses - less) / (more - less)
        return min([cost, *(timed[size].middle for size in larger)])

    def learn(self, seconds: float, *, rows: int, guesses: int) -> None:
        """What a pass took.

        Args:
            seconds: with everything that was done for it.
            rows: sequences that grew.
            guesses: that were checked in it.
        """
        if not self._is_timed:
            return
        self._passes += 1
        assumed = self.cost(rows, guesses)
        timed = self._timed.setdefault(rows, {})
        for size in [s for s, one in timed.items() if self._passes - one.last > MEMORY]:
            del timed[size]
        if guesses not in timed:
            # What was assumed counts as one: a first pass is often slow, or held up.
            timed[guesses] = _Timed(seconds if assumed is None else assumed)
        timed[guesses].add(seconds, now=self._passes)


class _Timed:
    """The last passes of one size."""

    def __init__(self, seconds: float) -> None:
        self._seconds = deque([seconds], maxlen=REMEMBERED)
        self.middle = seconds
        self.last = 0

    def add(self, seconds: float, *, now: int) -> None:
        self._seconds.append(seconds)
        self.middle = sorted(self._seconds)[(len(self._seconds) - 1) // 2]
        self.last = now


class Offer:
    """One pass while guesses are collected for it.

    Args:
        rows: each gives a token in any case.
        cost: of a pass with so many guesses.
    """

    def __init__(self, rows: int, cost: Callable[[int], float | None]) -> None:
        self._cost = cost
        self._tokens = float(rows)
        self._guesses = 0
        self._now = cost(0)

    def takes(self, chance: float) -> bool:
        """Whether one more guess makes tokens come faster; then it is counted.

        Args:
            chance: that it is right, and those before it of its sequence.
        """
        cost = self._cost(self._guesses + 1)
        if self._now is None or cost is None:
            return False
        tokens = self._tokens + chance
        if tokens * self._now <= self._tokens * cost:
            return False
        self._tokens, self._now = tokens, cost
        self._guesses += 1
        return True
