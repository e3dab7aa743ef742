"""One Chat, several threads: no wrong answer, no hang, whatever is evicted and cancelled.

LAPILLI_THREAD_ANSWERS=10000 pytest -m slow tests/pipeline/test_threads.py -k ten_thousand
asks that often instead of a hundred times.
"""

import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest

import lapilli
from lapilli import Message, SamplingParams
from lapilli.generate.engine import EngineOptions
from lapilli.pipeline.chat import Chat

NUM_ANSWERS = int(os.environ.get("LAPILLI_THREAD_ANSWERS", "100"))
FEW = SamplingParams(max_new_tokens=4)
QUESTIONS = ("What is in this picture?", "How many objects are there?", "Is there a star?")
PICTURES = [
    np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for number in range(5)
]
ASKED = [(text, picture) for text in QUESTIONS for picture in range(len(PICTURES))]


def load(**options: object) -> Chat:
    """Pebble with room for three questions or so, so that kept ones are evicted all the time."""
    return lapilli.load("pebble", device="cpu", engine=EngineOptions(kv_bytes=3 << 20, **options))


def question(number: int) -> Message:
    text, picture = ASKED[number]
    return Message.user(text, PICTURES[picture])


def in_threads(*works, seconds: float = 60) -> None:
    """Run them at the same time; what one of them raises is raised here."""
    errors = []

    def guarded(work):
        try:
            work()
        except Exception as error:  # noqa: BLE001  raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    if errors:
        raise errors[0]


def ask(chat: Chat, number: int, how: str) -> str:
    """An answer by one of the ways to ask; of one that is cancelled, what it said."""
    message = question(number)
    if how == "answer":
        return chat.answer([message], FEW).text
    if how == "many":
        text, picture = ASKED[number]
        return chat.ask_many([(text, PICTURES[picture])], max_new_tokens=FEW.max_new_tokens)[0]
    if how == "completed":
        [(_, answer)] = chat.as_completed([[message]], FEW)
        return answer.text
    ready = chat.encode([message])
    pieces = chat.engine.stream(chat._backend._request(ready, chat._params(FEW)))
    said = next(pieces).text
    pieces.close()
    return said


@pytest.mark.slow
def test_answers_in_threads_are_those_of_one_thread():
    answer_in_threads(12, ASKED[:5])


@pytest.mark.slow
def test_ten_thousand_answers_in_two_threads():
    answer_in_threads(NUM_ANSWERS, ASKED)


def answer_in_threads(total: int, asked: list[tuple[str, int]]) -> None:
    alone = load()
    right = [ask(alone, number, "answer") for number in range(len(asked))]
    chat, wrong = load(), []

    def work(seed: int) -> None:
        drawn = random.Random(seed)
        for _ in range(total // 2):
            number = drawn.randrange(len(asked))
            how = drawn.choice(["answer", "answer", "many", "completed", "cancel"])
            found, wanted = ask(chat, number, how), right[number]
            if how == "cancel":
                wanted = wanted[: len(found)]
            if found.strip() != wanted.strip():
                wrong.append((how, found, wanted))

    in_threads(lambda: work(1), lambda: work(2), seconds=60 + total)
    assert not wrong
    assert chat.engine.prefix_stats.evictions
    assert not chat.engine.has_work
    assert chat.engine.pool.available == chat.engine.pool.capacity
    assert [ask(chat, number, "answer") for number in range(len(asked))] == right


@pytest.mark.slow
def test_turns_of_a_conversation_follow_each_other():
    """Every answer is the one to the history before it; no turn is lost."""
    chat = load()
    chat.ask("What is in this picture?", PICTURES[0], max_new_tokens=4)

    def work() -> None:
        for text in QUESTIONS:
            chat.ask(text, max_new_tokens=4)

    in_threads(work, work)
    history = chat.history
    assert [message.role for message in history] == ["user", "assistant"] * 7
    for at in range(1, len(history), 2):
        assert load().answer(history[:at], FEW).text.strip() == history[at].text


@pytest.mark.slow
def test_streams_that_are_open_together_all_join_the_history():
    chat = load()
    chat.ask("What is in this picture?", PICTURES[0], max_new_tokens=4)
    before = chat.history
    one, two = chat.stream("Who?", max_new_tokens=4), chat.stream("Where?", max_new_tokens=4)
    next(one)
    inside = chat.ask("Is there a star?", max_new_tokens=4)  # in the middle of both
    second = "".join(two)
    list(one)
    said = [message.text for message in chat.history[len(before) :]]
    assert said[::2] == ["Is there a star?", "Where?", "Who?"]
    assert said[1] == inside
    assert said[3] == second.strip()


def test_a_reset_is_not_undone_by_an_answer_that_was_on_its_way():
    chat = load()
    for options in ((), (PICTURES[1],)):
        pieces = chat.stream("What is in this picture?", *options, max_new_tokens=8)
        next(pieces)
        chat.reset()
        list(pieces)
        assert chat.history == ()
        assert chat.last is None


def test_a_stream_is_closed_from_another_thread():
    chat = load()
    pieces = chat.stream("What is in this picture?", PICTURES[0], max_new_tokens=120)
    begun = threading.Event()

    def read() -> None:
        for _ in pieces:
            begun.set()

    def close() -> None:
        assert begun.wait(30)
        pieces.close()

    in_threads(read, close)
    assert list(pieces) == []
    assert chat.last is not None
    assert not chat.engine.has_work


@pytest.mark.slow
def test_a_prefix_is_saved_and_loaded_while_others_answer(tmp_path):
    chat = load()
    chat.ask("What is in this picture?", PICTURES[0], max_new_tokens=4)
    right, wrong = [ask(load(), number, "answer") for number in range(3)], []

    def work() -> None:
        asked = (0, 1, 2, 0, 1)
        wrong.extend(n for n in asked if ask(chat, n, "answer") != right[n])

    def keep() -> None:
        for _ in range(3):
            chat.ask("What is in this picture?", PICTURES[0], max_new_tokens=4)
            chat.save_prefix(tmp_path / "kept.safetensors")
            chat.load_prefix(tmp_path / "kept.safetensors")

    in_threads(work, keep)
    assert not wrong


def test_threads_that_ask_first_get_one_engine():
    chat, engines = load(), []
    in_threads(*[lambda: engines.append(chat.engine)] * 3)
    assert len(set(map(id, engines))) == 1


FORKED = """
import os, sys, threading, numpy as np, lapilli
chat = lapilli.load("pebble", device="cpu")
picture = np.zeros((64, 64, 3), dtype=np.uint8)
ask = lambda: chat.ask("What is in this picture?", picture, max_new_tokens=4)
right = ask()
ends = threading.Event()
def work():
    while not ends.is_set():
        chat.ask_many([("What?", picture)], max_new_tokens=4)
thread = threading.Thread(target=work)
thread.start()  # so that the lock of the model is likely to be held while the process forks
child = os.fork()
if child == 0:
    os._exit(0 if ask() == right else 3)
_, status = os.waitpid(child, 0)
ends.set()
thread.join()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_answers():
    """It has no thread but one: neither OpenMP's nor the one that held the model."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], timeout=120, check=False)
    assert done.returncode == 0
