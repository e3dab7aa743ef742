"""Many requests through an engine, each handed out as soon as it is finished; errors too."""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Protocol, runtime_checkable

from lapilli.errors import LapilliError
from lapilli.generate.engine.request import Request, Ticket
from lapilli.generate.outputs import Generation


@runtime_checkable
class Works(Protocol):
    """What is asked of an engine here."""

    def submit(self, request: Request, *, ticket: Ticket | None = None) -> Ticket:
        """Take a request."""

    def step(self) -> bool:
        """Work."""

    def leave(self, tickets: Iterable[Ticket]) -> None:
        """Let go of requests that nobody waits for any more."""


def answer_as_completed(
    engine: Works, requests: Iterable[Request], *, most: int
) -> Iterator[tuple[int, Generation | LapilliError]]:
    """Number and answer of every request.

    Args:
        engine: does the work.
        requests: taken when there is room.
        most: requests that are on their way at the same time.
    """
    source = enumerate(requests)
    tickets: dict[int, Ticket] = {}
    try:
        while True:
            for number, request in islice(source, most - len(tickets)):
                tickets[number] = _submit(engine, request)
            if not tickets:
                return
            _step(engine, tickets.values())
            for number, ticket in list(tickets.items()):
                if ticket.is_finished:
                    del tickets[number]
                    yield number, ticket.error or ticket.generation
    finally:
        engine.leave(tickets.values())


def _submit(engine: Works, request: Request) -> Ticket:
    """A ticket in any case."""
    ticket = Ticket(request)
    try:
        return engine.submit(request, ticket=ticket)
    except LapilliError as error:
        ticket.fail(error)
        return ticket


def _step(engine: Works, tickets: Collection[Ticket]) -> None:
    """A step, unless one of these is finished; its failure belongs to those that it failed."""
    if any(ticket.is_finished for ticket in tickets):
        return
    try:
        engine.step()
    except RuntimeError:
        if not any(ticket.is_finished for ticket in tickets):
            raise
