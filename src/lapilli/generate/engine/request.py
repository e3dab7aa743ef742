"""What goes into an engine and what comes out while it works; knows no model.

Request --submit--> Ticket: take() the pieces, cancel(), generation
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lapilli.config.generation import SamplingParams
from lapilli.errors import LapilliError, RequestError
from lapilli.generate.outputs import Generation, Piece
from lapilli.prompt.encode import EncodedPrompt

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to answer it.

    Attributes:
        prompt: ids and spans.
        media: per span what its modality prepared, or features [n, D].
        params: how to choose tokens and when to stop; no beams.
        seen_ids: what the repetition penalty counts as seen, see `generate`.
        priority: a higher one is begun and read before all lower ones.
    """

    prompt: EncodedPrompt
    media: tuple[Any, ...] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    seen_ids: Sequence[int] | None = None
    priority: int = 0


class Ticket:
    """A request on its way. The engine writes, one reader reads, in any threads.

    A slow reader does not make a queue grow: what settled since its last `take` is one piece.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.is_cancelled = False
        self.wake: Callable[[], None] = _nobody
        """Called when there is something to take, by a thread that has taken a step; the engine is
        free by then, so it may be asked and told anything. What it raises goes to the log."""
        self.keys: tuple[int, ...] = ()
        """When it is finished, what stands at the positions that were read (Engine.save_prefix)."""
        self._lock = threading.Lock()
        self._is_submitted = False
        self._waiting: list[Piece] = []
        self._generation: Generation | None = None
        self._error: LapilliError | None = None

    def cancel(self) -> None:
        """Stop at the next step; what was said until then is the answer."""
        self.is_cancelled = True

    @property
    def is_finished(self) -> bool:
        """Whether nothing more comes, an error included."""
        return self._generation is not None or self._error is not None

    @property
    def has_news(self) -> bool:
        """Whether `take` or `generation` has something to say."""
        return bool(self._waiting) or self.is_finished

    @property
    def error(self) -> LapilliError | None:
        """Why there is no answer."""
        return self._error

    @property
    def generation(self) -> Generation:
        """The finished answer.

        Raises:
            LapilliError: what went wrong with this request.
            RuntimeError: it is not finished.
        """
        if self._error is not None:
            raise self._error
        if self._generation is None:
            raise RuntimeError("this request is not finished")
        return self._generation

    def take(self) -> Piece | None:
        """What settled since the last call; None while there is nothing.

        Raises:
            LapilliError: what went wrong with this request.
        """
        with self._lock:
            pieces, self._waiting = self._waiting, []
        if not pieces:
            if self._error is not None:
                raise self._error
            return None
        return Piece(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.token_ids),
            pieces[-1].finish_reason,
        )

    def claim(self) -> None:
        """Called by the engine that takes it.

        Raises:
            RequestError: one did so before.
        """
        with self._lock:
            if self._is_submitted or self.is_finished:
                raise RequestError(
                    "this ticket was submitted before: make a new one for every request"
                )
            self._is_submitted = True

    def deliver(self, piece: Piece) -> None:
        """Called by the engine: more has settled. Its reader is told after the step."""
        with self._lock:
            self._waiting.append(piece)

    def finish(self, generation: Generation) -> None:
        """Called by the engine: the answer is over."""
        self._generation = generation

    def fail(self, error: LapilliError) -> None:
        """Called by the engine: there will be no answer."""
        self._error = error


def tell(tickets: deque[Ticket]) -> None:
    """Wake the readers of all tickets, whatever some of them raise; takes them off the list.

    An interrupt does not keep the others from being told: nobody may wait for ever.
    """
    try:
        while tickets:
            try:
                _wake(tickets[0])
            finally:
                tickets.popleft()
    finally:
        if tickets:
            tell(tickets)


def _wake(ticket: Ticket) -> None:
    try:
        ticket.wake()
    except Exception:  # foreign code: its error is nobody else's business
        LOG.exception("Ticket.wake raised; the engine goes on")


def _nobody() -> None:
    """Nobody waits to be woken."""
