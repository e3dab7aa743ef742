import json

import pytest

from lapilli.errors import MediaCountMismatchError, PromptError
from lapilli.prompt.templates import TEMPLATES
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer
from lapilli.train.data import encode_sample, images_of, messages_of, read_conversations
from lapilli.train.pebble.words import corpus, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(corpus(1, 200), path, 500)
    return SentencePieceTokenizer(path.read_bytes())


def sample(*turns, image=None):
    values = [
        {"from": "human" if i % 2 == 0 else "gpt", "value": turn} for i, turn in enumerate(turns)
    ]
    return {"id": "7", "conversations": values} | ({} if image is None else {"image": image})


def test_answers_and_their_ends_are_supervised(tokenizer):
    one = sample("<image>\nWhat is it?", "a cat", "Sure?", "yes", image="a.png")
    prompt = encode_sample(one, TEMPLATES["vicuna_v1"], tokenizer, [3])
    kept = [i for i, counts in zip(prompt.input_ids, prompt.loss_mask, strict=True) if counts]
    assert tokenizer.decode(kept, skip_special=False).strip() == "a cat</s> yes</s>"
    assert prompt.spans[0].length == 3


def test_an_answer_that_stands_first_is_dropped():
    turns = sample("Q", "A")
    turns["conversations"].insert(0, {"from": "gpt", "value": "Hello"})
    assert [message.text for message in messages_of(turns)] == ["Q", "A"]


def test_images_may_be_one_or_many():
    assert images_of({"image": "a.png"}) == ["a.png"]
    assert images_of({"image": ["a.png", "b.png"]}) == ["a.png", "b.png"]
    assert images_of({}) == []
    two = sample("<image>\nOne", "1", "<image>\nTwo", "2", image=["a.png", "b.png"])
    assert [part.source for m in messages_of(two) for part in m.media] == ["a.png", "b.png"]


def test_unknown_roles_are_named():
    broken = {"id": "x3", "conversations": [{"from": "robot", "value": "hi"}]}
    with pytest.raises(PromptError, match=r"'x3' has a turn from 'robot': expected human"):
        messages_of(broken)


def test_more_placeholders_than_images_and_the_reverse():
    with pytest.raises(MediaCountMismatchError, match="2 <image> but 1 sources"):
        messages_of(sample("<image><image>", "A", image="a.png"))
    with pytest.raises(PromptError, match="1 images but 0 <image>"):
        messages_of(sample("Q", "A", image="a.png"))


def test_a_sample_without_an_answer_is_an_error(tokenizer):
    with pytest.raises(PromptError, match="'7' has no supervised token"):
        encode_sample(sample("Q"), TEMPLATES["vicuna_v1"], tokenizer, [])


def test_files_that_are_no_samples_are_named(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"conversations": []}))
    with pytest.raises(PromptError, match="holds a dict: expected a list"):
        read_conversations(path)
    path.write_text(json.dumps([sample("Q", "A"), {"id": 3}]))
    with pytest.raises(PromptError, match='sample 1 has no list "conversations"'):
        read_conversations(path)
    path.write_text(json.dumps([sample("Q", "A")]))
    assert len(read_conversations(path)) == 1
