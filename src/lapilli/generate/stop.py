"""Where an answer ends: stop strings, found across token borders; knows text only, no torch.

A text that might still become a stop string is held back, so nobody ever sees a part of one.
"""

from collections.abc import Sequence


class StopStrings:
    """Cuts a growing text before the stop string that is completed first.

    The result does not depend on how the text is cut into pieces: among several stop strings the
    one that ends first counts, and of those the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is now certain and has not been returned before."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        kept = self._forming(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _forming(self, text: str) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
