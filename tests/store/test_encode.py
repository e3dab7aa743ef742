"""Encoding: the last hidden states, whatever stands beside a text; fingerprints; going on."""

import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lapilli
from lapilli.errors import MediaError, PromptError
from lapilli.prompt.encode import EncodedPrompt
from lapilli.store import Store, encode
from lapilli.store.encode import (
    TextEncoder,
    batches_by_length,
    build_store,
    encode_texts,
    fingerprint,
)
from tests.train.faults import start


@pytest.fixture(scope="module")
def chat():
    return lapilli.load("pebble", device="cpu")


TEXTS = ["a red square", "two", "three green circles and one blue line below them", "<s> no token"]


def test_states_are_those_of_a_plain_pass(chat):
    found = encode_texts(chat.model, chat.tokenizer, TEXTS, tokens=2)
    assert found.dtype == torch.float32
    assert not found.is_inference()
    for text, vectors in zip(TEXTS, found, strict=True):
        ids = chat.tokenizer.encode(text, literal=[(0, len(text))])
        with torch.inference_mode():
            prompt = EncodedPrompt(ids, [False] * len(ids))
            hidden = chat.model.forward(chat.model.embed_prompts([prompt]))
        torch.testing.assert_close(vectors, hidden[0, -2:].float(), rtol=1e-4, atol=1e-4)


def test_batches_of_any_size_give_the_same(chat):
    whole = encode_texts(chat.model, chat.tokenizer, TEXTS)
    alone = TextEncoder(chat.model, chat.tokenizer).encode(TEXTS, positions=1)
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)
    assert encode_texts(chat.model, chat.tokenizer, []).shape == (0, 1, whole.shape[-1])


def test_long_texts_are_cut_or_refused(chat):
    long = "word " * 3000
    with pytest.raises(PromptError, match=r"text 1 .* tokens, and the model reads \d+: give"):
        encode_texts(chat.model, chat.tokenizer, ["a", long])
    cut = encode_texts(chat.model, chat.tokenizer, [long], max_length=4)
    ids = chat.tokenizer.encode(long)[:4]
    with torch.inference_mode():
        batch = chat.model.embed_prompts([EncodedPrompt(ids, [False] * 4)])
        hidden = chat.model.forward(batch)
    torch.testing.assert_close(cut[0], hidden[0, -1:].float(), rtol=1e-4, atol=1e-4)


def test_short_texts_are_refused(chat):
    with pytest.raises(PromptError, match=r"text 0 \('a'\) has \d+ tokens, and the states of the"):
        encode_texts(chat.model, chat.tokenizer, ["a"], tokens=40)
    with pytest.raises(PromptError, match="tokens is 2 and max_length 1: expected"):
        encode_texts(chat.model, chat.tokenizer, ["a"], tokens=2, max_length=1)


def test_what_is_no_text(chat):
    for wrong, says in (
        ([""], "text 0 is '': expected a text"),
        (["a", "  "], "text 1 is '  ': expected a text"),
        ("abc", "texts are 'abc': expected a list of texts"),
    ):
        with pytest.raises(PromptError, match=says):
            encode_texts(chat.model, chat.tokenizer, wrong)
    with pytest.raises(MediaError, match=r"text 0: the text has .* which is no character"):
        encode_texts(chat.model, chat.tokenizer, ["\ud800"])


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 100))
def test_batches_hold_every_row_once(lengths, positions):
    batches = list(batches_by_length(lengths, positions))
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        assert len(batch) == 1 or len(batch) * longest <= positions


def test_a_fingerprint_is_that_of_the_weights(chat):
    one = torch.nn.Linear(3, 2)
    first = fingerprint(one)
    assert first == fingerprint(one)
    assert first.startswith("sha256:")
    assert fingerprint(one, max_length=5) != first
    with torch.no_grad():
        one.weight[1, 2] += 1e-3
    assert fingerprint(one) != first
    assert fingerprint(one.half()) != fingerprint(one.bfloat16())
    assert fingerprint(chat.model) == fingerprint(chat.model.language_model)


def test_a_build_goes_on_where_it_was(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK", 2)
    items, read = list(zip("abcd", TEXTS, strict=True)), []
    encoder = TextEncoder(chat.model, chat.tokenizer)

    def stopped():
        for number, item in enumerate(items):
            if number == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "s", stopped(), encoder)
    before = len(Store(tmp_path / "s"))
    built = build_store(tmp_path / "s", items, encoder, progress=read.append)
    assert before in (0, 2)  # the chunk that was being read is lost
    assert built == 4 - before
    assert read == [2, 4]
    store = Store.open(tmp_path / "s", encoder=fingerprint(chat.model))
    expected = encode_texts(chat.model, chat.tokenizer, TEXTS)
    torch.testing.assert_close(store[list("abcd")], expected, rtol=1e-2, atol=1e-2)
    items[1] = ("b", "another text")
    assert build_store(tmp_path / "s", items, TextEncoder(chat.model, chat.tokenizer)) == 1
    assert (
        build_store(tmp_path / "s", items, TextEncoder(chat.model, chat.tokenizer, max_length=9))
        == 4
    )


def build_until_killed(path, items):
    """Commit after every two items, and be killed before the last one is read."""
    chat = lapilli.load("pebble", device="cpu")
    encode._CHUNK, encode._COMMIT_S = 2, 0.0

    def stopped():
        yield from items[:-1]
        os.kill(os.getpid(), signal.SIGKILL)

    build_store(path, stopped(), TextEncoder(chat.model, chat.tokenizer))


@pytest.mark.slow
def test_a_kill_keeps_what_was_committed(chat, tmp_path):
    items = list(zip("abcd", TEXTS, strict=True))
    child = start(build_until_killed, str(tmp_path / "s"), items)
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert Store(tmp_path / "s").ids() == ["a", "b"]
    assert build_store(tmp_path / "s", items, TextEncoder(chat.model, chat.tokenizer)) == 2
    assert sorted(Store(tmp_path / "s").ids()) == list("abcd")
