"""Scores of items after one query are those of every item alone; a wrong input is one error."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lapilli
from lapilli import Chat, Message, TextPart
from lapilli.errors import (
    CheckpointError,
    ConfigError,
    ContextTooLongError,
    MediaError,
    PromptError,
    ShapeMismatchError,
)
from lapilli.pipeline.scorer import join
from lapilli.prompt.message import MediaPart
from lapilli.rank import Head, Labels, Ranker, RankTemplate, SetwiseRanker, YesNo, rank
from lapilli.rank.prompt import PromptSplitter

PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
PLAIN = RankTemplate()
TEMPLATE = RankTemplate(user="{query} Is it this?\n{item}\nyes or no?")


@pytest.fixture(scope="module")
def chat() -> Chat:
    return lapilli.load("pebble", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ranker(chat) -> Ranker:
    return Ranker(chat)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def hidden_alone(chat: Chat, query, items, template: RankTemplate, lead=()) -> torch.Tensor:
    """The plain loop: last hidden states of whole prompts, one pass each."""
    splitter = PromptSplitter(chat, template)
    found = []
    for item in items:
        frame = splitter.frame(query)
        whole = join([frame.prefix, splitter.item(item, "item"), frame.suffix])
        batch = chat.model.embed_prompts([whole.encoded], [whole.media])
        found.append(chat.model(batch)[0, -1])
    return torch.stack(found)


@torch.inference_mode()
def alone(chat: Chat, query, items, template: RankTemplate = PLAIN) -> torch.Tensor:
    logits = chat.model.logits(hidden_alone(chat, query, items, template))
    ids = [chat.tokenizer.encode(word, add_bos=False)[0] for word in ("yes", "no")]
    return logits[:, ids].float().softmax(dim=-1)[:, 0]


ITEMS = ["a boat", "a large red square", vectors(256), vectors(3, 256, seed=1).numpy()]
ITEMS += [["seen from", vectors(1, 256, seed=2), "above"], "an old box of tools"]
QUERIES = {
    "text": "something that floats",
    "message": [Message.system("Be strict."), Message.user("something that floats")],
    "conversation": [
        Message.user("I look for a boat."),
        Message.assistant("Of what colour?"),
        Message.user("red"),
    ],
    "picture": [Message.user("Is it in the picture?", PICTURE)],
    "features": Message.user("Is it in the picture?", vectors(5, 256, seed=3)),
    "parts": ["what this user likes:", vectors(2, 256, seed=4), "and floats"],
    "a picture among parts": ["like", MediaPart(PICTURE), "but red"],
    "vectors alone": vectors(2, 256, seed=5),
}


@pytest.mark.parametrize("kind", QUERIES)
def test_scores_are_those_of_every_item_alone(chat, kind):
    query = QUERIES[kind]
    found = Ranker(chat, template=TEMPLATE).score(query, ITEMS)
    assert found.std() > 1e-4
    torch.testing.assert_close(found, alone(chat, query, ITEMS, TEMPLATE), atol=1e-5, rtol=0)


WORDS = st.sampled_from(["a", "red boat", "old tools", "</s> <image>", "12 km", "é漢"])
PART = WORDS | st.tuples(st.integers(1, 3), st.integers(0, 99))


@settings(max_examples=8)
@given(st.lists(st.lists(PART, min_size=1, max_size=3), min_size=1, max_size=7), st.integers(1, 50))
def test_random_items_score_as_alone(chat, drawn, max_tokens):
    items = [
        [part if isinstance(part, str) else vectors(part[0], 256, seed=part[1]) for part in item]
        for item in drawn
    ]
    found = Ranker(chat, max_tokens=max_tokens).score("boats", items)
    torch.testing.assert_close(found, alone(chat, "boats", items), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_packed_weights_score_as_alone(bits):
    """Activations are rounded by position, so that who stands beside an item counts for nothing."""
    chat = lapilli.load("pebble", device="cpu", quantize=bits)
    for name in ("text", "picture"):
        found = Ranker(chat).score(QUERIES[name], ITEMS)
        torch.testing.assert_close(found, alone(chat, QUERIES[name], ITEMS), atol=2e-3, rtol=0)


def test_bfloat16_scores_are_near(chat):
    other = lapilli.load("pebble", device="cpu", dtype="bfloat16")
    found = Ranker(other).score("boats", ITEMS)
    torch.testing.assert_close(found, alone(other, "boats", ITEMS), atol=1e-2, rtol=0)


def test_rank_and_stream_give_the_same(chat, ranker):
    expected = ranker.score("boats", ITEMS)
    assert list(ranker.stream("boats", iter(ITEMS))) == pytest.approx(expected.tolist(), abs=1e-6)
    torch.testing.assert_close(rank("boats", ITEMS, chat), expected, atol=1e-6, rtol=0)


def test_rows_of_a_tensor_are_items(ranker):
    stored = vectors(4, 2, 256)  # as a store returns them: [n, T, D]
    expected = ranker.score("boats", list(stored))
    torch.testing.assert_close(ranker.score("boats", stored), expected, atol=1e-6, rtol=0)


def test_a_query_is_read_once(chat):
    ranker = Ranker(chat, max_tokens=20)
    ranker.score("boats", ITEMS)
    ranker.score([Message.user("boats")], ITEMS[::-1])
    assert ranker.prefixes.stats.misses == 1
    ranker.score("other boats", ITEMS)
    assert ranker.prefixes.stats.misses == 2


def test_the_chats_instructions_count(chat, ranker):
    before = ranker.score("boats", ITEMS)
    chat.system = "Say no."
    try:
        found = ranker.score("boats", ITEMS)
    finally:
        chat.system = None
    assert (found - before).abs().max() > 1e-5
    expected = Ranker(chat, template=RankTemplate(system="Say no.")).score("boats", ITEMS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_tokens_around_an_item_do_not_depend_on_it(chat):
    splitter = PromptSplitter(chat, RankTemplate())
    frame = splitter.frame("boats")
    text = chat.tokenizer.decode(frame.prefix.encoded.input_ids)
    assert "Query: boats" in text
    assert text.endswith("Answer yes or no.\n")
    assert chat.tokenizer.decode(frame.suffix.encoded.input_ids).strip() == "ASSISTANT:"
    assert chat.tokenizer.bos_id not in frame.suffix.encoded.input_ids
    item = splitter.item("</s>", "item").encoded.input_ids
    assert chat.tokenizer.eos_id not in item  # what a catalogue says is text


@pytest.mark.slow
def test_a_checkpoints_own_template_gives_the_tokens_of_a_question(tmp_path):
    """Of bytes as tokens a prompt in three pieces is the prompt of the same text in one."""
    from tests.integration.oracle import make_oracle, picture

    oracle = make_oracle(tmp_path, next_=True, text="mistral", tower="clip")
    chat = lapilli.load(str(oracle.path), device="cpu", dtype="float32")
    shown = picture(60, 40, 1)
    splitter = PromptSplitter(chat, RankTemplate(user="Find {query} in: {item} Well?"))
    frame = splitter.frame(Message.user("a boat ", shown))
    whole = join([frame.prefix, splitter.item("an <image> of one", "item"), frame.suffix])
    asked = chat.encode([Message.user("Find a boat  in: an <image> of one Well?", shown)])
    assert whole.encoded.input_ids == asked.encoded.input_ids
    assert whole.encoded.spans == asked.encoded.spans
    items = ["a", "an <image> of one", vectors(2, 48), ["b", vectors(48)]]
    ranker = Ranker(chat, score=Labels((40, 50), (1.0, 0.0)))
    query = [Message.user("a boat", shown)]
    logits = hidden_alone(chat, query, items, PLAIN)
    with torch.inference_mode():
        expected = chat.model.logits(logits)[:, [40, 50]].softmax(dim=-1)[:, 0]
    torch.testing.assert_close(ranker.score(query, items), expected, atol=1e-4, rtol=0)


def test_difference_is_the_logit_of_the_probability(chat, ranker):
    found = Ranker(chat, score=YesNo(difference=True)).score("boats", ITEMS)
    torch.testing.assert_close(found.sigmoid(), ranker.score("boats", ITEMS), atol=1e-5, rtol=0)


def test_labels_give_probabilities_and_their_mean(chat):
    """Pebble cuts a digit into a space and the digit: the space ends the prompt."""
    ranker = Ranker(chat, score=Labels(("1", "2", "5")))
    logprobs = ranker.label_logprobs("boats", ITEMS)
    assert logprobs.shape == (6, 3)
    torch.testing.assert_close(logprobs.exp().sum(dim=-1), torch.ones(6))
    expected = logprobs.exp() @ torch.tensor([1.0, 2.0, 5.0])
    torch.testing.assert_close(ranker.score("boats", ITEMS), expected, atol=1e-5, rtol=0)
    space, *_ = chat.tokenizer.encode("1", add_bos=False)
    digits = [chat.tokenizer.encode(digit, add_bos=False)[1] for digit in "125"]
    with torch.inference_mode():
        splitter = PromptSplitter(chat, RankTemplate())
        frame = splitter.frame("boats")
        whole = join([frame.prefix, splitter.item(ITEMS[0], ""), frame.suffix])
        ids = [*whole.encoded.input_ids, space]
        batch = chat.model.language_model.embed(torch.tensor([ids]))
        places = torch.arange(len(ids))[None]
        hidden = chat.model.language_model.forward(batch, position_ids=places)
        logits = chat.model.logits(hidden[0, -1])[digits]
    torch.testing.assert_close(logprobs[0], logits.log_softmax(dim=-1), atol=1e-4, rtol=0)


def test_labels_may_be_ids(chat, ranker):
    yes, no = (chat.tokenizer.encode(word, add_bos=False)[0] for word in ("yes", "no"))
    found = Ranker(chat, score=Labels((yes, no), (1.0, 0.0))).score("boats", ITEMS)
    torch.testing.assert_close(found, ranker.score("boats", ITEMS), atol=1e-5, rtol=0)


def test_a_head_reads_the_last_hidden_state(chat, tmp_path):
    weight, bias = vectors(1, 256, seed=7), torch.tensor([0.3])
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    hidden = hidden_alone(chat, "boats", ITEMS, RankTemplate())
    expected = (hidden @ weight[0]) + 0.3
    found = Ranker(chat, score=Head.load(tmp_path / "head.safetensors")).score("boats", ITEMS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    likely = Head(weight, bias, probability=True)
    found = Ranker(chat, score=likely).score("boats", ITEMS)
    torch.testing.assert_close(found, expected.sigmoid(), atol=1e-4, rtol=0)


def test_sets_are_compared_in_one_prompt(chat):
    marks = "ACD"
    ranker = SetwiseRanker(chat, marks=marks, max_tokens=40)
    sets = [["a boat", "a car"], ["a boat", vectors(256), ["a", vectors(2, 256)]], ["x", "y"]]
    found = ranker.score("boats", sets)
    assert [len(one) for one in found] == [2, 3, 2]
    assert all(float(one.sum()) == pytest.approx(1) for one in found)
    ids = [chat.tokenizer.encode(mark, add_bos=False)[0] for mark in marks]
    template = RankTemplate(
        user="Query: {query}\nWhich of these items matches the query best? Name its letter.\n{item}"
    )
    whole = [
        ["A: a boat\nC: a car"],
        ["A: a boat\nC: ", vectors(256), "\nD: a", vectors(2, 256)],
        "A: x\nC: y",
    ]
    with torch.inference_mode():
        logits = chat.model.logits(hidden_alone(chat, "boats", whole, template))[:, ids]
    for one, row in zip(found, logits, strict=True):
        expected = row[: len(one)].softmax(dim=-1)
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=0)


def test_more_items_than_fit_stream_in_order(chat):
    ranker = Ranker(chat, max_tokens=100)
    stored = vectors(50, 256)
    expected = ranker.score("boats", stored)
    found = ranker.stream("boats", (stored[i % 50] for i in range(400)))
    torch.testing.assert_close(torch.tensor(list(found)), expected.repeat(8), atol=1e-5, rtol=0)


def test_items_before_one_that_does_not_fit_have_their_scores(chat, ranker):
    items = ["a raft", "a cork", "word " * 3000, "a hammer"]
    found = []
    with pytest.raises(ContextTooLongError, match="item 'long' has"):
        found.extend(ranker.stream("boats", items, names=["a", "b", "long", "c"]))
    with pytest.raises(ContextTooLongError, match="item 2 has"):
        found.extend(ranker.stream("boats", items))
    expected = ranker.score("boats", items[:2]).tolist()
    assert found == pytest.approx(expected * 2, abs=1e-6)
    with pytest.raises(ContextTooLongError, match=r"the query has \d+ positions with what the"):
        ranker.score("word " * 3000, ["a raft"])


@pytest.mark.slow
def test_ten_thousand_items_at_once(chat):
    stored = vectors(50, 256).repeat(200, 1)
    found = rank("boats", stored, chat).view(200, 50)
    torch.testing.assert_close(found, found[:1].expand(200, 50), atol=1e-5, rtol=0)


def test_threads_rank_on_one_chat_while_it_answers(chat):
    ranker = Ranker(chat, max_tokens=30)
    queries = ["boats", "cars", "old tools"]
    expected = {query: alone(chat, query, ITEMS) for query in queries}
    answer = chat.ask_many(["What is it?"], max_new_tokens=4)
    worst: list[float] = []
    answers: list[list[str]] = []

    def work(i: int) -> None:
        for turn in range(4):
            query = queries[(i + turn) % 3]
            found = ranker.score(query, ITEMS)
            worst.append((found - expected[query]).abs().max().item())
        answers.append(chat.ask_many(["What is it?"], max_new_tokens=4))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(worst) == 16
    assert max(worst) < 1e-5
    assert answers == [answer] * 4


def test_a_model_of_another_library_is_ranked_with_plainly(chat, ranker, monkeypatch):
    expected = ranker.score("boats", ITEMS)
    monkeypatch.setattr(type(chat.model.language_model), "supports_varlen", False)
    torch.testing.assert_close(ranker.score("boats", ITEMS), expected, atol=1e-5, rtol=0)


def test_no_items_have_no_scores(chat, ranker):
    assert ranker.score("boats", []).shape == (0,)
    assert ranker.label_logprobs("boats", []).shape == (0, 2)
    assert list(ranker.stream("boats", [])) == []
    assert SetwiseRanker(chat, marks="ACD").score("boats", []) == []


NAN = vectors(2, 256)
NAN[1, 3] = float("nan")
WRONG_ITEMS = {
    "width": (vectors(255), MediaError, r"item 1: vectors must be .*\[256\].*got .* \[255\]"),
    "rank": (vectors(1, 1, 256), MediaError, r"item 1: vectors must be"),
    "none": (vectors(0, 256), MediaError, r"item 1: vectors must be"),
    "nowhere": (torch.zeros(256, device="meta"), MediaError, r"got .* \[256\] on meta"),
    "whole": (torch.ones(256, dtype=torch.int64), MediaError, r"floating point .* torch.int64"),
    "texts": (np.array(["a"]), MediaError, r"item 1: an array of <U1 holds no vectors"),
    "nan": (NAN, MediaError, r"item 1: 1 of the numbers of its vectors are NaN or infinite"),
    "infinite": (vectors(256) * torch.inf, MediaError, r"item 1: 256 of the numbers"),
    "empty": ("  ", PromptError, r"item 1 is empty"),
    "nothing": ([], PromptError, r"item 1 is empty"),
    "long": ("word " * 3000, ContextTooLongError, r"item 1 has \d+ positions .* model reads 2048"),
}


@pytest.mark.parametrize("kind", WRONG_ITEMS)
def test_wrong_items_are_named(ranker, kind):
    item, error, text = WRONG_ITEMS[kind]
    with pytest.raises(error, match=text):
        ranker.score("boats", ["a", item])


WRONG_QUERIES = {
    "empty": ("", PromptError, "the query is empty"),
    "white": (" \n", PromptError, "the query is empty"),
    "no messages": ([], PromptError, "the query is empty"),
    "an empty message": ([Message.user(" ")], PromptError, "the query is empty"),
    "an answer": (
        [Message.user("a"), Message.assistant("b")],
        PromptError,
        "its last message must be the user's",
    ),
    "mixed": ([Message.user("a"), "b"], PromptError, "a conversation must be a list of Message"),
    "vectors": (["a", vectors(3)], MediaError, r"the query: vectors must be"),
    "part": (Message("user", (TextPart(""),)), PromptError, "the query is empty"),
}


@pytest.mark.parametrize("kind", WRONG_QUERIES)
def test_wrong_queries_are_named_at_once(ranker, kind):
    query, error, text = WRONG_QUERIES[kind]
    with pytest.raises(error, match=text):
        ranker.stream(query, ["a"])


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (("yes", "no way"), r"the label 'no way' has \d tokens \('▁no', .*\), a label has one"),
        (("yes", "yes"), "the label 'yes' is the token 391, which another label is too"),
        (("yes", ""), "the label '' has 0 tokens"),
        (("yes", 10**6), "the label 1000000 is no token: the vocabulary has 0 to"),
    ],
)
def test_wrong_labels_are_named(chat, labels, text):
    with pytest.raises(PromptError, match=text):
        Ranker(chat, score=Labels(labels, (1.0, 0.0)))


@pytest.mark.parametrize(
    ("labels", "values", "text"),
    [
        (("good", "bad"), None, "the labels good, bad are no numbers"),
        (("1",), None, "at least two"),
        (("1", "2"), (1.0,), "2 labels but 1 values"),
    ],
)
def test_labels_without_worth_are_refused(labels, values, text):
    with pytest.raises(ConfigError, match=text):
        Labels(labels, values)


@pytest.mark.parametrize(
    ("user", "text"),
    [
        ("Is it {item}?", "once and {item} once, found {query} 0 times"),
        ("{query} {query} {item}", "found {query} 2 times"),
        ("{item} for {query}", "{query} stands behind {item}"),
    ],
)
def test_templates_without_places_are_refused(user, text):
    with pytest.raises(PromptError, match=text):
        RankTemplate(user=user)


def test_heads_of_other_models_are_refused(chat, tmp_path):
    with pytest.raises(ShapeMismatchError, match=r"weight \[1, 256\].*got \[1, 255\]"):
        Ranker(chat, score=Head(vectors(1, 255)))
    with pytest.raises(CheckpointError, match="the head cannot be read"):
        Head.load(tmp_path / "none.safetensors")
    save_file({"other": vectors(1, 256)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds other: a head has weight"):
        Head.load(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="the head has NaN or infinite numbers"):
        Ranker(chat, score=Head(vectors(1, 256) * torch.nan))
    head = Ranker(chat, score=Head(vectors(1, 256)))
    with pytest.raises(ConfigError, match="a head has no labels"):
        head.label_logprobs("boats", ["a"])


@pytest.mark.parametrize(
    ("one", "text"),
    [(["a"], "set 1 has 1 items: a set has 2 to 3"), ("ab", "set 1 must be a list of items")],
)
def test_wrong_sets_are_named(chat, one, text):
    with pytest.raises(PromptError, match=text):
        SetwiseRanker(chat, marks="ACD").score("boats", [["a", "b"], one])


PROGRAM = """
import json, sys
import lapilli, torch
from lapilli.rank import Labels, Ranker, RankTemplate, SetwiseRanker

chat = lapilli.load("pebble", device="cpu")
ranker = Ranker(chat)
found = {}
for text in json.load(sys.stdin):
    try:
        exec(text)
        found[text] = "nothing"
    except Exception as error:
        found[text] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
WRONG_TYPES = {
    "Ranker('pebble')": "ConfigError: model must be what lapilli.load returns, got 'pebble'",
    "SetwiseRanker(None)": "ConfigError: model must be what lapilli.load returns, got None",
    "RankTemplate(user=7)": "PromptError: a template of a ranking must be a text, got 7",
    "ranker.score('boats', 'a boat')": "PromptError: items must be a list of items, got 'a boat'",
    "ranker.score('boats', torch.tensor(3.0))": "PromptError: items must be a list of items",
    "Ranker(chat, score='yes')": "ConfigError: score must be YesNo, Labels or Head, got 'yes'",
    "Ranker(chat, max_tokens='3')": "ConfigError: max_tokens must be at least 1",
    "ranker.score('boats', 7)": "PromptError: items must be a list of items, got 7",
    "ranker.score('boats', None)": "PromptError: items must be a list of items, got None",
    "ranker.score('boats', [7])": "PromptError: item 0: expected a text, vectors, or a list",
    "ranker.score('boats', [['a', None]])": "PromptError: item 0: expected a text, vectors",
    "ranker.score(3, ['a'])": "PromptError: the query: expected a text, vectors, or a list",
    "ranker.score(None, ['a'])": "PromptError: the query: expected a text, vectors, or a list",
    "Labels('12')": "ConfigError: labels must be a tuple of at least two, got '12'",
}


@pytest.mark.slow
def test_values_that_no_type_checker_would_pass():
    """In a process of their own, because in this one the types of arguments are checked."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(list(WRONG_TYPES)),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    wrong = {text: found[text] for text, start in WRONG_TYPES.items()}
    assert [t for t, start in WRONG_TYPES.items() if not wrong[t].startswith(start)] == [], wrong
