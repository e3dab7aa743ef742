"""Async engine: an engine in a thread of its own, answers as asynchronous iterators.

    async for piece in engine.submit(request)     one task per request, one thread for the model

Knows request handles and event loops; must not know the model.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType

from lapilli.errors import BusyError, ClosedError
from lapilli.generate.engine.engine import Engine
from lapilli.generate.engine.request import Request, RequestHandle
from lapilli.generate.output import Generation, Piece


class AsyncEngine:
    """Engine for asyncio, in any number of event loops; others may use `engine` meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._slots = Slots(engine.options.max_waiting)
        self._handles: set[RequestHandle] = set()
        self._has_news = threading.Event()
        self._is_closing = False
        self._is_over = False
        self._because = "the engine is closed"
        self._thread = threading.Thread(target=self._work, name="lapilli-engine", daemon=True)
        self._thread.start()

    async def submit(
        self, request: Request, *, handle: RequestHandle | None = None, wait: bool = True
    ) -> AsyncIterator[Piece]:
        """Yield the answer, piece by piece.

        Cancelling the task or closing the iterator cancels the request, so that nothing is computed
        for a client that has disconnected. A slow reader gets longer pieces.

        Args:
            request: what to answer.
            handle: a new one; has the finished answer afterwards.
            wait: for a slot when `max_waiting` requests are open; else refuse.

        Raises:
            BusyError: no slot and `wait` is False.
            ClosedError: the engine is closed.
            LapilliError: the request is invalid (`Engine.submit`) or failed.
        """
        answer = await self.open(request, handle=handle, wait=wait)
        try:
            async for piece in answer:
                yield piece
        finally:
            answer.close()

    async def open(
        self, request: Request, *, handle: RequestHandle | None = None, wait: bool = True
    ) -> "AsyncAnswer":
        """Submit a request and return its answer, which must be closed; raises what `submit` does.

        Whoever asks knows at once whether the request was refused.
        """
        handle = handle or RequestHandle(request)
        if wait:
            await self._slots.acquire()
        elif not self._slots.try_acquire():
            raise BusyError(
                f"{self.engine.options.max_waiting} requests are on their way, the limit: try "
                "again later"
            )
        answer = AsyncAnswer(handle, lambda: self._leave(handle))
        try:
            # In a thread: a large picture takes milliseconds to be hashed.
            await asyncio.to_thread(self._enter, request, handle)
        except BaseException:
            answer.close()
            raise
        return answer

    def _leave(self, handle: RequestHandle) -> None:
        self._slots.release()
        self._handles.discard(handle)
        if not handle.is_finished:
            handle.cancel()
            self._has_news.set()

    async def answer(self, request: Request) -> Generation:
        """Return the whole answer; raises what `submit` does."""
        handle = RequestHandle(request)
        async for _ in self.submit(request, handle=handle):
            pass
        return handle.generation

    @property
    def is_alive(self) -> bool:
        """Return whether the thread runs, so that requests are answered."""
        return self._thread.is_alive() and not self._is_closing

    def close(self, because: str = "the engine is closed") -> None:
        """End the thread after the step that it is in; requests that are not finished fail.

        Args:
            because: what their ClosedError says.
        """
        self._because = because
        self._is_closing = True
        self._has_news.set()
        if threading.current_thread() is not self._thread:
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

    def _enter(self, request: Request, handle: RequestHandle) -> None:
        self._handles.add(handle)
        self.engine.submit(request, handle=handle)
        self._has_news.set()
        # Checked after the request is submitted: either this sees that the thread has ended, or the
        # thread's end sees the request. In a forked process there is no thread.
        if self._is_over or not self._thread.is_alive():
            self._fail_open()

    def _work(self) -> None:
        try:
            while not self._is_closing:
                self._has_news.wait()
                self._has_news.clear()
                while self.engine.has_work and not self._is_closing:
                    with suppress(Exception):  # the requests that it failed know, others go on
                        self.engine.step()
        finally:  # whatever ended this thread, no reader may wait for ever
            self._is_over = True
            self._fail_open()

    def _fail_open(self) -> None:
        self.engine.abort_all(ClosedError(self._because), list(self._handles))


class AsyncAnswer:
    """Answer on its way, as an asynchronous iterator of pieces.

    Args:
        handle: has the finished answer afterwards.
        leave: called once, when the answer is closed.
    """

    def __init__(self, handle: RequestHandle, leave: Callable[[], None]) -> None:
        self.handle = handle
        self._news = asyncio.Event()
        self._leave: Callable[[], None] | None = leave
        handle.wake = waker(asyncio.get_running_loop(), self._news)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        """Return the text that came since the last piece.

        Raises:
            LapilliError: the request failed.
        """
        while True:
            is_finished = self.handle.is_finished  # asked first: a piece may come between
            piece = self.handle.take()
            if piece is not None:
                return piece
            if is_finished:
                raise StopAsyncIteration
            await self._news.wait()
            self._news.clear()

    def close(self) -> None:
        """Let go of it; an answer that is not finished is cancelled within a step."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


def waker(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> Callable[[], None]:
    """Return a callback that sets an event of asyncio from another thread."""

    def wake() -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(event.set)

    return wake


class Slots:
    """Semaphore for tasks of different event loops, first come, first served."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._line: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    def try_acquire(self) -> bool:
        """Acquire a slot without waiting; return False when none is free."""
        with self._lock:
            if not self._free:
                return False
            self._free -= 1
            return True

    async def acquire(self) -> None:
        """Acquire a slot, waiting for it."""
        loop = asyncio.get_running_loop()
        mine = (loop, loop.create_future())
        with self._lock:
            if self._free:
                self._free -= 1
                return
            self._line.append(mine)
        try:
            await mine[1]
        except asyncio.CancelledError:
            with self._lock:
                waits = mine in self._line
                if waits:
                    self._line.remove(mine)
            if not waits:  # it was given a slot meanwhile
                self.release()
            raise

    def release(self) -> None:
        """Release a slot to the next in line."""
        with self._lock:
            while self._line:
                loop, future = self._line.popleft()
                try:
                    loop.call_soon_threadsafe(_grant, future)
                except RuntimeError:  # the loop is closed
                    continue
                return
            self._free += 1


def _grant(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
