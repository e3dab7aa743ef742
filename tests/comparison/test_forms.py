"""Forms of a language model: a row of texts is what each of them is alone, and what it costs."""

from dataclasses import replace

import pytest
import torch

from comparison.forms import NAME, FormConfig, LanguageReader, operations, row_mask
from comparison.scenes import (
    Scenes,
    Vocabulary,
    captions_of,
    few_objects,
    join_texts,
    questions_about,
    questions_of,
    words_of,
)
from lapilli.modality.vector import PreparedVectors
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from pebble.caption import caption

TINY = FormConfig(layers=2, width=32, heads=2, inner=48)
FORMS = {
    "tokens": TINY,
    "soft prompt": replace(TINY, projector="resampler2"),
    "cross-attention": replace(TINY, every=2),
}


@pytest.fixture(scope="module")
def scenes():
    drawn = few_objects(7, 3)
    return Scenes(
        features=torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1)),
        captions=tuple(words_of(caption(one)) for one in drawn),
        questions=tuple(tuple(questions_about(one, 4)) for one in drawn),
    )


@pytest.fixture(params=FORMS)
def reader(request, scenes):
    model = LanguageReader(FORMS[request.param], Vocabulary(scenes), 8, seed=3).eval()
    for block in model.decoder.cross_attention.values():  # shut gates would hide the pictures
        block.attention_gate.data.fill_(0.5)
        block.mlp_gate.data.fill_(0.5)
    return model


def test_no_text_sees_another_one():
    owner = torch.tensor([[0, 0, 1, -1]])
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    assert row_mask(1, owner)[0, 0].int().tolist() == expected


@torch.no_grad()
def test_a_row_gives_what_prompts_of_the_library_give(reader, scenes):
    texts = questions_of(scenes, [0, 2], Vocabulary(scenes))
    found = reader.answer_logits(texts)
    before = reader.num_positions(4)
    for number, (row, _) in enumerate(texts.last.T.tolist()):
        own = texts.owner[row] == texts.owner[row, texts.last[1, number]]
        ids = [PLACEHOLDER] * before + texts.ids[row][own].tolist()
        span = Span(0, 0, before, NAME)
        prompt = EncodedPrompt(ids, [False] * len(ids), (span,))
        picture = PreparedVectors(texts.features[row])
        hidden = reader.vlm(reader.vlm.embed_prompts([prompt], [[picture]]))
        alone = reader.decoder.token_logits(hidden[0, -1], reader.answers)
        torch.testing.assert_close(found[number], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_answers_depend_on_the_picture(reader, scenes):
    texts = questions_of(scenes, [0], Vocabulary(scenes))
    other = replace(texts, features=texts.features + 1)
    assert not torch.allclose(reader.answer_logits(texts), reader.answer_logits(other))


@torch.no_grad()
def test_likelihoods_are_those_of_the_loss(reader, scenes):
    texts = captions_of(scenes, [0, 1, 2], Vocabulary(scenes))
    likelihoods = reader.log_likelihood(texts)
    torch.testing.assert_close(-likelihoods.sum(), reader.caption_loss(texts).total)
    single = captions_of(scenes, [1], Vocabulary(scenes))
    torch.testing.assert_close(reader.log_likelihood(single)[0], likelihoods[1])


def test_operations_are_what_torch_counts_and_attention(reader, scenes):
    vocabulary = Vocabulary(scenes)
    words = [4, *vocabulary.ids(scenes.questions[0][0].words), 4]
    texts = join_texts(scenes.features[:1], [[words]], [0])
    counted = operations(lambda: reader.answer_logits(texts))
    assert texts.ids.shape[1] == len(words)  # no padding is counted
    positions = reader.num_positions(4) + len(words)
    attention = 4 * positions**2 * 32 * 2
    attention += len(reader.decoder.cross_attention) * 4 * len(words) * 4 * 32
    choices = 2 * 32 * (len(vocabulary) - len(reader.answers))  # a choice among all words
    assert reader.request_flops(len(words), 4) == counted + attention + choices


def test_a_known_picture_costs_less(reader):
    assert reader.request_flops(6, 4, known=True) < reader.request_flops(6, 4)
