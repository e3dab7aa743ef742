"""lapilli and transformers on the same checkpoints: ids, pixels, logits, greedy and beam tokens."""

from pathlib import Path

import pytest
import torch

import lapilli
from lapilli import Chat, Message, SamplingParams
from lapilli.modality.image.pixels import PreparedImage
from tests.integration.oracle import Oracle, make_oracle, picture
from tests.versions import needs

KINDS = [
    (next_, text, tower)
    for next_ in (False, True)
    for text in ("llama", "mistral", "qwen2")
    for tower in ("clip", "siglip")
]
NAMES = [f"{'next' if next_ else '1.5'}-{text}-{tower}" for next_, text, tower in KINDS]
PICTURES = [picture(60, 40, 1), picture(28, 90, 2), picture(33, 31, 3)]
ROWS = [
    ("What is in this picture?", PICTURES[:1]),
    ("Why?", PICTURES[1:2]),
    ("Which of them is the brighter one, and where?", PICTURES[1:3]),
]


@pytest.fixture(scope="module", params=KINDS, ids=NAMES)
def pair(request, tmp_path_factory) -> tuple[Oracle, Chat]:
    next_, text, tower = request.param
    path: Path = tmp_path_factory.mktemp("oracle")
    oracle = make_oracle(path, next_=next_, text=text, tower=tower)
    chat = lapilli.load(str(path), device="cpu", dtype="float32", strict_config=True)
    return oracle, chat


def conversation(row: int) -> list[Message]:
    question, pictures = ROWS[row]
    return [Message.user(question, *pictures)]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["<image><image>\nWhich?", "Is <image> like <image>?"])
def test_text_with_placeholders(pair, text):
    """A program's own text: what transformers makes of the same string."""
    oracle, chat = pair
    ready = chat.encode([Message.from_placeholders("user", text, PICTURES[1:])])
    ids = list(ready.encoded.input_ids)
    for span in ready.encoded.spans:
        ids[span.start : span.start + span.length] = [3] * span.length
    whole = f"<s>USER: {text}ASSISTANT:"
    theirs = oracle.processor(
        text=[whole], images=PICTURES[1:], return_tensors="pt", add_special_tokens=False
    )
    assert ids == theirs["input_ids"][0].tolist()


def test_everything_was_loaded(pair):
    _, chat = pair
    assert chat.report.missing == ()
    assert chat.report.unexpected == ()
    assert chat.template.name == "chat_template"


@pytest.mark.slow
def test_ids_and_pixels(pair):
    oracle, chat = pair
    for row in range(len(ROWS)):
        inputs = oracle.inputs([ROWS[row]])
        ready = chat.encode(conversation(row))
        ids = list(ready.encoded.input_ids)
        for span in ready.encoded.spans:
            ids[span.start : span.start + span.length] = [3] * span.length
        assert ids == inputs["input_ids"][0].tolist()
        for ours, theirs in zip(ready.media, inputs["pixel_values"], strict=True):
            assert isinstance(ours, PreparedImage)
            theirs = theirs.reshape(-1, *theirs.shape[-3:])
            tiles = len(ours.pixel_values)
            assert not theirs[tiles:].any()  # padding to the picture with most tiles
            torch.testing.assert_close(ours.pixel_values, theirs[:tiles], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_logits_of_a_ragged_batch(pair):
    oracle, chat = pair
    inputs = oracle.inputs(ROWS)
    ready = [chat.encode(conversation(row)) for row in range(len(ROWS))]
    with torch.inference_mode():
        expected = oracle.model(**inputs).logits
        batch = chat.model.embed_prompts([r.encoded for r in ready], [r.media for r in ready])
        logits = chat.model.logits(chat.model(batch))
    mask = inputs["attention_mask"].bool()
    assert torch.equal(batch.attention_mask, mask)
    assert expected[mask].std() > 0.3
    torch.testing.assert_close(logits[mask], expected[mask], atol=1e-4, rtol=0)


CHANGED = needs(
    "transformers", "5.24", "penalizes and searches otherwise where a prompt is embeddings"
)
OPTIONS = [
    pytest.param({}, id="greedy"),
    pytest.param({"repetition_penalty": 1.2}, id="penalty", marks=CHANGED),
    pytest.param({"num_beams": 3, "length_penalty": 0.6}, id="beams", marks=CHANGED),
]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", OPTIONS)
def test_tokens(pair, chosen: dict[str, float]):
    oracle, chat = pair
    options = {"max_new_tokens": 8, **chosen}
    params = SamplingParams(**options)
    expected = oracle.answers(oracle.inputs(ROWS), **options)
    together = chat.batch([conversation(row) for row in range(len(ROWS))], params)
    assert [list(answer.token_ids) for answer in together] == expected
    [alone] = oracle.answers(oracle.inputs(ROWS[:1]), **options)
    assert list(chat.answer(conversation(0), params).token_ids) == alone
