"""Threads that clients share: turns, work that nobody waits for any more, and the end."""

import asyncio
import threading

import pytest

from lapilli.errors import BusyError, ClosedError
from lapilli.prompt.guard import check_work, guarded
from lapilli.serve import pool as pools
from lapilli.serve.errors import ApiError
from lapilli.serve.pool import Pool


def allow(text: str, letters: int) -> None:
    """Allow every text."""


class Busy:
    """A pool of one thread that is busy until it is let go."""

    def __init__(self, waiting: int = 9) -> None:
        self.pool = Pool("test", 1, waiting, allow)
        self.free = threading.Event()
        self.started = threading.Event()
        self.order: list[str] = []

    def block(self) -> None:
        self.started.set()
        self.free.wait(30)

    async def begin(self) -> "asyncio.Task[None]":
        task = asyncio.create_task(self.pool.run(self.block))
        await asyncio.to_thread(self.started.wait, 30)
        return task


async def settled(is_true) -> None:
    for _ in range(3000):
        if is_true():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come about")


def test_work_whose_client_left_does_not_begin():
    async def main() -> None:
        busy = Busy()
        first = await busy.begin()
        left = asyncio.create_task(busy.pool.run(busy.order.append, "left"))
        stays = asyncio.create_task(busy.pool.run(busy.order.append, "stays"))
        await settled(lambda: busy.pool.num_waiting == 2)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert busy.pool.num_waiting == 1
        busy.free.set()
        await asyncio.gather(first, stays)
        assert busy.order == ["stays"]
        busy.pool.close()

    asyncio.run(main())


def test_work_that_has_begun_ends_at_its_next_text():
    ended: list[BaseException] = []
    begun, over = threading.Event(), threading.Event()

    def endless() -> None:
        begun.set()
        try:
            while True:
                check_work("a text")
        except BaseException as error:
            ended.append(error)
            over.set()
            raise

    async def main() -> None:
        pool = Pool("test", 1, 9, allow)
        task = asyncio.create_task(pool.run(endless))
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await asyncio.to_thread(over.wait, 30)
        await settled(lambda: pool.num_running == 0)
        pool.close()

    asyncio.run(main())
    assert isinstance(ended[0], ApiError)
    assert ended[0].status == 499


def test_clients_take_turns_however_much_one_of_them_asks(monkeypatch):
    client = "a"
    monkeypatch.setattr(pools, "client_of_request", lambda: client)

    async def main() -> list[str]:
        nonlocal client
        busy = Busy()
        tasks = [await busy.begin()]
        tasks += [asyncio.create_task(busy.pool.run(busy.order.append, "a")) for _ in range(5)]
        await settled(lambda: busy.pool.num_waiting == 5)
        client = "b"
        tasks += [asyncio.create_task(busy.pool.run(busy.order.append, "b")) for _ in range(2)]
        await settled(lambda: busy.pool.num_waiting == 7)
        busy.free.set()
        await asyncio.gather(*tasks)
        busy.pool.close()
        return busy.order

    assert asyncio.run(main()) == ["a", "b", "a", "b", "a", "a", "a"]


def test_small_requests_of_one_address_pass_large_ones_which_come_too(monkeypatch):
    size = 0
    monkeypatch.setattr(pools, "size_of_request", lambda: size)

    async def main() -> list[str]:
        nonlocal size
        busy = Busy()
        tasks = [await busy.begin()]
        for name in ["large"] * 2 + ["small"] * 6:
            size = 9_000_000 if name == "large" else 10
            tasks.append(asyncio.create_task(busy.pool.run(busy.order.append, name)))
            await settled(lambda: busy.pool.num_waiting == len(tasks) - 1)
        busy.free.set()
        await asyncio.gather(*tasks)
        busy.pool.close()
        return busy.order

    # The one that blocks was the first of four.
    few = ["small"] * 2 + ["large"]
    assert asyncio.run(main()) == [*few, "small", *few, "small"]


def test_more_than_may_wait_are_refused():
    async def main() -> None:
        busy = Busy(waiting=1)
        first = await busy.begin()
        second = asyncio.create_task(busy.pool.run(busy.order.append, "x"))
        await settled(lambda: busy.pool.num_waiting == 1)
        with pytest.raises(BusyError, match="1 requests are waiting"):
            await busy.pool.run(busy.order.append, "y")
        busy.free.set()
        await asyncio.gather(first, second)
        busy.pool.close()

    asyncio.run(main())


def test_the_end_fails_what_runs_and_what_waits_without_waiting_for_threads():
    async def main() -> None:
        busy = Busy()
        tasks = [await busy.begin(), asyncio.create_task(busy.pool.run(busy.order.append, "x"))]
        await settled(lambda: busy.pool.num_waiting == 1)
        busy.pool.close()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in found] == [ClosedError, ClosedError]
        assert busy.order == []
        busy.free.set()
        with pytest.raises(ClosedError):
            await busy.pool.run(busy.order.append, "y")

    asyncio.run(main())


def test_texts_are_counted_together_for_each_piece_of_work():
    seen: list[tuple[str, int]] = []

    def work() -> None:
        check_work("abc")
        check_work()
        check_work("de")

    async def main() -> None:
        pool = Pool("test", 1, 9, lambda text, letters: seen.append((text, letters)))
        await pool.run(work)
        await pool.run(work)
        pool.close()

    asyncio.run(main())
    assert seen == [("abc", 0), ("de", 3)] * 2


def test_a_guard_counts_inside_of_its_block_alone():
    def refuse(text: str) -> None:
        raise ValueError(text)

    with guarded(refuse), pytest.raises(ValueError, match="long"):
        check_work("long")
    check_work("long")
