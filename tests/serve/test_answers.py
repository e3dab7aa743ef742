"""Answers: events of one choice or several, counted once when all are over."""

import asyncio
import gc

import pytest

from lapilli.errors import GenerationError, ModelFailedError
from lapilli.generate.output import Generation
from lapilli.serve.answers import Answers, Delta, Finished, Usage, new_id
from lapilli.serve.stream import guarded
from lapilli.serve.worker import piece, pieces


def generation(text: str) -> Generation:
    """Return an answer of one token per letter."""
    return Generation(
        text=text, token_ids=tuple(map(ord, text)), finish_reason="stop", prompt_len=3
    )


class Failing(Answers):
    """Answers whose choices from one on fail."""

    first = 0

    async def _events(self, index, answer):
        await asyncio.sleep(0)
        if index >= self.first:
            raise ModelFailedError(f"choice {index}")
        async for one in super()._events(index, answer):
            yield one


def opened(texts, kind=Answers):
    counted = []
    return kind([generation(text) for text in texts], 0.0, Usage(prompt=3), counted.append), counted


async def events_of(answers):
    async with answers:
        return [one async for one in answers]


@pytest.mark.parametrize("texts", [["ab"], ["ab", "c", "def"]])
def test_every_choice_has_its_text_and_its_end(texts):
    answers, counted = opened(texts)
    events = asyncio.run(events_of(answers))
    for index, text in enumerate(texts):
        mine = [one for one in events if one.index == index]
        assert [type(one) for one in mine] == [Delta, Finished]
        assert mine[0].text == text
    assert counted == [answers]
    assert (answers.usage.completion, answers.reason) == (sum(map(len, texts)), "stop")


def test_choices_are_collected_in_their_order():
    answers, _ = opened(["a", "b", "c"])
    found = asyncio.run(answers.collect())
    assert [one.generation.text for one in found] == ["a", "b", "c"]


@pytest.mark.parametrize(("texts", "first"), [(["a"], 0), (["a", "b", "c"], 0), (["a", "b"], 1)])
def test_an_answer_that_fails_is_not_counted(texts, first, caplog):
    answers, counted = opened(texts, Failing)
    answers.first = first
    with pytest.raises(GenerationError, match="choice"):
        asyncio.run(events_of(answers))
    assert counted == []
    gc.collect()
    assert not caplog.records  # nothing that asyncio found unread


def test_an_answer_that_nobody_reads_to_its_end_is_not_counted():
    async def read():
        async with answers:
            stream = aiter(answers)
            assert isinstance(await anext(stream), Delta)
            await stream.aclose()

    answers, counted = opened(["a", "b"])
    asyncio.run(read())
    assert counted == []


def test_the_demo_is_told_of_an_error_in_the_middle():
    async def read():
        found = pieces("Q", answers)
        return [one async for one in guarded(found, lambda error: piece(error.message, 1))]

    answers, _ = opened(["a"], Failing)
    assert asyncio.run(read()) == [b'{"text": "choice 0", "error_code": 1}\0']


def test_ids_are_of_a_kind_and_never_the_same():
    found = {new_id("msg_") for _ in range(100)}
    assert len(found) == 100
    assert all(one.startswith("msg_") and len(one) == 28 for one in found)
