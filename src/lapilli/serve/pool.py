"""Pool: threads for what would stall the event loop, shared out fairly among clients.

    Pool.run(function) -> one queue per client, taken in turn -> a thread -> what it returns

Work that its client has left is dropped before it begins, and ends at the next text or pass when it
has begun (prompt/guard.py). The threads hold no process that ends. Knows threads and the client of
a request; must not know what is computed.
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

from lapilli.errors import BusyError, ClosedError
from lapilli.prompt.guard import guarded
from lapilli.serve.connection import STOPPING, client_of_request, size_of_request
from lapilli.serve.errors import ApiError

T = TypeVar("T")

OLDEST: Final = 4
"""Of so many calls one is the oldest of its client, the others are the smallest."""

CheckText = Callable[[str, int], None]
"""Raises where a text may not be read, or where those before it had so many letters together."""


class Job:
    """One call of a function for one client.

    Args:
        work: the function with its arguments.
        check_text: what a text may be.
    """

    def __init__(self, work: Callable[[], object], check_text: CheckText) -> None:
        self.client = client_of_request()
        """Whose turn it takes."""
        self.size = size_of_request()
        """Bytes of the request."""
        self.is_gone = False
        self._work = work
        self._check_text = check_text
        self._letters = 0
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[object] = self._loop.create_future()

    def run(self) -> None:
        """Call the function, and tell the event loop what it returned or raised."""
        if self.is_gone:
            return
        try:
            with guarded(self._check):
                result = self._work()
        except BaseException as error:  # noqa: BLE001 - whoever waits for it is told
            self.settle(error=error)
        else:
            self.settle(result)

    def settle(self, result: object = None, error: BaseException | None = None) -> None:
        """Hand a result or an error to whoever waits for it; from any thread."""

        def tell() -> None:
            if self.future.done():
                return
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)

        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(tell)

    def _check(self, text: str) -> None:
        if self.is_gone:
            raise ApiError(499, "the client has closed the connection", "disconnected")
        if text:
            self._check_text(text, self._letters)
            self._letters += len(text)


class Pool:
    """Threads that work for clients in turn.

    Args:
        name: of the threads.
        workers: how many.
        waiting: calls that may wait for one of them.
        check_text: asked about every text before it is tokenized in one of the threads.
    """

    def __init__(self, name: str, workers: int, waiting: int, check_text: CheckText) -> None:
        self._workers = workers
        self._most_waiting = waiting
        self._check_text = check_text
        self._news = threading.Condition()
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()
        self._running: set[Job] = set()
        self._is_closed = False
        self._name = name
        self._started = 0
        self._taken = 0

    @property
    def num_running(self) -> int:
        """Number of calls that a thread works on."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Number of calls that wait for a thread."""
        with self._news:
            return sum(map(len, self._queues.values()))

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Return what a function returns, called in a thread.

        Cancelling the task drops the call if no thread has begun with it.

        Raises:
            BusyError: too many wait already.
            ClosedError: the threads have ended.
        """
        job = Job(partial(function, *args), self._check_text)
        self._enter(job)
        try:
            return await job.future  # type: ignore[return-value]  # of the function, which is T
        except asyncio.CancelledError:
            self._leave(job)
            raise

    def close(self) -> None:
        """End the threads after the calls that they are in; every call fails with ClosedError."""
        with self._news:
            self._is_closed = True
            jobs = [*self._running, *(job for queue in self._queues.values() for job in queue)]
            self._queues.clear()
            self._news.notify_all()
        for job in jobs:
            job.is_gone = True
            job.settle(error=ClosedError(STOPPING))

    def _enter(self, job: Job) -> None:
        with self._news:
            if self._is_closed:
                raise ClosedError(STOPPING)
            waiting = sum(map(len, self._queues.values()))
            if len(self._running) + waiting >= self._workers + self._most_waiting:
                raise BusyError(f"{waiting} requests are waiting to be read: try again later")
            self._queues.setdefault(job.client, deque()).append(job)
            self._news.notify()
            if self._started < self._workers:
                title = f"lapilli-{self._name}-{self._started}"
                # A daemon: the process may end while a thread computes for nobody.
                threading.Thread(target=self._serve, name=title, daemon=True).start()
                self._started += 1

    def _leave(self, job: Job) -> None:
        job.is_gone = True
        with self._news:
            queue = self._queues.get(job.client)
            if queue is not None and job in queue:
                queue.remove(job)
                if not queue:
                    del self._queues[job.client]

    def _serve(self) -> None:
        while True:
            with self._news:
                while not self._queues and not self._is_closed:
                    self._news.wait()
                if self._is_closed:
                    return
                job = self._next()
                self._running.add(job)
            try:
                job.run()
            finally:
                with self._news:
                    self._running.discard(job)

    def _next(self) -> Job:
        """Return the next call of the client whose turn it is, who then stands last in line.

        Clients behind a proxy look like one: so of its calls the one of the smallest request goes
        first, and every `OLDEST`-th time the oldest, which may be large.
        """
        client, queue = self._queues.popitem(last=False)
        self._taken += 1
        is_oldest = self._taken % OLDEST == 0
        job = queue[0] if is_oldest else min(queue, key=lambda one: one.size)
        queue.remove(job)
        if queue:
            self._queues[client] = queue
        return job
