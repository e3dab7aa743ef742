"""Many requests through an engine, each handed out as soon as it is finished; errors too."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol, runtime_checkable

from lapilli.errors import LapilliError
from lapilli.generate.engine.request import Request, Ticket
from lapilli.generate.outputs import Generation


@runtime_checkable
class Works(Protocol):
    """What is asked of an engine here."""

    def queue(self, request: Request, *, ticket: Ticket) -> None:
        """Take a request as soon as there is room for it."""

    def work(self, until: Callable[[], bool]) -> None:
        """Work for somebody who waits."""

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
                ticket = tickets[number] = Ticket(request)
                try:
                    engine.queue(request, ticket=ticket)
                except LapilliError as error:
                    ticket.fail(error)
            if not tickets:
                return
            engine.work(lambda: any(ticket.is_finished for ticket in tickets.values()))
            for number, ticket in list(tickets.items()):
                if ticket.is_finished:
                    del tickets[number]
                    yield number, ticket.error or ticket.generation
    finally:
        engine.leave(tickets.values())
