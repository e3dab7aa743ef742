"""Answers as asynchronous iterators: many tasks, one thread for the model, cancellation, limits."""

import asyncio
import dataclasses
import threading

import pytest

from lapilli.errors import (
    BusyError,
    ClosedError,
    ContextTooLongError,
    FusionError,
    GenerationError,
    RequestError,
)
from lapilli.generate.engine import AsyncEngine, Engine, RequestHandle
from tests.generate.engine.agreement import assert_same
from tests.generate.engine.conftest import SMALL, alone, picture, request_of

WAIT = 60


def run(steps):
    return asyncio.run(asyncio.wait_for(steps, WAIT))


@pytest.mark.slow
def test_many_tasks_at_once(engine, model):
    requests = [request_of([i, picture(i % 3), 2], max_new_tokens=3 + i) for i in range(1, 9)]

    async def ask():
        async with AsyncEngine(engine) as service:
            return await asyncio.gather(*(service.answer(request) for request in requests))

    for request, answer in zip(requests, run(ask()), strict=True):
        assert_same(answer, alone(model, request), model, request)


def test_pieces_are_the_answer(engine, model):
    request = request_of([3], max_new_tokens=20)

    async def ask():
        async with AsyncEngine(engine) as service:
            return [piece async for piece in service.submit(request)]

    pieces = run(ask())
    assert "".join(piece.text for piece in pieces) == alone(model, request).text
    assert pieces[-1].finish_reason == "length"


def test_a_closed_iterator_cancels_its_request(engine):
    async def ask():
        async with AsyncEngine(engine) as service:
            handle = RequestHandle(request_of([3], max_new_tokens=100))

            async def read():
                async for _ in service.submit(handle.request, handle=handle):
                    pass

            task = asyncio.create_task(read())
            while not handle.request.prompt or not engine.has_work:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not handle.is_finished:
                await asyncio.sleep(0.001)
            return handle

    handle = run(ask())
    assert handle.generation.finish_reason == "cancelled"
    assert engine.pool.available == engine.pool.capacity


def test_an_error_is_raised_in_its_own_task_only(engine, model):
    good = request_of([3, picture(1)])
    bad = dataclasses.replace(good, media=(picture(1, 4),))
    long = request_of(list(range(1, 60)) * 3)

    async def ask():
        async with AsyncEngine(engine) as service:
            return await asyncio.gather(
                *(service.answer(request) for request in (good, bad, long)),
                return_exceptions=True,
            )

    answers = run(ask())
    assert_same(answers[0], alone(model, good), model, good)
    assert isinstance(answers[1], FusionError)
    assert isinstance(answers[2], ContextTooLongError)


def test_failing_step_does_not_end_the_thread(engine, monkeypatch):
    def out_of_memory(*_, **__):
        raise RuntimeError("no memory left")

    async def ask():
        async with AsyncEngine(engine) as service:
            with monkeypatch.context() as patch:
                patch.setattr(engine.model.language_model, "logits", out_of_memory)
                with pytest.raises(GenerationError, match="no memory left"):
                    await service.answer(request_of([3]))
            return await service.answer(request_of([3]))

    assert len(run(ask()).token_ids) == 8


@pytest.mark.slow
def test_open_requests_are_limited(model, tokenizer):
    engine = Engine(model, tokenizer, options=dataclasses.replace(SMALL, max_waiting=2))

    async def ask():
        async with AsyncEngine(engine) as service:
            tasks = [
                asyncio.create_task(service.answer(request_of([i], max_new_tokens=30)))
                for i in range(1, 6)
            ]
            await asyncio.sleep(0)
            with pytest.raises(BusyError, match="2 requests are on their way"):
                async for _ in service.submit(request_of([7]), wait=False):
                    pass
            return await asyncio.gather(*tasks)  # the others waited for their turn

    assert len(run(ask())) == 5


def test_closed_engine_refuses(engine):
    before = set(threading.enumerate())

    async def ask():
        service = AsyncEngine(engine)
        waiting = asyncio.create_task(service.answer(request_of([3], max_new_tokens=120)))
        while not engine.has_work:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(service.close)
        with pytest.raises(ClosedError, match="the engine is closed"):
            await waiting
        with pytest.raises(ClosedError, match="the engine is closed"):
            await service.answer(request_of([3]))

    run(ask())
    new = set(threading.enumerate()) - before
    assert not any(thread.name == "lapilli-engine" for thread in new)


@pytest.mark.slow
def test_slow_reader_gets_longer_pieces(engine, model):
    request = request_of([3], max_new_tokens=20)

    async def ask():
        async with AsyncEngine(engine) as service:
            pieces = []
            async for piece in service.submit(request):
                pieces.append(piece)
                while engine.has_work:
                    await asyncio.sleep(0.001)
            return pieces

    pieces = run(ask())
    assert len(pieces) <= 3
    assert "".join(piece.text for piece in pieces) == alone(model, request).text


@pytest.mark.slow
def test_a_malformed_request_ends_its_own_task_only(engine, model):
    good = request_of([3, picture(1)])
    bad = dataclasses.replace(good, prompt=dataclasses.replace(good.prompt, input_ids=[99] * 4))

    async def ask():
        async with AsyncEngine(engine) as service:
            answers = await asyncio.gather(
                *(service.answer(request) for request in (good, bad, good)), return_exceptions=True
            )
            return [*answers, await service.answer(good)]

    answers = run(ask())
    assert isinstance(answers[1], RequestError)
    for answer in (answers[0], answers[2], answers[3]):
        assert_same(answer, alone(model, good), model, good)


def test_any_error_of_a_step_does_not_end_the_thread(engine, monkeypatch):
    def broken(*_, **__):
        raise IndexError("anything")

    async def ask():
        async with AsyncEngine(engine) as service:
            for name in ("logits", "embed"):
                with monkeypatch.context() as patch:
                    patch.setattr(engine.model.language_model, name, broken)
                    with pytest.raises(GenerationError, match="anything"):
                        await service.answer(request_of([3]))
            return await service.answer(request_of([3]))

    assert run(ask()).finish_reason == "length"


@pytest.mark.slow
def test_two_event_loops_share_the_slots(engine, model):
    """More tasks than places, in two loops of two threads: all are answered."""
    engine = Engine(
        engine.model, engine._inputs._tokenizer, options=dataclasses.replace(SMALL, max_waiting=2)
    )
    service = AsyncEngine(engine)
    requests = [request_of([i], max_new_tokens=5) for i in range(1, 9)]
    found = []

    async def ask():
        found.append(await asyncio.gather(*(service.answer(request) for request in requests)))

    threads = [threading.Thread(target=lambda: run(ask()), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    service.close()
    assert len(found) == 2
    for answers in found:
        for answer, request in zip(answers, requests, strict=True):
            assert_same(answer, alone(model, request), model, request)


@pytest.mark.slow
def test_a_task_that_waits_for_a_slot_can_be_cancelled(engine):
    engine = Engine(
        engine.model, engine._inputs._tokenizer, options=dataclasses.replace(SMALL, max_waiting=1)
    )

    async def ask():
        async with AsyncEngine(engine) as service:
            long = asyncio.create_task(service.answer(request_of([3], max_new_tokens=100)))
            await asyncio.sleep(0.01)
            waits = [asyncio.create_task(service.answer(request_of([i]))) for i in (4, 5)]
            await asyncio.sleep(0.01)
            waits[0].cancel()
            return [await long, await waits[1]]

    assert all(answer.finish_reason == "length" for answer in run(ask()))


@pytest.mark.slow
def test_a_closed_engine_leaves_the_requests_of_others_alone(engine, model):
    mine = request_of([3], max_new_tokens=20)
    handle = engine.submit(mine)
    AsyncEngine(engine).close()
    while engine.step():
        pass
    assert_same(handle.generation, alone(model, mine), model, mine)


@pytest.mark.slow
def test_a_service_and_a_chat_use_one_engine(engine, model):
    requests = [request_of([i], max_new_tokens=9) for i in range(1, 7)]
    found = []

    async def ask():
        async with AsyncEngine(engine) as service:
            return await asyncio.gather(*(service.answer(request) for request in requests))

    other = threading.Thread(target=lambda: found.extend(engine.run(requests)), daemon=True)
    other.start()
    found.extend(run(ask()))
    other.join(WAIT)
    for answer, request in zip(found, [*requests, *requests], strict=True):
        assert_same(answer, alone(model, request), model, request)
