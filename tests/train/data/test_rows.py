import pytest

from lapilli.errors import DataError
from lapilli.prompt.templates import TEMPLATES
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer
from lapilli.train.data import encode_sample
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


def test_a_sample_without_an_answer_is_an_error(tokenizer):
    with pytest.raises(DataError, match="'7' has no supervised token"):
        encode_sample(sample("Q"), TEMPLATES["vicuna_v1"], tokenizer, [])
