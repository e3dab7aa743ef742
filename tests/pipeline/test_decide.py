"""Answers to many questions about one input are those of every question alone."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lapilli
from lapilli import Chat, MediaPart, Message, TextPart
from lapilli.errors import ContextTooLongError, MediaError, PromptError
from lapilli.pipeline.decide import NO, YES
from lapilli.pipeline.questions import (
    Choice,
    ChoiceAnswer,
    Level,
    Option,
    Predicate,
    PredicateAnswer,
    Refusal,
    Score,
    ScoreAnswer,
)
from lapilli.pipeline.wording import Wording

EXAMPLE = Path(__file__).parents[2] / "examples" / "picture.png"
PICTURES = [
    np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8) for seed in range(3)
]
WORDING = Wording(statement="{question}\nyes or no?")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return lapilli.load("pebble", device="cpu", dtype="float32")


def tokens(chat: Chat, text: str) -> list[int]:
    return chat.tokenizer.encode(text, add_bos=False, literal=[(0, len(text))])


@torch.inference_mode()
def asked_whole(chat: Chat, messages: list[Message], labels: list[list[list[int]]]) -> list[float]:
    """The plain loop: each label's way, one pass over the whole prompt per token of it."""
    prompt = chat.encode(messages)
    ways = [way for ways in labels for way in ways]

    def logits(path: list[int]) -> torch.Tensor:
        encoded = prompt.encoded
        ids, mask = [*encoded.input_ids, *path], [*encoded.loss_mask, *[False] * len(path)]
        longer = type(encoded)(ids, mask, encoded.spans)
        hidden = chat.model(chat.model.embed_prompts([longer], [prompt.media]))
        return chat.model.logits(hidden[:, -1])[0].double()

    def probability(way: list[int]) -> float:
        found = 1.0
        for at, token in enumerate(way):
            here = sorted({one[at] for one in ways if len(one) > at and one[:at] == way[:at]})
            if len(here) > 1:
                found *= float(logits(way[:at])[here].softmax(-1)[here.index(token)])
        return found

    return [sum(map(probability, ways)) for ways in labels]


def yes_no(chat: Chat) -> list[list[list[int]]]:
    found = []
    for words in (YES, NO):
        cut = [tokens(chat, word) for word in words]
        found.append([cut[0], *(ids for ids in cut[1:] if len(ids) == 1 and ids != cut[0])])
    return found


def test_a_question_about_a_picture_has_the_tokens_that_it_has_when_it_is_asked(chat):
    text = "Is there a circle?"
    found = chat.decide(EXAMPLE, [Predicate(text)])
    message = Message.user(text, str(EXAMPLE))
    assert found.prompt_tokens == len(chat.encode([message]).encoded)
    [answer] = found
    assert isinstance(answer, PredicateAnswer)
    expected = asked_whole(chat, [message], yes_no(chat))
    assert sum(expected) == pytest.approx(1)
    assert answer.probability == pytest.approx(expected[0], abs=1e-5)
    assert answer.probability > 0.9  # there is one


def test_answers_are_right_about_a_picture(chat):
    found = chat.decide(
        EXAMPLE,
        [
            Predicate("Is there a red square?", "first"),
            Choice("What shape is the black object?", ["ring", "square", "heart"], spelled=True),
        ],
    )
    assert found[0].probability < 0.1
    assert found[0].name == "first"
    assert found[1].choice == "square"
    assert sum(found[1].probabilities) == pytest.approx(1)
    assert found[1].confidence == max(found[1].probabilities)


def test_labels_of_several_tokens_are_the_product_along_their_way(chat):
    names = ["red", "red square", "green", "a large blue ring"]
    text = "What is there?"
    [found] = chat.decide(EXAMPLE, [Choice(text, names, spelled=True)])
    end = chat.tokenizer.token_to_id(chat.template.stop[0])
    labels = [[[*tokens(chat, name), end]] for name in names]
    expected = asked_whole(chat, [Message.user(text, str(EXAMPLE))], labels)
    assert found.probabilities == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("count", [2, 26, 27, 120])
def test_any_number_of_choices_is_told_apart(chat, count):
    """Up to 26 letters are read, then numbers of several tokens, apart from other questions."""
    question = Choice("Which?", [str(number) for number in range(count)])
    together = chat.decide(EXAMPLE, [Predicate("Is it?"), question, Predicate("Is it red?")])
    [alone] = chat.decide(EXAMPLE, [question])
    assert together[1].probabilities == pytest.approx(alone.probabilities, abs=1e-5)
    assert sum(alone.probabilities) == pytest.approx(1)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    width = len(str(count))
    codes = letters[:count] if count <= 26 else [f"{n:0{width}d}" for n in range(1, count + 1)]
    lines = [
        code if code.isdecimal() and int(code) == at else f"{code}. {at}"
        for at, code in enumerate(codes)
    ]
    text = "\n".join(["Which?", *lines, "Answer with the letter or number of the best option."])
    labels = []
    for code in codes:
        spaced = tokens(chat, f" {code}")
        labels.append([tokens(chat, code), *([spaced] if len(spaced) == 1 else [])])
    if count <= 27:
        expected = asked_whole(chat, [Message.user(text, str(EXAMPLE))], labels)
        assert alone.probabilities == pytest.approx(expected, abs=1e-5)


def test_a_score_is_the_expected_value(chat):
    found = chat.decide(
        EXAMPLE,
        [
            Score("How many objects are there?", range(6)),
            Score("How many?", range(8, 13)),
            Score("How large?", ["small", Level("large", "more than half"), "huge"], "size"),
        ],
    )
    for answer, values in zip(found, (range(6), range(8, 13), range(3)), strict=True):
        assert isinstance(answer, ScoreAnswer)
        assert answer.values == tuple(values)
        expected = sum(p * v for p, v in zip(answer.probabilities, values, strict=True))
        assert answer.score == pytest.approx(expected)
        assert sum(answer.probabilities) == pytest.approx(1)
    assert found[2].labels == ("small", "large", "huge")
    assert found[2].name == "size"


WORDS = st.sampled_from(["red", "Is there a boat?", "old tools", "</s> <image>", "12 km", "é漢"])
INSTRUCTIONS = st.lists(WORDS | st.integers(0, 2), min_size=1, max_size=3)
KINDS = st.sampled_from(["predicate", "choice", "spelled", "score"])
INPUTS = st.lists(WORDS | st.integers(0, 2), min_size=0, max_size=3)


def question_of(drawn: tuple[str, list[str | int], int]) -> Predicate | Choice | Score:
    kind, parts, count = drawn
    instructions = tuple(part if isinstance(part, str) else PICTURES[part] for part in parts)
    if kind == "predicate":
        return Predicate(instructions)
    if kind == "score":
        return Score(instructions, range(count))
    return Choice(instructions, [f"thing {n}" for n in range(count)], spelled=kind == "spelled")


def numbers(answer) -> tuple[float, ...]:
    return (answer.probability,) if isinstance(answer, PredicateAnswer) else answer.probabilities


@settings(max_examples=12, deadline=None)
@given(INPUTS, st.lists(st.tuples(KINDS, INSTRUCTIONS, st.integers(2, 31)), min_size=1, max_size=6))
def test_random_questions_are_answered_as_alone(chat, shared, drawn):
    given_ = [PICTURES[0], *(one if isinstance(one, str) else PICTURES[one] for one in shared)]
    questions = list(map(question_of, drawn))
    together = chat.decide(given_, questions, wording=WORDING)
    for question, answer in zip(questions, together, strict=True):
        chat._decider._scorer.prefixes.clear()
        [alone] = chat.decide(given_, [question], wording=WORDING)
        assert type(alone) is type(answer)
        assert numbers(answer) == pytest.approx(numbers(alone), abs=1e-4)
    again = chat.decide(given_, questions[::-1], wording=WORDING)
    for one, other in zip(again, list(together)[::-1], strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-4)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_packed_weights_answer_as_alone(bits):
    packed = lapilli.load("pebble", device="cpu", quantize=bits)
    questions = [Predicate("Is there a circle?"), Score("How many?", range(5)), Predicate("red")]
    together = packed.decide(EXAMPLE, questions)
    for question, answer in zip(questions, together, strict=True):
        [alone] = packed.decide(EXAMPLE, [question])
        assert numbers(answer) == pytest.approx(numbers(alone), abs=2e-3)


def test_what_is_shared_is_read_once(chat):
    picture = np.full((50, 50, 3), 77, dtype=np.uint8)
    first = chat.decide(picture, [Predicate("Is it red?")])
    again = chat.decide(picture, [Predicate("Is there a boat?"), Predicate("Is it red?")])
    assert first.cached_tokens == 0
    assert 64 < again.cached_tokens < first.prompt_tokens
    assert again[1].probability == pytest.approx(first[0].probability, abs=1e-5)
    assert again.prompt_tokens > first.prompt_tokens


@pytest.mark.slow
def test_400_questions_about_one_picture(chat):
    questions = [Predicate(f"Is there a red square {number}?") for number in range(400)]
    found = chat.decide(EXAMPLE, questions)
    assert len(found) == 400
    for at in (0, 17, 399):
        [alone] = chat.decide(EXAMPLE, [questions[at]])
        assert found[at].probability == pytest.approx(alone.probability, abs=1e-4)


def test_without_a_picture_pebble_refuses(chat):
    found = chat.decide("There is a boat.", [Predicate("Is it red?", "n"), Predicate((EXAMPLE,))])
    assert found[0] == Refusal("I need a picture to answer that", "n")
    assert isinstance(found[1], PredicateAnswer)


def test_a_refusal_says_that_a_text_is_the_name_of_a_picture(chat):
    name, question = str(EXAMPLE), [Predicate("Is it red?")]
    for asked in (name, ["What is in", name]):
        [found] = chat.decide(asked, question)
        assert found.reason.startswith("I need a picture to answer that (the text ")
        assert found.reason.endswith(f"give a picture as Path({name!r}))")
    for asked in ("no such file.png", "a\0b", "x" * 300, "x" * 1100, [Message.user(name)]):
        [found] = chat.decide(asked, question)
        assert found.reason == "I need a picture to answer that"


def test_a_conversation_and_instructions_stand_before(chat):
    picture = str(EXAMPLE)
    talk = [Message.user("What is this?", picture), Message.assistant("A boat.")]
    strict = [Message.system("Be strict."), *talk]
    values = [
        chat.decide(messages, [Predicate("Is it red?")])[0].probability
        for messages in (talk, strict, [*talk, Message.user("Look again.")])
    ]
    assert len(set(values)) == 3
    assert chat.history == ()


def test_options_with_descriptions_and_truth_values_keep_their_type(chat):
    [found] = chat.decide(
        EXAMPLE, [Choice("Is it?", [True, "true", Option(False, "nothing is there")])]
    )
    assert isinstance(found, ChoiceAnswer)
    assert found.values == (True, "true", False)
    assert len(found.probabilities) == 3


def test_threads_decide_and_generate_at_the_same_time(chat):
    questions = [Predicate(f"Is there a {shape}?") for shape in ("circle", "ring", "square")]
    expected = [numbers(one) for one in chat.decide(EXAMPLE, questions)]
    said = chat.batch([[Message.user("What is in this picture?", str(EXAMPLE))]])[0].text
    found: list[object] = []

    def decide() -> None:
        found.extend(numbers(one) for one in chat.decide(EXAMPLE, questions))

    def generate() -> None:
        found.append(chat.batch([[Message.user("What is in this picture?", str(EXAMPLE))]])[0].text)

    threads = [threading.Thread(target=one) for one in (decide, generate, decide, generate)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one for one in found if isinstance(one, str)] == [said, said]
    probabilities = [one for one in found if not isinstance(one, str)]
    assert np.array(probabilities) == pytest.approx(np.array(expected * 2), abs=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Predicate(" "), "with something in them"),
        (lambda: Predicate(()), "with something in them"),
        (lambda: Predicate(("", " ")), "with something in them"),
        (lambda: Choice("?", ["a"]), "2 to 255, got 1"),
        (lambda: Choice("?", [str(n) for n in range(256)]), "2 to 255, got 256"),
        (lambda: Choice("?", "ab"), "must be a list"),
        (lambda: Choice("?", ["a", "a"]), "comes twice"),
        (lambda: Choice("?", ["a", ""]), "must be a text, True, False or an Option"),
        (lambda: Score("?", [1, "2"]), "whole numbers from 0 on"),
        (lambda: Score("?", [-1, 0]), "whole numbers from 0 on"),
        (lambda: Score("?", [1, 1]), "comes twice"),
        (lambda: Score("?", ["a", " "]), "has no label"),
        (lambda: Wording(choice="{question}"), "wording of a choice has"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(make, message):
    with pytest.raises(PromptError, match=message):
        make()


def test_inputs_that_cannot_be_read_are_refused(chat):
    ask = [Predicate("Is it red?")]
    with pytest.raises(PromptError, match="the input is empty"):
        chat.decide(" ", ask)
    with pytest.raises(PromptError, match="the last message of the input is empty"):
        chat.decide([Message("user", (TextPart(""),))], ask)
    with pytest.raises(PromptError, match="at least one"):
        chat.decide("text", [])
    with pytest.raises(MediaError):
        chat.decide(MediaPart("nowhere.png"), ask)
    with pytest.raises(ContextTooLongError, match=r"question 1 has \d+ positions"):
        chat.decide(EXAMPLE, [*ask, Predicate("red " * 3000)])
