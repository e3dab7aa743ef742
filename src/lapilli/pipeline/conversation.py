"""A conversation, and one turn of it: a question on its way to an answer, in any threads.

    history as it stands --> question -> Turn -> pieces -> joins the history when it is over

Several turns may be on their way at the same time. Each question follows what the history was when
it was asked; turns join the history in the order in which they end, and none is lost.
Knows replies; must not know how they are made.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from lapilli.errors import LapilliError
from lapilli.generate.engine.request import EngineStream
from lapilli.pipeline.answering import Reply
from lapilli.pipeline.memory import Memory
from lapilli.prompt.message import Message

Keep = Callable[[Reply, bool], None]
"""Keeps a reply that is over; the second says whether it was not interrupted."""


class Turn(Iterator[str]):
    """The answer to one question, in pieces as it settles.

    Closing it, from any thread, or letting go of it stops the answer; what was said of it is kept.

    Args:
        begin: starts the answer; called when the first piece is wanted.
        keep: called when it is over, unless it failed.
    """

    def __init__(self, begin: Callable[[], Reply], keep: Keep) -> None:
        self._is_over = False
        self._begin = begin
        self._keep = keep
        self._lock = threading.RLock()
        self._reply: Reply | None = None

    def __next__(self) -> str:
        """The next piece.

        Raises:
            LapilliError: what went wrong with the answer.
        """
        with self._lock:
            try:
                text = self._pull()
            except Exception:  # whatever it was, there is no more of this answer
                self._is_over = True
                raise
            except BaseException:  # an interrupt: what the answer was made with may be torn
                with suppress(LapilliError, RuntimeError):
                    self._end(is_whole=False)
                raise
            if text is None:
                raise StopIteration
            return text

    def close(self) -> None:
        """Stop here; what was said is the answer."""
        reply = self._reply
        if reply is not None and isinstance(reply.pieces, EngineStream):
            reply.pieces.handle.cancel()  # whoever is pulling a piece now need not end it
        with self._lock:
            self._end()

    def __del__(self) -> None:
        """Nobody reads it any more."""
        if not self._is_over:
            # What it was in the middle of may be in the middle of something else.
            with suppress(LapilliError, RuntimeError):
                self.close()

    def _pull(self) -> str | None:
        """The next piece that has text; None: it is over."""
        if self._reply is None and not self._is_over:
            self._reply = self._begin()
        while not self._is_over and self._reply is not None:
            piece = next(self._reply.pieces, None)
            if piece is None:
                self._end()
            elif piece.text:
                return piece.text
        return None

    def _end(self, *, is_whole: bool = True) -> None:
        was_over, self._is_over = self._is_over, True
        if self._reply is not None and not was_over:
            self._keep(self._reply, is_whole)


@dataclass(slots=True)
class Conversation:
    """What was said, and what need not be computed again of it.

    Attributes:
        number: a later one has a higher number.
        memory: its media.
        history: questions and answers, without the system message.
    """

    number: int = 0
    memory: Memory = field(default_factory=Memory)
    history: tuple[Message, ...] = ()
