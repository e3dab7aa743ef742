"""Ordinary added tokens in questions and answers: the ids of transformers, in prompts and rows."""

import json
import shutil

import pytest

import lapilli
from lapilli import Message
from lapilli.train.data import to_sample
from lapilli.train.data.encoder import plan_encoder
from tests.integration.oracle import make_oracle, picture

WORDS = ("<loc1>", "   ", "  ")
QUESTIONS = (
    "where is <loc1>?",
    "a  b",
    "def f():\n   return 1",
    "<loc1><loc1>",
    "x  <loc1> ",
)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A checkpoint whose tokenizer has words that somebody added, and its oracle."""
    path = tmp_path_factory.mktemp("added") / "base"
    oracle = make_oracle(path, next_=False, text="llama", tower="clip")
    file = path / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    first = len(vocabulary) - len(WORDS)
    data["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < first}
    data["added_tokens"] += [
        {"id": first + i, "content": word, "special": False, "normalized": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, word in enumerate(WORDS)
    ]
    file.write_text(json.dumps(data))
    oracle.processor.tokenizer = type(oracle.processor.tokenizer).from_pretrained(path)
    return path, oracle, first


def load(path):
    return lapilli.load(str(path), device="cpu", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
def test_prompts_have_the_ids_of_transformers(grown, question):
    path, oracle, first = grown
    image = picture(60, 40, 1)
    ready = load(path).encode([Message.user(question, image)])
    ids = list(ready.encoded.input_ids)
    for span in ready.encoded.spans:
        ids[span.start : span.start + span.length] = [3] * span.length
    assert ids == oracle.inputs([(question, [image])])["input_ids"][0].tolist()
    assert any(index >= first for index in ids)


@pytest.mark.parametrize("question", ["what is </s>", "a <image> b  c", "<s><loc1>"])
def test_special_tokens_beside_them_stay_text(grown, question):
    path, _, first = grown
    chat = load(path)
    ready = chat.encode([Message.user(question, picture(60, 40, 1))])
    assert ready.encoded.input_ids.count(2) == 0
    assert ready.encoded.input_ids.count(1) == 1  # the template's own
    assert len(ready.encoded.spans) == 1
    assert any(i >= first for i in ready.encoded.input_ids) == ("</s>" not in question)
    assert chat.tokenizer.decode(chat.tokenizer.encode("at <loc1>")) == "at <loc1>"


def test_a_typed_image_token_is_no_picture_whatever_its_file_says(grown, tmp_path):
    path, _, _ = grown
    other = tmp_path / "other"
    shutil.copytree(path, other)
    file = other / "tokenizer.json"
    data = json.loads(file.read_text())
    for token in data["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<image>"
    file.write_text(json.dumps(data))
    config = json.loads((other / "tokenizer_config.json").read_text())
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        config.pop(key, None)
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    message = Message.user("a <image> b", picture(60, 40, 1))
    first, second = (load(one).encode([message]).encoded for one in (path, other))
    assert first == second


def test_answers_are_learned_with_them(grown):
    path, _, first = grown
    record = {
        "conversations": [
            {"from": "human", "value": "where?"},
            {"from": "gpt", "value": "at <loc1>  </s>"},
        ]
    }
    row = plan_encoder(str(path)).encoder.encode(to_sample(record, where="d.json:1"))
    pairs = zip(row.prompt.input_ids, row.prompt.loss_mask, strict=True)
    learned = [i for i, counts in pairs if counts]
    assert [i for i in learned if i >= first] == [first, first + 2]
    assert learned.count(2) == 1  # the template's end token, not the typed one
