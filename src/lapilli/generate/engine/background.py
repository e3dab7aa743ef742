"""An engine at work in a thread of its own, for programs that wait for many answers with asyncio.

    async for piece in engine.submit(request)     one task per request, one thread for the model

Knows tickets and event loops; must not know the model.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from types import TracebackType

from lapilli.errors import GenerationError
from lapilli.generate.engine.engine import Engine
from lapilli.generate.engine.request import Request, Ticket
from lapilli.generate.outputs import Generation, Piece


class AsyncEngine:
    """Answers as asynchronous iterators.

    While it is open nobody else may call `step`, `run` or `stream` of the engine.

    Args:
        engine: does the work.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._slots = asyncio.Semaphore(engine.options.max_waiting)
        self._has_news = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="lapilli-engine", daemon=True)
        self._thread.start()

    async def submit(
        self, request: Request, *, ticket: Ticket | None = None, wait: bool = True
    ) -> AsyncIterator[Piece]:
        """The answer, piece by piece.

        A task that is cancelled, or an iterator that is closed, cancels the request: what somebody
        who has hung up had asked for is not computed to its end. A slow reader gets longer pieces.

        Args:
            request: what to answer.
            ticket: a new one; has the finished answer afterwards.
            wait: for a place when `max_waiting` requests are on their way; else refuse.

        Raises:
            GenerationError: no place and `wait` is False, or the engine is closed.
            LapilliError: what `Engine.submit` raises, and what goes wrong with the request.
        """
        ticket = ticket or Ticket(request)
        if not wait and self._slots.locked():
            raise GenerationError(
                f"{self.engine.options.max_waiting} requests are on their way, the limit: try "
                "again later"
            )
        async with self._slots:
            news = asyncio.Event()
            ticket.wake = Waker(asyncio.get_running_loop(), news)
            try:
                await self._submit(request, ticket)
                while True:
                    await news.wait()
                    news.clear()
                    is_finished = ticket.is_finished  # asked first: a piece may come between
                    while (piece := ticket.take()) is not None:
                        yield piece
                    if is_finished:
                        return
            finally:
                if not ticket.is_finished:
                    ticket.cancel()
                    self._has_news.set()

    async def answer(self, request: Request) -> Generation:
        """The whole answer; raises what `submit` raises."""
        ticket = Ticket(request)
        async for _ in self.submit(request, ticket=ticket):
            pass
        return ticket.generation

    def close(self) -> None:
        """End the thread after the step that it is in; requests that are not finished fail."""
        self._is_closing = True
        self._has_news.set()
        self._thread.join()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    async def _submit(self, request: Request, ticket: Ticket) -> None:
        # In a thread: a large picture takes milliseconds to be hashed.
        await asyncio.to_thread(self.engine.submit, request, ticket=ticket)
        self._has_news.set()
        if not self._thread.is_alive():
            self.engine.abandon(GenerationError("the engine is closed"))

    def _work(self) -> None:
        try:
            while not self._is_closing:
                self._has_news.wait()
                self._has_news.clear()
                while self.engine.has_work and not self._is_closing:
                    self._step()
        finally:  # whatever ended this thread, nobody may wait for ever
            self.engine.abandon(GenerationError("the engine is closed"))

    def _step(self) -> None:
        try:
            self.engine.step()
        except RuntimeError:
            # The requests of this step know; those after it may fare better.
            return


class Waker:
    """Sets an event of asyncio from another thread, as long as there is a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        self._loop = loop
        self._event = event

    def __call__(self) -> None:
        """Set it."""
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed, nobody reads any more
            return
