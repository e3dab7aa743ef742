"""One answer of an engine, pulled piece by piece by its reader: twin of generate.run.Stream."""

from collections.abc import Callable, Iterator

from lapilli.generate.engine.request import Request, Ticket
from lapilli.generate.outputs import Generation, Piece


class EngineStream(Iterator[Piece]):
    """Submits its request when the first piece is asked for, and lets the engine work for it.

    `close` cancels.

    Args:
        request: what to answer.
        submit: gives the request to the engine.
        work: works until there is something to read.
        leave: lets go of a request that nobody waits for.
    """

    def __init__(
        self,
        request: Request,
        *,
        submit: Callable[[Ticket], object],
        work: Callable[[Callable[[], bool]], object],
        leave: Callable[[Ticket], None],
    ) -> None:
        self.ticket = Ticket(request)
        self._submit = submit
        self._work = work
        self._leave = leave
        self._is_submitted = False

    def __next__(self) -> Piece:
        """The next piece.

        Raises:
            LapilliError: what is wrong with the request.
        """
        if not self._is_submitted:
            self._is_submitted = True  # first: an interrupt must not leave behind what nobody knows
            self._submit(self.ticket)
        while True:
            is_finished = self.ticket.is_finished  # asked first: a piece may come between
            piece = self.ticket.take()
            if piece is not None:
                return piece
            if is_finished:
                raise StopIteration
            self._work(lambda: self.ticket.has_news)

    def close(self) -> None:
        """Cancel what has not been generated yet."""
        self.ticket.cancel()
        if self._is_submitted and not self.ticket.is_finished:
            self._leave(self.ticket)

    @property
    def generation(self) -> Generation:
        """The answer so far; asked before its end, the answer is cancelled.

        Raises:
            LapilliError: what went wrong with the request.
            RuntimeError: it was never begun.
        """
        self.close()
        return self.ticket.generation
