"""Answers: the choices of one request as the engine makes them, with counts and times.

AsyncAnswer, ... -> Delta, Delta, Finished of every choice; Usage, Timings
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from lapilli.generate.engine.async_engine import AsyncAnswer
from lapilli.generate.output import FinishReason, Generation, TokenLogprob


def new_id(kind: str) -> str:
    """Return an id that nothing else has, after what it is of: `chatcmpl-...`, `msg_...`."""
    return f"{kind}{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Delta:
    """More of one choice."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice."""

    index: int
    reason: FinishReason
    generation: Generation


@dataclass(slots=True)
class Usage:
    """Counts of tokens, exact: pictures as the positions that they take.

    Attributes:
        prompt: tokens of the prompt, visual ones included.
        visual: those of pictures and other media.
        cached: those of the prompt that were not computed again.
        completion: generated tokens of all choices.
    """

    prompt: int = 0
    visual: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(slots=True)
class Timings:
    """Seconds of a request: waiting for blocks, until the first token, and in all."""

    queue: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


class Answers:
    """The choices of one request, as they come.

    Use it as an asynchronous iterator inside `async with`: leaving the block ends what is not
    finished, within one step of the engine.

    Args:
        answers: of the engine, one for each choice.
        started: the time of the request, of `time.monotonic`.
        usage: with the counts of the prompt.
        on_end: called once when all choices are finished, not when one fails or is cancelled.
    """

    def __init__(
        self,
        answers: Sequence[AsyncAnswer | Generation],
        started: float,
        usage: Usage,
        on_end: Callable[["Answers"], None],
    ) -> None:
        self._answers = answers
        self._started = started
        self._on_end = on_end
        self.usage = usage
        self.timings = Timings()
        self.reason = "cancelled"

    async def __aenter__(self) -> "Answers":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every choice that is not finished."""
        for answer in self._answers:
            if isinstance(answer, AsyncAnswer):
                answer.close()

    async def collect(self) -> list[Finished]:
        """Return every choice when all are finished."""
        found = [event async for event in self if isinstance(event, Finished)]
        return sorted(found, key=lambda one: one.index)

    async def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        """Yield the events of all choices as they come."""
        streams = [self._events(*one) for one in enumerate(self._answers)]
        async for event in streams[0] if len(streams) == 1 else _merged(streams):
            yield event
        self._on_end(self)

    async def _events(
        self, index: int, answer: AsyncAnswer | Generation
    ) -> AsyncIterator[Delta | Finished]:
        if isinstance(answer, Generation):
            yield Delta(index, answer.text, answer.token_ids, answer.logprobs or ())
            self.usage.completion += len(answer.token_ids)
            generation = answer
        else:
            async for piece in answer:
                if not self.timings.first_token:
                    self._note_first(answer)
                self.usage.completion += len(piece.token_ids)
                if piece.text or piece.token_ids:
                    yield Delta(index, piece.text, piece.token_ids, piece.logprobs)
            generation = answer.handle.generation
            if index == 0:  # the others find what the first one computed
                self.usage.cached = answer.handle.cached_tokens
        self.timings.total = time.monotonic() - self._started
        self.reason = generation.finish_reason
        yield Finished(index, generation.finish_reason, generation)

    def _note_first(self, answer: AsyncAnswer) -> None:
        now = time.monotonic()
        self.timings.first_token = now - self._started
        admitted = answer.handle.admitted_at
        self.timings.queue = (now if admitted is None else admitted) - self._started


async def _merged(
    streams: Sequence[AsyncIterator[Delta | Finished]],
) -> AsyncIterator[Delta | Finished]:
    """Yield the events of several choices as they come."""

    async def following(stream: AsyncIterator[Delta | Finished]) -> Delta | Finished | None:
        return await anext(stream, None)

    waiting = {asyncio.create_task(following(stream)): stream for stream in streams}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                event = task.result()
                stream = waiting.pop(task)
                if event is not None:
                    yield event
                    waiting[asyncio.create_task(following(stream))] = stream
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
